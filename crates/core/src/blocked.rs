//! Operations on a node that a job or an export does not allow while it runs (QEMU's op blockers).
//!
//! Permissions order requests and control operations of several users. Some operations would not conflict with the
//! permissions of a job, but would make its result useless: a snapshot of an image that is being committed, for example. The
//! job blocks these operations by name. The reason appears in the error. The job's own backend is not affected.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::LocalBoxFuture;

use crate::{Backend, Errno, Error, ErrorKind, Graph, Node, Result};

bitflags::bitflags! {
    /// Operations on a node that can be blocked.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Operations: u8 {
        /// A change of the size.
        const RESIZE = 1;
        /// Taking, restoring and deleting an internal snapshot.
        const SNAPSHOT = 2;
        /// Changing the backing file that the image stores, and emptying the image.
        const BACKING = 4;
        /// Removing the node ([`Graph::allow_close`]).
        const DELETE = 8;
        /// Starting a job.
        const JOB = 16;
    }
}

/// The operations on one node that are blocked.
#[derive(Debug, Default)]
pub(crate) struct Blocked(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    operations: Operations,
    reason: Arc<str>,
}

impl Blocked {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Operations that are blocked until this value is dropped.
#[derive(Debug)]
pub struct OperationBlock {
    node: Arc<Node>,
    reason: Arc<str>,
}

impl Graph {
    /// Blocks operations on `node`. `reason` is a part of the error of such an operation (`block device is in use by block job:
    /// mirror`). Operations in progress are not affected.
    pub fn block_operations(
        &self,
        node: &Arc<Node>,
        operations: Operations,
        reason: &str,
    ) -> OperationBlock {
        let reason = Arc::<str>::from(reason);
        node.blocked().lock().push(Entry { operations, reason: Arc::clone(&reason) });
        OperationBlock { node: Arc::clone(node), reason }
    }
}

impl Drop for OperationBlock {
    fn drop(&mut self) {
        self.node.blocked().lock().retain(|entry| !Arc::ptr_eq(&entry.reason, &self.reason));
    }
}

impl Node {
    /// Checks that no job or export blocks `operation` on this node.
    ///
    /// # Errors
    /// `EBUSY` with the reason of the block that exists for the longest time.
    pub fn check_operation(&self, operation: Operations) -> Result<()> {
        let blocked = self.blocked().lock();
        match blocked.iter().find(|entry| entry.operations.intersects(operation)) {
            Some(entry) => {
                let text = format!("Node '{}' is busy: {}", self.name(), entry.reason);
                Err(Error::new(ErrorKind::Busy, text).errno(Errno::BUSY))
            }
            None => Ok(()),
        }
    }
}

impl Backend {
    /// Checks that `operation` is not blocked on `node`. The backend of a job is not affected.
    pub(crate) fn check_operation(&self, node: &Node, operation: Operations) -> Result<()> {
        if self.is_of_job() { Ok(()) } else { node.check_operation(operation) }
    }

    /// Wraps the work of a control operation, which fails if the operation is blocked when it begins.
    pub(crate) fn unless_blocked<T, F>(
        &self,
        operation: Operations,
        work: impl FnOnce(Arc<Node>) -> F + 'static,
    ) -> impl FnOnce(Arc<Node>) -> LocalBoxFuture<'static, Result<T>> + 'static
    where
        T: 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let backend = self.clone();
        move |node| {
            Box::pin(async move {
                backend.check_operation(&node, operation)?;
                work(node).await
            })
        }
    }
}
