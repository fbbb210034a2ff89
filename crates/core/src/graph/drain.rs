//! Draining: while a part of the graph is drained, no request is in flight in this part, and no request begins.
//!
//! A drain holds back the backends above the drained node, and waits for their requests in flight. These requests may be
//! anywhere below the backends. So drivers below the backends in which requests wait for something other than the host
//! ([`Drain`]) let the requests pass until the drain ends.
//!
//! The graph keeps a list of the drains in progress. During a drain, the drained node may become reachable from another
//! backend: the backend is new, an empty backend gets a root node, or a node above gets another backing file. The requests
//! of this backend are then held back too. If the backend can already get requests, the change itself holds it back first.

use std::collections::HashSet;
use std::sync::Arc;

use super::walk::{Above, nodes_below};
use super::{Graph, Registry};
use crate::backend::{Quiesced, WeakBackend, no_medium};
use crate::driver::Drain;
use crate::{Backend, Node, Result};

/// A drained section: while this guard lives, the backends above a node (or one backend) begin no request.
#[derive(Debug)]
pub struct Drained {
    graph: Graph,
    id: u64,
}

/// What is drained.
enum Target {
    /// A node: all backends above it.
    Node(Arc<Node>),
    /// Backends, also empty ones.
    Backends(Vec<WeakBackend>),
}

impl Target {
    fn backends(&self) -> Vec<Backend> {
        match self {
            Self::Node(node) => Above::of(std::slice::from_ref(node)).backends,
            Self::Backends(backends) => backends.iter().filter_map(WeakBackend::upgrade).collect(),
        }
    }
}

/// A drain in progress.
pub(super) struct Active {
    id: u64,
    target: Target,
    held: Vec<Quiesced>,
    /// The addresses of the backends in `held`.
    is_held: HashSet<usize>,
    /// The nodes whose drivers let waiting requests pass ([`Drain`](crate::driver::Drain)).
    passing: Vec<Arc<Node>>,
}

impl Active {
    fn new(id: u64, target: Target) -> Self {
        let (held, passing) = (Vec::new(), Vec::new());
        Self { id, target, held, is_held: HashSet::new(), passing }
    }
}

/// What must be done after the registry is unlocked.
#[must_use]
#[derive(Default)]
pub(super) struct AfterUnlock {
    /// Dropped late: a reference may be the last one, and dropping a backend may lock the registry.
    backends: Vec<Backend>,
    /// The nodes whose drivers begin to let requests pass. This wakes requests.
    passing: Vec<Arc<Node>>,
}

impl AfterUnlock {
    pub(super) fn finish(self) {
        self.passing.iter().filter_map(|node| node.driver().drain()).for_each(Drain::begin);
        drop(self.backends);
    }
}

impl Graph {
    /// Holds back the requests of every backend that can reach `node`, and waits until their requests in flight have
    /// ended.
    pub async fn drain(&self, node: &Arc<Node>) -> Drained {
        let (drained, held) = self.hold_back(Target::Node(Arc::clone(node)));
        held.idle().await;
        drained
    }

    /// Holds back the requests of one backend, and waits until its requests in flight have ended.
    pub(crate) async fn drain_backend(&self, backend: &Backend) -> Drained {
        let (drained, held) = self.hold_back(Target::Backends(vec![backend.downgrade()]));
        held.idle().await;
        drained
    }

    /// Drains all nodes and `backends`. The caller holds the control locks of the nodes. Fails if a node was closed before the
    /// caller got the locks.
    pub(super) async fn drain_all(
        &self,
        nodes: &[Arc<Node>],
        backends: &[Backend],
    ) -> Result<Vec<Drained>> {
        if nodes.iter().any(|node| node.users().is_closed()) {
            return Err(no_medium());
        }
        let nodes = nodes.iter().map(|node| Target::Node(Arc::clone(node)));
        let backends = (!backends.is_empty())
            .then(|| Target::Backends(backends.iter().map(Backend::downgrade).collect()));
        let (mut drained, mut all) = (Vec::new(), Held::default());
        for (guard, held) in nodes.chain(backends).map(|target| self.hold_back(target)) {
            drained.push(guard);
            all.backends.extend(held.backends);
            all.nodes.extend(held.nodes);
        }
        all.idle().await;
        Ok(drained)
    }

    fn hold_back(&self, target: Target) -> (Drained, Held) {
        let mut registry = self.registry();
        let id = registry.next_drain;
        registry.next_drain = id.wrapping_add(1);
        registry.drains.push(Active::new(id, target));
        let rest = registry.extend_drains();
        let held = registry.drains.last().map(Held::of).unwrap_or_default();
        drop(registry);
        rest.finish();
        (Drained { graph: self.clone(), id }, held)
    }

    /// Makes the drains in progress hold back the backends that can now reach a drained node. The caller has changed
    /// edges, and still holds back the backends above these edges.
    pub(super) fn extend_drains(&self) {
        let rest = self.registry().extend_drains();
        rest.finish();
    }
}

impl Registry {
    /// Makes each drain hold back the backends that can reach the drained node. Drivers through which their requests pass let
    /// waiting requests go, once the caller has called [`AfterUnlock::finish`].
    pub(super) fn extend_drains(&mut self) -> AfterUnlock {
        let mut rest = AfterUnlock::default();
        for drain in &mut self.drains {
            let above = drain.target.backends();
            for backend in &above {
                if !drain.is_held.insert(backend.key()) {
                    continue;
                }
                drain.held.push(backend.hold_back());
                let Ok(root) = backend.node() else { continue };
                for node in nodes_below(&root) {
                    let is_new = !drain.passing.iter().any(|other| Arc::ptr_eq(other, &node));
                    if is_new && node.driver().drain().is_some() {
                        drain.passing.push(Arc::clone(&node));
                        rest.passing.push(node);
                    }
                }
            }
            rest.backends.extend(above);
        }
        rest
    }
}

/// What a drain waits for.
#[derive(Default)]
struct Held {
    backends: Vec<Backend>,
    nodes: Vec<Arc<Node>>,
}

impl Held {
    fn of(drain: &Active) -> Self {
        let backends = drain.held.iter().map(|quiesced| quiesced.backend().clone());
        Self { backends: backends.collect(), nodes: drain.passing.clone() }
    }

    /// Waits until the requests of the backends have ended, and then for the work of drivers that no request waits for. Such work
    /// may begin other work in a driver that was idle before, so the wait ends when all drivers are idle in one pass.
    async fn idle(self) {
        for backend in self.backends {
            backend.idle().await;
        }
        let mut are_idle = false;
        while !are_idle {
            are_idle = true;
            for node in &self.nodes {
                if let Some(idle) = node.driver().drain().and_then(Drain::idle) {
                    are_idle = false;
                    idle.await;
                }
            }
        }
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let mut registry = self.graph.registry();
        let at = registry.drains.iter().position(|drain| drain.id == self.id);
        let ended = at.map(|at| registry.drains.swap_remove(at));
        drop(registry);
        // This wakes requests, which must not happen while the registry is locked.
        if let Some(ended) = ended {
            ended.passing.iter().filter_map(|node| node.driver().drain()).for_each(Drain::end);
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}
