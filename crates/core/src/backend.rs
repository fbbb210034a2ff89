//! Backends: the handles through which devices, exports, jobs and tools send requests.
//!
//! | file | concern |
//! |---|---|
//! | this file | the handle: root, size, resizing, closing, reopening |
//! | `root` | the root edge |
//! | `requests` | reads, writes, zero writes, discards, flushes, status queries |
//! | `in_flight` | counting requests in flight, and holding them back |
//! | `attempts` | carrying out a request: accounting, and further attempts after errors |
//! | `accounting` | statistics |
//! | `device` | the attached device |
//! | `error_policy`, `held` | what happens after an error; requests that are held after an error |
//! | `mode` | which of these parts a backend uses |
//! | `copy` | copies from one backend to another |
//! | `sole_writer` | the right to be the only writer of a node |
//!
//! A [`Backend`] has a name and a root edge. A backend checks that a request lies inside the disk. The
//! backend counts requests in flight per thread, so that [`Backend::quiesce`] can wait for them. Each
//! request enters the current epoch: clusters that are freed during the request are not reused before the request has
//! ended. All I/O threads may use a backend concurrently.

mod accounting;
mod attempts;
mod copy;
mod device;
mod error_policy;
mod held;
mod in_flight;
mod mode;
mod requests;
mod root;
mod sole_writer;

use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use futures_util::future::LocalBoxFuture;
use oxblk_ring::{Event, Sharded};

use crate::change::Change;
use crate::control::run_to_completion;
use crate::edge::Owner;
use crate::perm::{Permissions, Roles};
use crate::{
    ChildIdx, Edge, Errno, Error, ErrorKind, Graph, Node, Operations, Options, Preallocation,
    Result,
};
use accounting::Accounting;
pub use accounting::{
    AccountingOptions, Boundaries, Counts, IntervalStatistics, IoType, Latencies, LatencyHistogram,
    PerIoType, Statistics,
};
use device::DeviceSlot;
pub use device::{Device, DeviceOptions, DeviceState};
pub use error_policy::{IoStatus, OnError};
use held::HeldRequests;
pub(crate) use in_flight::Quiesced;
use mode::{Mode, ModeCell};
use root::{ReportedSize, Root};
use sole_writer::Lender;
pub use sole_writer::SoleWriter;

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

struct Inner {
    name: String,
    graph: Graph,
    roots: Sharded<Root>,
    id: u64,
    /// Numbers of requests in flight.
    in_flight: Sharded<AtomicU64>,
    mode: ModeCell,
    reported_size: ReportedSize,
    accounting: OnceLock<Accounting>,
    device: DeviceSlot,
    held: HeldRequests,
    quiesced: AtomicUsize,
    changed: Event,
    /// The permissions that this backend takes on its root node.
    permissions: Mutex<Permissions>,
    /// The user of the root edge and the name of the edge, for messages.
    user: String,
    edge_name: &'static str,
    /// The backend stays at its root node when other users of the node move to another node.
    is_fixed: bool,
    /// Set by [`Backend::close`]. A backend without a root node that is not closed is empty.
    is_closed: AtomicBool,
    /// For the backend of a job that is the only writer: the user that gets its permissions back.
    lender: Mutex<Option<Lender>>,
}

/// A handle through which requests reach a root node and the nodes below it. Clones refer to the same backend. If the
/// last clone is dropped without [`Backend::close`], data that a driver caches in memory may be lost. If the root node
/// is writable, the log reports this as an error. After a close, all requests and control operations fail with
/// `ENOMEDIUM`.
#[derive(Clone)]
pub struct Backend(Arc<Inner>);

