//! The only writer of a node: a job that relies on an image that only the job itself changes.
//!
//! A job gets a backend of its own on the node, which takes over the permissions to write and to resize from the backend that
//! starts the job. The job does not share these permissions. So the job does not begin if the node has another writer, and
//! another writer cannot be attached during the job. Clones of the backend that starts the job may still exist: their writes
//! are refused until the job ends.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::Backend;
use crate::control::{in_background, run_to_completion};
use crate::perm::{Perm, Permissions};
use crate::{Edge, Node, Result};

/// Permissions of operations that change a node.
const CHANGES: Perm = Perm::WRITE.union(Perm::WRITE_UNCHANGED).union(Perm::RESIZE);

/// The right to be the only writer of a node, until [`SoleWriter::end`]. If this is dropped earlier, the right ends in the
/// background, after the requests in flight.
pub struct SoleWriter {
    backend: Backend,
    lender: Lender,
    is_ended: bool,
}

/// The edge of the backend that has started the job.
#[derive(Clone)]
struct Lender {
    edge: Arc<Edge>,
    /// The permissions of this edge before the job.
    before: Permissions,
}

impl Backend {
    /// Makes a backend that is the only writer of the root node, for the job `job` (`commit job`; messages name it). It has
    /// the permissions and the write-through mode of this backend. If this backend may not write, the job may not write either.
    ///
    /// Waits for the requests in flight. Afterwards, writes through this backend and its clones fail until the job ends.
    ///
    /// # Errors
    /// When another user may write to the node or change its size. Nothing has changed then.
    pub async fn sole_writer(&self, job: &str) -> Result<SoleWriter> {
        let (backend, job) = (self.clone(), Arc::<str>::from(job));
        let take = move |node: Arc<Node>| async move { backend.take_over(node, job) };
        self.graph().run_exclusive(&self.node()?, self.while_open(take)).await
    }

    /// The caller has exclusive use of the node.
    fn take_over(&self, node: Arc<Node>, job: Arc<str>) -> Result<SoleWriter> {
        let lender = self.root()?;
        let before = lender.permissions();
        // Both users together share no more than before. So no user can be attached that conflicts with the former permissions.
        let ours = Permissions {
            taken: before.taken | Perm::CONSISTENT_READ,
            shared: before.shared - CHANGES,
        };
        let left = Permissions {
            taken: before.taken & (before.shared - CHANGES),
            shared: before.shared | ours.taken,
        };
        let edge = Edge::unattached(node, &*job, "main node", ours);
        edge.node().add_parent_beside(&edge, &lender, left)?;
        lender.yield_to(Some(job));
        let backend = Self::on_root(self.graph(), "", &edge);
        backend.set_write_through(self.0.write_through.load(Relaxed));
        Ok(SoleWriter { backend, lender: Lender { edge: lender, before }, is_ended: false })
    }
}

impl SoleWriter {
    /// The backend that may write.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Ends the job's use of the node. The backend that has started the job may write again. This does not flush. Once begun,
    /// this runs to its end even if the caller's future is dropped.
    ///
    /// # Errors
    /// The node is closed if it has no other user: its first failure.
    pub async fn end(mut self) -> Result<()> {
        self.is_ended = true;
        run_to_completion(hand_back(self.backend.clone(), self.lender.clone())).await
    }
}

impl Drop for SoleWriter {
    fn drop(&mut self) {
        if self.is_ended {
            return;
        }
        let ended = hand_back(self.backend.clone(), self.lender.clone());
        in_background(async move {
            if let Err(error) = ended.await {
                tracing::error!(%error, "cannot close a block node at the end of a job");
            }
        });
    }
}

async fn hand_back(backend: Backend, lender: Lender) -> Result<()> {
    let Ok(edge) = backend.root() else { return Ok(()) };
    let node = Arc::clone(edge.node());
    let graph = backend.graph().clone();
    let controls = graph.controls(&node).await;
    // Requests that a cancelled job still makes on other threads find no medium afterwards.
    let quiesced = backend.quiesce().await;
    backend.set_root(None);
    // A reopen may have changed the permissions of the lender meanwhile.
    let (now, Lender { edge: lender, before }) = (lender.edge.permissions(), lender);
    let lent = edge.permissions().taken & before.taken;
    lender.yield_to(None);
    let restored = Permissions { taken: now.taken | lent, shared: before.shared };
    node.remove_parent_beside(&edge, &lender, restored);
    drop(edge);
    let released = graph.release_unused(node, &controls).await;
    graph.unregister_backend(&backend);
    drop(quiesced);
    drop(controls);
    released
}

impl std::fmt::Debug for SoleWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoleWriter").field("backend", &self.backend).finish_non_exhaustive()
    }
}
