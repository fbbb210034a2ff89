//! Draining: while a part of the graph is drained, no request is in flight in this part, and no request begins.
//!
//! The graph keeps a list of the drains in progress. During a drain, the drained node may become reachable from another
//! backend: the backend is new, or a node above gets another backing file. The requests of this backend are then held
//! back too.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Graph, Registry};
use crate::backend::{Quiesced, WeakBackend, no_medium};
use crate::{Backend, Node, Result};

/// A drained section: the backends above a node are quiesced while this guard lives.
#[derive(Debug)]
pub struct Drained {
    graph: Graph,
    id: u64,
}

/// A drain in progress.
pub(super) struct Active {
    id: u64,
    node: Arc<Node>,
    held: Vec<Quiesced>,
}

impl Graph {
    /// Holds back the requests of every backend that can reach `node`, and waits until their requests in flight have
    /// ended.
    pub async fn drain(&self, node: &Arc<Node>) -> Drained {
        let (drained, backends) = self.hold_back(node);
        for backend in backends {
            backend.idle().await;
        }
        drained
    }

    /// Drains all nodes. The caller holds their control locks. Fails if a node was closed before the caller got the locks.
    pub(super) async fn drain_all(&self, nodes: &[Arc<Node>]) -> Result<Vec<Drained>> {
        if nodes.iter().any(|node| node.users().is_closed()) {
            return Err(no_medium());
        }
        let mut drained = Vec::new();
        for node in nodes {
            drained.push(self.drain(node).await);
        }
        Ok(drained)
    }

    fn hold_back(&self, node: &Arc<Node>) -> (Drained, Vec<Backend>) {
        let mut registry = self.registry();
        let id = registry.next_drain;
        registry.next_drain = id.wrapping_add(1);
        registry.drains.push(Active { id, node: Arc::clone(node), held: Vec::new() });
        let looked_at = registry.extend_drains();
        let held = registry.drains.last().map(|drain| &drain.held);
        let backends = held.into_iter().flatten().map(|quiesced| quiesced.backend().clone());
        let backends = backends.collect();
        drop(registry);
        drop(looked_at);
        (Drained { graph: self.clone(), id }, backends)
    }

    /// Makes the drains in progress hold back the backends that can now reach a drained node. The caller has changed
    /// edges, and still holds back the backends above these edges.
    pub(super) fn extend_drains(&self) {
        let looked_at = self.registry().extend_drains();
        drop(looked_at);
    }
}

impl Registry {
    /// Makes each drain hold back the backends that can reach the drained node. Returns all backends, if there is a
    /// drain. The caller must drop these backends after it has unlocked the registry: a returned reference may be the
    /// last one, and dropping a backend may lock the registry.
    #[must_use]
    pub(super) fn extend_drains(&mut self) -> Vec<Backend> {
        if self.drains.is_empty() {
            return Vec::new();
        }
        let backends: Vec<_> = self.backends.iter().filter_map(WeakBackend::upgrade).collect();
        for drain in &mut self.drains {
            for backend in &backends {
                let is_held = drain.held.iter().any(|quiesced| quiesced.backend() == backend);
                if !is_held && reaches(backend, &drain.node) {
                    drain.held.push(backend.hold_back());
                }
            }
        }
        backends
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let mut registry = self.graph.registry();
        let at = registry.drains.iter().position(|drain| drain.id == self.id);
        let ended = at.map(|at| registry.drains.swap_remove(at));
        drop(registry);
        // Dropping the drain wakes requests. This must not happen while the registry is locked.
        drop(ended);
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

fn reaches(backend: &Backend, node: &Arc<Node>) -> bool {
    backend.node().is_ok_and(|root| is_below(&root, node))
}

/// Whether `node` is `top` or can be reached from it.
pub(super) fn is_below(top: &Arc<Node>, node: &Arc<Node>) -> bool {
    let (mut from, mut seen) = (vec![Arc::clone(top)], HashSet::new());
    while let Some(next) = from.pop() {
        if Arc::ptr_eq(&next, node) {
            return true;
        }
        if !seen.insert(Arc::as_ptr(&next)) {
            continue;
        }
        from.extend(next.children().iter().map(|(_, edge)| Arc::clone(edge.node())));
    }
    false
}
