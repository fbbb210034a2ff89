//! Backends: the handles through which devices, exports, jobs and tools make requests.
//!
//! A [`Backend`] has a name and a root edge. It checks bounds, counts requests in flight per thread so that it can be
//! [quiesced](Backend::quiesce), enters each request into the epoch that freed clusters wait for, and keeps statistics.
//! Any I/O thread may use it at any time.

mod copy;

use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use oxblk_ring::{Event, IoBuf, IoBufMut, Shard, Sharded, UntilSettled, keep_until_settled};

use crate::control::run_to_completion;
use crate::epoch::{EpochGuard, EpochPlace};
use crate::perm::Permissions;
use crate::request::{self, ChainStatus};
use crate::{
    ChildIdx, CompressedCluster, Edge, Errno, Error, ErrorKind, Graph, Node, Options,
    Preallocation, Result, Want, WriteFlags, ZeroFlags,
};

/// Counters of one I/O thread.
#[derive(Debug, Default)]
struct Counters {
    in_flight: AtomicU64,
    read_ops: AtomicU64,
    read_bytes: AtomicU64,
    write_ops: AtomicU64,
    write_bytes: AtomicU64,
    flush_ops: AtomicU64,
}

/// Counts of the requests completed through a backend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads completed.
    pub read_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, zero writes and discards completed.
    pub write_ops: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes completed.
    pub flush_ops: u64,
}

/// The root edge as one I/O thread sees it. Each thread has its own reference count for the edge, so that requests of
/// several threads do not contend for one cache line.
type Root = ArcSwapOption<RootEdge>;

struct RootEdge {
    edge: Arc<Edge>,
}

struct Inner {
    name: String,
    graph: Graph,
    roots: Sharded<Root>,
    counters: Sharded<Counters>,
    quiesced: AtomicUsize,
    changed: Event,
    write_through: AtomicBool,
}

/// A handle to a tree of nodes. Clones are the same backend. If the last clone is dropped without [`Backend::close`],
/// the log reports it: data that a driver caches in memory is lost, and files are closed in their present state.
#[derive(Clone)]
pub struct Backend(Arc<Inner>);

impl Drop for Inner {
    fn drop(&mut self) {
        let root = self.roots.iter().find_map(ArcSwapOption::load_full);
        let Some(node) = root.as_ref().map(|root| root.edge.node()) else { return };
        if !node.is_read_only() {
            tracing::error!(
                backend = self.name,
                node = node.name(),
                "a backend was dropped without being closed: data cached in memory is lost"
            );
        }
        // Other users of the node must not conflict with permissions that nobody uses.
        if let Some(root) = &root {
            root.edge.detach();
        }
    }
}

/// The graph's weak reference to a backend; it does not keep the backend alive.
pub(crate) struct WeakBackend(Weak<Inner>);

impl WeakBackend {
    pub(crate) fn upgrade(&self) -> Option<Backend> {
        self.0.upgrade().map(Backend)
    }

    /// Whether the backend still exists. It may be dropped at any time after a positive answer.
    pub(crate) fn exists(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn is(&self, backend: &Backend) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&backend.0))
    }
}

impl Backend {
    /// A backend named `name` (may be empty) on `node`.
    ///
    /// # Errors
    /// When the permissions conflict with those of another user.
    pub fn new(
        graph: &Graph,
        name: &str,
        node: Arc<Node>,
        permissions: Permissions,
    ) -> Result<Self> {
        let user = if name.is_empty() {
            "an unnamed block device".to_owned()
        } else {
            format!("block device '{name}'")
        };
        let root = Edge::attach(node, user, "root", permissions)?;
        let backend = Self(Arc::new(Inner {
            name: name.to_owned(),
            graph: graph.clone(),
            roots: Sharded::default(),
            counters: Sharded::default(),
            quiesced: AtomicUsize::new(0),
            changed: Event::new(),
            write_through: AtomicBool::new(false),
        }));
        backend.set_root(Some(&root));
        graph.register_backend(&backend);
        Ok(backend)
    }

    pub(crate) fn downgrade(&self) -> WeakBackend {
        WeakBackend(Arc::downgrade(&self.0))
    }

    /// Sets the root edge of all threads. Only while no request is in flight.
    fn set_root(&self, edge: Option<&Arc<Edge>>) {
        for root in self.0.roots.iter() {
            root.store(edge.map(|edge| Arc::new(RootEdge { edge: Arc::clone(edge) })));
        }
    }