impl Drop for Inner {
    fn drop(&mut self) {
        let root = self.roots.iter().find_map(ArcSwapOption::load_full);
        let Some(node) = root.as_ref().map(|root| root.edge.node()) else { return };
        let lender = self.lender.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if lender.is_none() && !node.is_read_only() {
            tracing::error!(
                backend = self.name,
                node = node.name(),
                "a backend was dropped without being closed: data cached in memory is lost"
            );
        }
        // Release the permissions, so that later users of the node do not conflict with them.
        if let Some(root) = &root {
            let edge = Arc::clone(&root.edge);
            end_use_of(&root.edge, lender, move |change| change.detach(&edge));
        }
    }
}

/// Ends the use of a node through `edge`. `detach` adds the step that does this. A lender gets its permissions back.
fn end_use_of(edge: &Arc<Edge>, lender: Option<Lender>, detach: impl Fn(&mut Change)) {
    if let Some(lender) = lender {
        let mut change = Change::of(edge.node());
        detach(&mut change);
        lender.give_back(&mut change, edge);
        match change.commit() {
            Ok(_) => return,
            Err(error) => {
                tracing::error!(%error, "a block device does not get its permissions back after a job");
            }
        }
    }
    let mut change = Change::of(edge.node());
    detach(&mut change);
    change.release();
}

/// The graph's weak reference to a backend; it does not keep the backend alive.
#[derive(Clone)]
pub(crate) struct WeakBackend(Weak<Inner>);

impl WeakBackend {
    pub(crate) fn upgrade(&self) -> Option<Backend> {
        self.0.upgrade().map(Backend)
    }

    /// Whether the backend still exists. The backend may be dropped at any time after this call.
    pub(crate) fn exists(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn is(&self, backend: &Backend) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&backend.0))
    }
}

impl Backend {
    /// Makes a backend with the root node `node`. `name` may be empty.
    ///
    /// # Errors
    /// When the node is closed; when the backend takes write permission on a read-only node; when the permissions conflict with
    /// those of another user in this process, or (through file locks) in another process.
    pub fn new(
        graph: &Graph,
        name: &str,
        node: Arc<Node>,
        permissions: Permissions,
    ) -> Result<Self> {
        let backend = Self::unregistered(graph, name, permissions);
        let mut change = Change::of(&node);
        change.set_root(&backend, node);
        backend.join(change)?;
        Ok(backend)
    }

    /// Makes a backend without a root node: a drive without a medium. Requests fail with `ENOMEDIUM`, and the size is 0.
    /// [`Self::insert`] gives the backend a root node, on which it takes `permissions`.
    pub fn empty(graph: &Graph, name: &str, permissions: Permissions) -> Self {
        let backend = Self::unregistered(graph, name, permissions);
        graph.register_backend(&backend);
        backend
    }

    /// Like [`Self::empty`]. The graph does not know the backend yet.
    fn unregistered(graph: &Graph, name: &str, permissions: Permissions) -> Self {
        let user = if name.is_empty() {
            "an unnamed block device".to_owned()
        } else {
            format!("block device '{name}'")
        };
        Self::with_user(graph, name, permissions, (user, "root"), false)
    }

    /// A backend of a job, which stays at its node. The graph does not know the backend yet.
    pub(crate) fn of_job(
        graph: &Graph,
        permissions: Permissions,
        job: &str,
        edge_name: &'static str,
    ) -> Self {
        Self::with_user(graph, "", permissions, (job.to_owned(), edge_name), true)
    }

