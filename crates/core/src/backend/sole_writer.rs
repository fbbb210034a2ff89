//! [`SoleWriter`]: the right of a job to be the only writer of a node. Some jobs need an image that no other user
//! changes, for example a commit.
//!
//! The job gets a new backend on the node. The new backend takes over the write and resize permissions of the backend that
//! starts the job. The new backend does not share these permissions with other users. So the job does not begin if the node has
//! another writer, and another writer cannot be attached during the job. Clones of the backend that starts the job may still
//! exist: their writes are refused until the job ends. Until then, the backing chain of the node is frozen.

use std::sync::{Arc, PoisonError};

use oxblk_ring::try_thread_index;

use super::{Backend, WeakBackend};
use crate::change::Change;
use crate::control::in_background;
use crate::perm::{Perm, Permissions};
use crate::{Edge, Error, ErrorKind, FrozenChain, Node, OperationBlock, Operations, Result};

/// The permissions to change a node.
const CHANGES: Perm = Perm::WRITE.union(Perm::WRITE_UNCHANGED).union(Perm::RESIZE);

/// The right to be the only writer of a node, until [`SoleWriter::end`]. If this value is dropped earlier, the right ends in
/// the background, when the requests in flight have ended.
pub struct SoleWriter {
    backend: Backend,
    is_ended: bool,
}

/// The backend that has started the job. The backend of the job owns this value, so the permissions are released
/// at the latest when the last clone of that backend is dropped, for example because its thread ends.
pub(super) struct Lender {
    backend: WeakBackend,
    /// The permissions of its root edge before the job.
    before: Permissions,
    /// The backing chain of the node.
    _frozen: FrozenChain,
    _blocked: OperationBlock,
}

impl Lender {
    /// Adds a step to `change` that gives the permissions back, as far as the backend still wants them. `change` ends the job's
    /// use of the node through `edge`. If the backend that has started the job was closed during the job, the step has no effect.
    pub(super) fn give_back(&self, change: &mut Change, edge: &Edge) {
        let lent = edge.permissions().taken & self.before.taken;
        change.give_back(&self.backend, lent, self.before.shared);
    }
}

impl Backend {
    /// Makes a backend that is the only writer of the root node. `job` is the name of the job in messages (`commit job`). The
    /// new backend takes the permissions of this backend and read permission, and has the write-through mode of this backend.
    /// If this backend may not write, the job may not write either.
    ///
    /// Waits for the requests in flight. Afterwards, writes through this backend and its clones fail until the job ends.
    ///
    /// # Errors
    /// When another user may write to the node or change the size of the node; `EBUSY` during another job; `ENOMEDIUM` if
    /// the backend is closed. After an error, nothing has changed.
    pub async fn sole_writer(&self, job: &str) -> Result<SoleWriter> {
        let (backend, job) = (self.clone(), Arc::<str>::from(job));
        let take = move |node: Arc<Node>| async move { backend.take_over(&node, job) };
        self.graph().run_exclusive(&self.node()?, self.while_open(take)).await
    }

    /// The caller has exclusive use of the node.
    fn take_over(&self, node: &Arc<Node>, job: Arc<str>) -> Result<SoleWriter> {
        let lender = self.root()?;
        if !Arc::ptr_eq(lender.node(), node) {
            let text = format!("'{}' is no longer the root node of the disk", node.name());
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let before = lender.permissions();
        // The two edges together share no more than the edge of this backend shared before. So no user can be attached that
        // conflicts with the former permissions.
        let ours = Permissions {
            taken: before.taken | Perm::CONSISTENT_READ,
            shared: before.shared - CHANGES,
        };
        let left = Permissions {
            taken: before.taken & (before.shared - CHANGES),
            shared: before.shared | ours.taken,
        };
        node.check_operation(Operations::JOB)?;
        let frozen = self.graph().freeze(node, None)?;
        let backend = Self::of_job(self.graph(), ours, &job, "main node");
        let kind = job.strip_suffix(" job").unwrap_or(&job);
        let reason = format!("block device is in use by block job: {kind}");
        let mut change = Change::of(node);
        change.set_root(&backend, Arc::clone(node));
        change.set_permissions(&lender, left);
        backend.join(change)?;
        lender.yield_to(Some(job));
        backend.set_write_through(self.is_write_through());
        let blocked = self.graph().block_operations(node, Operations::all(), &reason);
        let lender =
            Lender { backend: self.downgrade(), before, _frozen: frozen, _blocked: blocked };
        *backend.0.lender.lock().unwrap_or_else(PoisonError::into_inner) = Some(lender);
        Ok(SoleWriter { backend, is_ended: false })
    }
}

impl SoleWriter {
    /// The backend that may write.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Ends the job's use of the node. The backend that has started the job may write again. The node is not flushed, unless it
    /// is closed. Once begun, the operation runs to its end even if the caller's future is dropped.
    ///
    /// # Errors
    /// If the node has no other user, the node is closed: the first failure of this close.
    pub async fn end(mut self) -> Result<()> {
        self.is_ended = true;
        end_use(self.backend.clone()).await
    }
}

impl Drop for SoleWriter {
    fn drop(&mut self) {
        if self.is_ended {
            return;
        }
        if try_thread_index().is_none() {
            // The permissions are released when the backend is dropped.
            return;
        }
        let ended = end_use(self.backend.clone());
        in_background(async move {
            if let Err(error) = ended.await {
                tracing::error!(%error, "cannot close a block node at the end of a job");
            }
        });
    }
}

/// Closes the backend without a flush. Requests that a cancelled job still makes on other threads fail with `ENOMEDIUM`
/// afterwards.
async fn end_use(backend: Backend) -> Result<()> {
    backend.close_after(|_| Box::pin(async { Ok(()) })).await
}

impl std::fmt::Debug for SoleWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoleWriter").field("backend", &self.backend).finish_non_exhaustive()
    }
}