    /// The name of the backend.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The graph that the backend belongs to.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// The root edge.
    ///
    /// # Errors
    /// `ENOMEDIUM` when there is none.
    pub fn root(&self) -> Result<Arc<Edge>> {
        self.0.roots.mine().load().as_ref().map(|root| Arc::clone(&root.edge)).ok_or_else(no_medium)
    }

    /// The root node.
    ///
    /// # Errors
    /// `ENOMEDIUM` when there is none.
    pub fn node(&self) -> Result<Arc<Node>> {
        Ok(Arc::clone(self.root()?.node()))
    }

    /// Size in bytes; 0 without a medium.
    pub fn size(&self) -> u64 {
        self.0.roots.mine().load().as_ref().map_or(0, |root| root.edge.size())
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.0.roots.mine().load().as_ref().is_none_or(|root| root.edge.node().is_read_only())
    }

    /// Sets write-through mode. With it, every write is durable when it completes.
    pub fn set_write_through(&self, on: bool) {
        self.0.write_through.store(on, Relaxed);
    }

    /// The counts of all requests completed so far.
    pub fn statistics(&self) -> Statistics {
        self.0.counters.iter().fold(Statistics::default(), |sum, one| Statistics {
            read_ops: sum.read_ops.wrapping_add(one.read_ops.load(Relaxed)),
            read_bytes: sum.read_bytes.wrapping_add(one.read_bytes.load(Relaxed)),
            write_ops: sum.write_ops.wrapping_add(one.write_ops.load(Relaxed)),
            write_bytes: sum.write_bytes.wrapping_add(one.write_bytes.load(Relaxed)),
            flush_ops: sum.flush_ops.wrapping_add(one.flush_ops.load(Relaxed)),
        })
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] past the end; otherwise the errors of the driver and the host.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let request = self.begin().await?;
        let len = request::as_u64(buf.len());
        request.check(offset, len)?;
        let buf = if self.0.graph.copies_on_read() {
            let root = Arc::clone(&request.root);
            let work = async move { request::read_padded(root.edge.node(), offset, buf).await };
            request.run_to_completion(work).await?
        } else {
            let buf = request::read_padded(request.root.edge.node(), offset, buf).await?;
            request.done();
            buf
        };
        let counters = self.0.counters.mine();
        counters.read_ops.fetch_add(1, Relaxed);
        counters.read_bytes.fetch_add(len, Relaxed);
        Ok(buf)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] past the end; otherwise the errors of the driver and the host.
    pub async fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> Result<()> {
        let request = self.begin().await?;
        let len = request::as_u64(data.len());
        request.check(offset, len)?;
        let flags =
            if self.0.write_through.load(Relaxed) { flags | WriteFlags::FUA } else { flags };
        self.write_root(request, offset, data, flags).await?;
        self.count_write(len);
        Ok(())
    }

    /// Stores at `offset` a cluster that [`Self::compress`] has compressed.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn write_compressed(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
        let request = self.begin().await?;
        let len = request::as_u64(cluster.plain.len());
        request.check(offset, len)?;
        let through = self.0.write_through.load(Relaxed);
        let flags = if through { WriteFlags::FUA } else { WriteFlags::empty() };
        let root = Arc::clone(&request.root);
        let work = async move { root.edge.write_compressed(offset, cluster, flags).await };
        request.run_to_completion(work).await?;
        self.count_write(len);
        Ok(())
    }

    async fn write_root(
        &self,
        request: Request<'_>,
        offset: u64,
        data: IoBuf,
        flags: WriteFlags,
    ) -> Result<()> {
        let root = Arc::clone(&request.root);
        root.edge.may_write()?;
        if !flags.is_empty() || data.is_empty() {
            let work = async move { root.edge.write(offset, data, flags).await };
            return request.run_to_completion(work).await;
        }
        match request::start_in_place(root.edge.node(), offset, data) {
            Ok(operation) => match operation.done(root.edge.node()).await {
                Ok(()) => {
                    request.done();
                    Ok(())
                }
                Err(rest) => {
                    let finish = async move {
                        request::finish_in_place(root.edge.node(), offset, rest).await
                    };
                    request.run_to_completion(finish).await
                }
            },
            Err(data) => {
                let work = async move { root.edge.write(offset, data, flags).await };
                request.run_to_completion(work).await
            }
        }
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let request = self.begin().await?;
        request.check(offset, len)?;
        let flags = if self.0.write_through.load(Relaxed) { flags | ZeroFlags::FUA } else { flags };
        let root = Arc::clone(&request.root);
        let work = async move { root.edge.write_zeroes(offset, len, flags).await };
        request.run_to_completion(work).await?;
        self.count_write(len);
        Ok(())
    }

    /// Discards a range: its contents no longer matter.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let request = self.begin().await?;
        request.check(offset, len)?;
        let root = Arc::clone(&request.root);
        request.run_to_completion(async move { root.edge.discard(offset, len).await }).await?;
        self.count_write(len);
        Ok(())
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn flush(&self) -> Result<()> {
        let request = self.begin().await?;
        let root = Arc::clone(&request.root);
        request.run_to_completion(async move { root.edge.flush().await }).await?;
        self.0.counters.mine().flush_ops.fetch_add(1, Relaxed);
        Ok(())
    }

    /// The status of the start of a range, through the complete backing chain.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn block_status(&self, offset: u64, len: u64, want: Want) -> Result<ChainStatus> {
        self.status_above(None, offset, len, want).await
    }

    /// The status of the start of a range from the root down to, but not including, `base`.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn status_above(
        &self,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Result<ChainStatus> {
        let request = self.begin().await?;
        request.check(offset, 0)?;
        let node = request.root.edge.node();
        let status = request::status_above(node, base, offset, len, want).await?;
        request.done();
        Ok(status)
    }

    /// Sets the size. Other requests wait until the resize has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without resize permission; otherwise the errors of the driver and the host.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let root = self.root()?;
        // A node that only passes requests on resizes the node below it.
        let (mut lowest, mut above) = (Arc::clone(root.node()), Vec::new());
        while lowest.factory().passes_permissions()
            && let Some(below) = lowest.child(ChildIdx::FILE)
        {
            above.push(std::mem::replace(&mut lowest, below));
        }
        let resize = move |_| async move { root.resize(size, preallocation).await };
        self.0.graph.run_exclusive_below(above, &lowest, resize).await
    }

    /// Flushes, detaches from the root node, and closes the nodes that have no other user. Once begun, the close runs
    /// to its end even if its future is dropped.
    ///
    /// # Errors
    /// The first failure of flush or close. All nodes are closed even then.
    pub async fn close(&self) -> Result<()> {
        let Ok(edge) = self.root() else { return Ok(()) };
        let control = edge.node().control_lock().acquire().await;
        let drained = self.quiesce().await;
        if self.root().is_err() {
            // Another call has closed the backend while this one waited.
            return Ok(());
        }
        let backend = self.clone();
        run_to_completion(async move {
            let flushed = if edge.node().is_read_only() { Ok(()) } else { edge.flush().await };
            backend.set_root(None);
            edge.detach();
            let node = Arc::clone(edge.node());
            drop(edge);
            let closed = backend.0.graph.release(node).await;
            backend.0.graph.unregister_backend(&backend);
            drop(drained);
            drop(control);
            flushed.and(closed)
        })
        .await
    }

    /// Reopens the root node with other options; options that are not mentioned stay unchanged. The backend's own
    /// permissions follow: it releases write and resize permission on a node that becomes read-only, and takes them on
    /// one that becomes writable.
    ///
    /// # Errors
    /// The errors of [`Graph::reopen`]. Nothing has changed then.
    pub async fn reopen(&self, options: Options) -> Result<()> {
        self.0.graph.reopen_root(self, options).await
    }

    /// Holds back new requests and waits until the requests in flight have ended. New requests resume when the guard is
    /// dropped.
    pub async fn quiesce(&self) -> Quiesced {
        let guard = self.hold_back();
        self.idle().await;
        guard
    }

    /// Holds back new requests.
    pub(crate) fn hold_back(&self) -> Quiesced {
        self.0.quiesced.fetch_add(1, SeqCst);
        oxblk_ring::perturb::point();
        Quiesced(self.clone())
    }

    /// Waits until no request is in flight.
    pub(crate) async fn idle(&self) {
        loop {
            let listener = self.0.changed.listen();
            if self.0.counters.iter().all(|one| one.in_flight.load(SeqCst) == 0) {
                return;
            }
            listener.await;
        }
    }

    fn count_write(&self, len: u64) {
        let counters = self.0.counters.mine();
        counters.write_ops.fetch_add(1, Relaxed);
        counters.write_bytes.fetch_add(len, Relaxed);
    }

    /// Begins a request: waits while requests are held back, counts the request, and enters it into the current epoch.
    async fn begin(&self) -> Result<Request<'_>> {
        loop {
            // This check comes before the request is counted. Otherwise waiting requests would count and uncount
            // themselves, and each time wake the others.
            self.not_quiesced().await;
            if let Some(request) = self.try_begin()? {
                return Ok(request);
            }
        }
    }

    /// Waits until requests are no longer held back.
    async fn not_quiesced(&self) {
        while self.0.quiesced.load(SeqCst) != 0 {
            let listener = self.0.changed.listen();
            if self.0.quiesced.load(SeqCst) != 0 {
                listener.await;
            }
        }
    }

    /// Begins a request, unless requests are held back.
    fn try_begin(&self) -> Result<Option<Request<'_>>> {
        let count = InFlight::enter(self);
        oxblk_ring::perturb::point();
        if self.0.quiesced.load(SeqCst) != 0 {
            return Ok(None);
        }
        let root = self.0.roots.mine().load_full().ok_or_else(no_medium)?;
        let epoch = self.0.graph.epochs().enter();
        Ok(Some(Request { root, guards: Some((epoch, count)), backend: self }))
    }
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