    fn with_user(
        graph: &Graph,
        name: &str,
        permissions: Permissions,
        (user, edge_name): (String, &'static str),
        is_fixed: bool,
    ) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            graph: graph.clone(),
            roots: Sharded::default(),
            id: NEXT_ID.fetch_add(1, Relaxed),
            in_flight: Sharded::default(),
            mode: ModeCell::default(),
            reported_size: ReportedSize::default(),
            accounting: OnceLock::new(),
            device: DeviceSlot::default(),
            held: HeldRequests::default(),
            quiesced: AtomicUsize::new(0),
            changed: Event::new(),
            permissions: Mutex::new(permissions),
            user,
            edge_name,
            is_fixed,
            is_closed: AtomicBool::new(false),
            lender: Mutex::new(None),
        }))
    }

    /// Makes the change that gives a new backend its root node, and adds the backend to the graph.
    pub(crate) fn join(&self, change: Change) -> Result<()> {
        change.commit()?;
        self.0.graph.register_backend(self);
        Ok(())
    }

    /// A root edge of this backend that does not use `node` yet.
    pub(crate) fn new_root_edge(&self, node: &Arc<Node>, permissions: Permissions) -> Arc<Edge> {
        let (user, name) = (self.0.user.as_str(), self.0.edge_name);
        let edge = Edge::unattached(Arc::clone(node), user, name, Roles::empty(), permissions);
        let weak = self.downgrade();
        edge.owned_by(match self.0.is_fixed {
            true => Owner::FixedBackend(weak),
            false => Owner::Backend(weak),
        });
        edge
    }

    /// Whether this is the backend of a job.
    pub(crate) fn is_of_job(&self) -> bool {
        self.0.is_fixed
    }

    /// The permissions that this backend takes on a root node.
    pub(crate) fn permissions(&self) -> Permissions {
        *self.0.permissions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the permissions of this backend. If the backend gives permissions up, waits for the requests in flight first.
    ///
    /// # Errors
    /// The errors of [`Self::new`]; `ENOMEDIUM` if the backend has no root node. After an error, nothing has changed.
    pub async fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let gives_up = !(self.root()?.permissions().taken - permissions.taken).is_empty();
        let _drained = if gives_up { Some(self.quiesce().await) } else { None };
        let mut change = Change::new(self.0.graph.change_lock());
        change.set_backend_permissions(self, move |_| permissions);
        change.commit().map(drop)
    }

    /// Records the permissions that this backend wants on a root node. Only a [`Change`] calls this.
    pub(crate) fn want(&self, permissions: Permissions) {
        *self.0.permissions.lock().unwrap_or_else(PoisonError::into_inner) = permissions;
    }

    /// The address of the backend, which identifies it while it exists.
    pub(crate) fn key(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    pub(crate) fn downgrade(&self) -> WeakBackend {
        WeakBackend(Arc::downgrade(&self.0))
    }

    /// The number of the backend. No other backend of this process has the same number.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// The name of the backend.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The graph that the backend belongs to.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Sets write-through mode. In this mode, the data of every write, zero write and copy is on stable storage when
    /// the request completes.
    /// This is QEMU's `write-cache=off`.
    pub fn set_write_through(&self, on: bool) {
        self.0.mode.set(Mode::WRITE_THROUGH, on);
    }

    /// Whether the backend is in write-through mode.
    pub fn is_write_through(&self) -> bool {
        self.0.mode.get().contains(Mode::WRITE_THROUGH)
    }

    /// Sets the size of the disk. Other requests wait until the resize has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without resize permission or if the node is read-only; [`ErrorKind::Unsupported`] if the
    /// driver cannot change the size; the errors of [`crate::check_length`]; `EBUSY` if a job or an export blocks
    /// [`Operations::RESIZE`]; `ENOMEDIUM` if the backend is closed; otherwise the errors of the driver and the host.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let (above, lowest) = resized_with(self.node()?);
        let backend = self.clone();
        let resize = move |_| async move {
            let root = backend.root()?;
            let (above, lowest) = resized_with(Arc::clone(root.node()));
            for node in above.iter().chain([&lowest]) {
                backend.check_operation(node, Operations::RESIZE)?;
            }
            root.resize(size, preallocation).await
        };
        self.0.graph.run_exclusive_below(above, &lowest, self.while_open(resize)).await
    }

    /// Flushes the root node if it is writable, detaches the backend from the root node, and closes each node that then
    /// has no user. Waits for control operations on these nodes, also those of other backends. Once begun, the close runs
    /// to its end even if its future is dropped. A second close does nothing.
    ///
    /// # Errors
    /// The first failure of the flush or of a node's close. After a failure, the remaining nodes are closed too.
    pub async fn close(&self) -> Result<()> {
        self.close_after(|edge| {
            Box::pin(
                async move { if edge.node().is_read_only() { Ok(()) } else { edge.flush().await } },
            )
        })
        .await
    }

    /// Like [`Self::close`], with `last` as the last operation through the root edge, instead of the flush.
    async fn close_after(
        &self,
        last: impl FnOnce(Arc<Edge>) -> LocalBoxFuture<'static, Result<()>> + 'static,
    ) -> Result<()> {
        let (edge, controls, drained) = loop {
            let Ok(edge) = self.root() else {
                self.mark_closed();
                return Ok(());
            };
            let controls = self.0.graph.controls(edge.node()).await;
            let drained = self.quiesce().await;
            match self.root() {
                Ok(now) if Arc::ptr_eq(&now, &edge) => break (edge, controls, drained),
                // The backend got another root node while this call waited.
                Ok(_) => {}
                // Another call has closed the backend or removed its root node while this call waited.
                Err(_) => {
                    self.mark_closed();
                    return Ok(());
                }
            }
        };
        let backend = self.clone();
        run_to_completion(async move {
            let finished = last(Arc::clone(&edge)).await;
            let lender = backend.0.lender.lock().unwrap_or_else(PoisonError::into_inner).take();
            backend.mark_closed();
            let closing = backend.clone();
            end_use_of(&edge, lender, move |change| change.remove_root(&closing));
            let node = Arc::clone(edge.node());
            drop(edge);
            let closed = backend.0.graph.release_unused(node, &controls).await;
            drop(drained);
            drop(controls);
            finished.and(closed)
        })
        .await
    }

    /// Records that the backend never gets a root node again.
    fn mark_closed(&self) {
        self.0.is_closed.store(true, SeqCst);
        self.fail_held();
        self.0.graph.unregister_backend(self);
    }

    /// Whether the backend was closed.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed.load(SeqCst)
    }

    /// Gives an empty backend a root node: inserts a medium into a drive.
    ///
    /// # Errors
    /// When the backend has a root node; `ENOMEDIUM` if the backend is closed; the errors of [`Self::new`]. After an error,
    /// nothing has changed.
    pub async fn insert(&self, node: &Arc<Node>) -> Result<()> {
        let mut change = self.0.graph.change();
        change.insert_root(self, node);
        change.run().await
    }

    /// Takes the root node out of the backend: removes the medium from a drive. Flushes the node if it is writable, and closes it
    /// if it has no other user; the log reports an error of this close. Without a root node, does nothing.
    ///
    /// # Errors
    /// The errors of the flush. After an error, nothing has changed.
    pub async fn remove(&self) -> Result<()> {
        let mut change = self.0.graph.change();
        change.remove_root(self);
        change.run().await
    }

    /// Reopens the root node with other options. Options that are missing in `options` stay unchanged. If the node
    /// becomes read-only, the backend releases its write and resize permission. If the node becomes writable, the
    /// backend takes both permissions.
    ///
    /// # Errors
    /// The errors of [`Graph::reopen`]; `ENOMEDIUM` if the backend is closed. After an error, nothing has changed.
    pub async fn reopen(&self, options: Options) -> Result<()> {
        self.0.graph.reopen_root(self, options).await
    }
}

/// The nodes that are resized with `root`: the nodes that pass their permissions to their `file` child, from `root` down, and the
/// lowest node.
fn resized_with(root: Arc<Node>) -> (Vec<Arc<Node>>, Arc<Node>) {
    let (mut lowest, mut above) = (root, Vec::new());
    while lowest.factory().passes_permissions()
        && let Some(below) = lowest.child(ChildIdx::FILE)
    {
        above.push(std::mem::replace(&mut lowest, below));
    }
    (above, lowest)
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl PartialEq for Backend {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

pub(crate) fn no_medium() -> Error {
    Error::new(ErrorKind::NotFound, "No medium found").errno(Errno::NOMEDIUM)
}
