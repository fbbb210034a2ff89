//! [`WritableBase`]: makes a backing file writable for a commit.
//!
//! A backing file is read-only and must not change while an overlay uses it. A commit may bypass both rules, because a commit
//! only writes data that the overlay already shows. A [`WritableBase`] suspends both rules until the [`WritableBase`] is
//! closed. Until then, the overlay's edge to the backing file shares all permissions, whatever the users of the overlay share.
//! The backing file has no other writer, and the links of the chain above it are frozen.
//!
//! A filter below the overlay that must see all changes
//! ([`DriverFactory::sees_all_changes`](crate::DriverFactory::sees_all_changes)) would miss the writes of the commit. If
//! there is one above the backing file, the edge shares nothing in addition, and the commit fails with a permission
//! conflict.

use std::sync::Arc;

use super::walk::observer;
use super::{Graph, ReopenRequest};
use crate::change::Change;
use crate::control::{in_background, run_to_completion};
use crate::perm::{Perm, Permissions};
use crate::{Backend, Edge, Error, FrozenChain, Node, Options, Result};

/// A backing file that is writable until [`WritableBase::close`]. If this value is dropped without a close, the close
/// runs in the background, and the log reports a failure.
pub struct WritableBase {
    backend: Backend,
    parent: Reader,
    was_read_only: bool,
    is_closed: bool,
}

/// The edge through which the node above reads the backing file.
#[derive(Clone)]
struct Reader {
    above: Arc<Node>,
    edge: Arc<Edge>,
    /// A filter below the overlay would miss writes to the backing file.
    is_observed: bool,
    /// The links from the top of the chain to the backing file.
    _frozen: Arc<FrozenChain>,
}

impl Reader {
    /// Attaches a backend that writes to the backing file. The edge then shares all permissions.
    fn admit_writer(&self, graph: &Graph) -> Result<Backend> {
        let writes = Perm::WRITE | Perm::RESIZE;
        let permissions =
            Permissions { taken: Perm::CONSISTENT_READ | writes, shared: Perm::all() - writes };
        let backend = Backend::of_job(graph, permissions, "an unnamed block device", "root");
        let mut change = Change::of(&self.above);
        if !self.is_observed {
            change.also_share(&self.above, &self.edge, Perm::all());
        }
        change.set_root(&backend, Arc::clone(self.edge.node()));
        backend.join(change)?;
        Ok(backend)
    }

    /// Ends the additional sharing, after the backend has been closed.
    fn refuse_writers(&self) -> Result<()> {
        let mut change = Change::of(&self.above);
        change.also_share(&self.above, &self.edge, Perm::empty());
        change.commit().map(drop)
    }
}

impl Graph {
    /// Makes `base`, a backing file below `top`, writable. Once begun, the operation runs to its end. If the caller's
    /// future is dropped, the base still becomes writable, and its former state is then restored in the background.
    ///
    /// # Errors
    /// When `base` is not below `top`; when the driver, the host or another user refuses. After an error, the former
    /// state is restored; the log reports a failure to restore it.
    pub async fn write_base(&self, top: &Arc<Node>, base: &Arc<Node>) -> Result<WritableBase> {
        let parent = self.reader_of(top, base)?;
        let (graph, base) = (self.clone(), Arc::clone(base));
        run_to_completion(async move { graph.open_base(parent, &base).await }).await
    }

    async fn open_base(&self, parent: Reader, base: &Arc<Node>) -> Result<WritableBase> {
        let was_read_only = base.is_read_only();
        if was_read_only {
            self.set_read_only(base, false).await?;
        }
        match parent.admit_writer(self) {
            Ok(backend) => Ok(WritableBase { backend, parent, was_read_only, is_closed: false }),
            Err(error) => {
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

    /// Freezes the chain from `top` to `base`, and finds the node above `base`.
    fn reader_of(&self, top: &Arc<Node>, base: &Arc<Node>) -> Result<Reader> {
        let frozen = Arc::new(self.freeze(top, Some(base))?);
        let mut above = Arc::clone(top);
        while let Some(edge) = above.filter_or_cow_child() {
            if Arc::ptr_eq(edge.node(), base) {
                let is_observed = observer(base, Some(&top.skip_filters())).is_some();
                return Ok(Reader { above, edge, is_observed, _frozen: frozen });
            }
            above = Arc::clone(edge.node());
        }
        Err(Error::invalid(format!("'{}' is not below '{}'", base.name(), top.name())))
    }
}

impl WritableBase {
    /// The backend that writes to the backing file.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Flushes all writes, closes the backend, and restores the permissions of the overlay and the read-only state of
    /// the base. Once begun, the close runs to its end even if the caller's future is dropped.
    ///
    /// # Errors
    /// The first failure. The remaining steps are carried out even after a failure.
    pub async fn close(mut self) -> Result<()> {
        self.is_closed = true;
        run_to_completion(self.restore()).await
    }

    fn restore(&self) -> impl Future<Output = Result<()>> + use<> {
        let (backend, parent) = (self.backend.clone(), self.parent.clone());
        let was_read_only = self.was_read_only;
        async move {
            let closed = backend.close().await;
            let outcome = closed.and(parent.refuse_writers());
            if was_read_only {
                let base = parent.edge.node();
                return outcome.and(backend.graph().set_read_only(base, true).await);
            }
            outcome
        }
    }
}

impl Drop for WritableBase {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        let (base, restored) = (self.parent.edge.node().name().to_owned(), self.restore());
        in_background(async move {
            if let Err(error) = restored.await {
                tracing::error!(node = base, %error, "cannot make a backing file read-only again");
            }
        });
    }
}