/// Holds back the requests of a backend until it is dropped.
#[derive(Debug)]
pub struct Quiesced(Backend);

impl Quiesced {
    pub(crate) fn backend(&self) -> &Backend {
        &self.0
    }
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        self.0.0.quiesced.fetch_sub(1, SeqCst);
        self.0.0.changed.notify(usize::MAX);
    }
}

struct InFlight<'a> {
    shard: Shard,
    backend: &'a Inner,
}

impl<'a> InFlight<'a> {
    fn enter(backend: &'a Backend) -> Self {
        let shard = Shard::mine();
        backend.0.counters.at(shard).in_flight.fetch_add(1, SeqCst);
        Self { shard, backend: &backend.0 }
    }

    /// Ends the guard but leaves the request counted.
    fn detach(self) -> Shard {
        let shard = self.shard;
        std::mem::forget(self);
        shard
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.backend.counters.at(self.shard).in_flight.fetch_sub(1, SeqCst);
        if self.backend.quiesced.load(SeqCst) != 0 {
            self.backend.changed.notify(usize::MAX);
        }
    }
}

/// A request in progress. If it is dropped before [`Request::done`], because its future was dropped or because it
/// failed, the host may still carry out some of its operations. The request stays counted until these have ended, so
/// that nobody reuses the clusters and buffers that they access.
struct Request<'a> {
    root: Arc<RootEdge>,
    guards: Option<(EpochGuard<'a>, InFlight<'a>)>,
    backend: &'a Backend,
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.leave_behind() {
            keep_until_settled(place);
        }
    }
}

