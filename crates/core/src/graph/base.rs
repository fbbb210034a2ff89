//! Writing to a node of a backing chain, as a commit does.
//!
//! A backing file is read-only and may not change under its overlay. A commit may bypass both rules, because it only
//! writes data that the overlay shows already. A [`WritableBase`] lifts both rules and restores them when it is closed.

use std::sync::Arc;

use super::{Graph, ReopenRequest};
use crate::perm::{Perm, Permissions};
use crate::{Backend, ChildIdx, Edge, Error, Node, Options, Result};

/// A backing file that is writable until [`WritableBase::close`].
pub struct WritableBase {
    backend: Backend,
    parent: Reader,
    was_read_only: bool,
}

/// The edge through which the overlay reads the backing file, and the edge's former permissions.
struct Reader {
    edge: Arc<Edge>,
    before: Permissions,
}

impl Graph {
    /// Makes `base`, which is below `top` in its backing chain, writable.
    ///
    /// # Errors
    /// When `base` is not below `top`; when the driver, the host or another user refuses. Nothing has changed then.
    pub async fn write_base(&self, top: &Arc<Node>, base: &Arc<Node>) -> Result<WritableBase> {
        let edge = edge_above(top, base)?;
        let was_read_only = base.is_read_only();
        if was_read_only {
            self.set_read_only(base, false).await?;
        }
        let parent = Reader { before: edge.permissions(), edge };
        match attach(self, &parent, base) {
            Ok(backend) => Ok(WritableBase { backend, parent, was_read_only }),
            Err(error) => {
                // The former permissions were valid before, so they cannot conflict now.
                if let Err(error) = parent.edge.set_permissions(parent.before) {
                    tracing::warn!(%error, "cannot restore permissions");
                }
                if was_read_only && let Err(error) = self.set_read_only(base, true).await {
                    tracing::warn!(%error, "cannot make a backing file read-only again");
                }
                Err(error)
            }
        }
    }

    async fn set_read_only(&self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        let mut options = Options::new();
        options.insert("read-only", read_only);
        self.reopen(vec![ReopenRequest { node: Arc::clone(node), options, keep: true }]).await
    }
}

fn edge_above(top: &Arc<Node>, base: &Arc<Node>) -> Result<Arc<Edge>> {
    let mut over = Arc::clone(top);
    while let Some(edge) = over.children().get(ChildIdx::BACKING) {
        if Arc::ptr_eq(edge.node(), base) {
            return Ok(edge);
        }
        over = Arc::clone(edge.node());
    }
    Err(Error::invalid(format!("'{}' is not in the chain of '{}'", base.name(), top.name())))
}

fn attach(graph: &Graph, parent: &Reader, base: &Arc<Node>) -> Result<Backend> {
    let shared = Permissions { shared: Perm::all(), ..parent.before };
    parent.edge.set_permissions(shared)?;
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(graph, "", Arc::clone(base), Permissions::sharing_all(taken))
}

impl WritableBase {
    /// The backend that writes to the backing file.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Flushes all writes, and restores the node's permissions and read-only state.
    ///
    /// # Errors
    /// The first failure. The remaining steps are carried out even then.
    pub async fn close(self) -> Result<()> {
        let graph = self.backend.graph().clone();
        let base = Arc::clone(self.parent.edge.node());
        let closed = self.backend.close().await;
        let shared = self.parent.edge.set_permissions(self.parent.before);
        let outcome = closed.and(shared);
        if self.was_read_only {
            return outcome.and(graph.set_read_only(&base, true).await);
        }
        outcome
    }
}