/// The counts that a request holds (in flight, epoch), separate from its future.
struct Place {
    backend: Backend,
    epoch: EpochPlace,
    shard: Shard,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.backend.0.graph.epochs().leave(self.epoch);
        drop(InFlight { shard: self.shard, backend: &self.backend.0 });
    }
}

impl Request<'_> {
    /// Moves the request's place in the counts to the caller.
    fn leave_behind(&mut self) -> Option<Place> {
        let (epoch, count) = self.guards.take()?;
        let (epoch, shard) = (epoch.detach(), count.detach());
        Some(Place { backend: self.backend.clone(), epoch, shard })
    }

    /// Runs the work of the request. Once begun, the work runs to its end even if the caller's future is dropped.
    async fn run_to_completion<T: 'static>(
        mut self,
        work: impl Future<Output = Result<T>> + 'static,
    ) -> Result<T> {
        let place = UntilSettled::new(self.leave_behind());
        run_to_completion(async move {
            let outcome = work.await;
            if outcome.is_ok() {
                // After success, the request has no operation in flight.
                drop(place.release());
            }
            outcome
        })
        .await
    }

    /// Ends a request that has succeeded: it has no operation in flight.
    fn done(mut self) {
        self.guards = None;
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.root.edge.size() => Ok(()),
            _ => {
                Err(Error::new(ErrorKind::OutOfRange, "Request lies outside the device").at(offset))
            }
        }
    }
}
