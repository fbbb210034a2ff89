//! Requests in flight at a backend: beginning a request, counting it, and holding requests back.
//!
//! A request is counted on its I/O thread, and in the epoch in which the request begins, until all host operations of
//! the request have ended. A request first raises the count and then checks whether requests are held back. A drain
//! first holds requests back and then waits until the counts are zero. So a drain misses no request.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use oxblk_ring::{Shard, UntilSettled, keep_until_settled};

use super::root::RootEdge;
use super::{Backend, Inner, no_medium};
use crate::control::run_to_completion;
use crate::epoch::Epochs;
use crate::{Drained, Error, ErrorKind, Result, WriteFlags};

impl Backend {
    /// Holds back new requests and waits until the requests in flight have ended. New requests resume when the guard is
    /// dropped.
    pub async fn quiesce(&self) -> Drained {
        self.0.graph.drain_backend(self).await
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
            if self.0.in_flight.iter().all(|one| one.load(SeqCst) == 0) {
                return;
            }
            listener.await;
        }
    }

    /// Begins a request: waits while requests are held back, counts the request, and enters the request into the
    /// current epoch. Reads and writes call [`Self::try_begin`] first, since most requests need not wait.
    pub(super) async fn begin(&self) -> Result<Request<'_>> {
        loop {
            // Wait before the request is counted. Otherwise every waiting request would repeatedly raise and lower the
            // count, and would wake all other waiting requests each time.
            self.not_quiesced().await;
            if let Some(request) = self.try_begin()? {
                return Ok(request);
            }
        }
    }

    /// Waits until requests are no longer held back.
    pub(super) async fn not_quiesced(&self) {
        while self.0.quiesced.load(SeqCst) != 0 {
            let listener = self.0.changed.listen();
            if self.0.quiesced.load(SeqCst) != 0 {
                listener.await;
            }
        }
    }

    /// Begins a request without waiting. Returns `None` if requests are held back, and `ENOMEDIUM` if the backend is
    /// closed.
    #[inline]
    pub(super) fn try_begin(&self) -> Result<Option<Request<'_>>> {
        if self.0.quiesced.load(SeqCst) != 0 {
            // See `begin`.
            return Ok(None);
        }
        let shard = Shard::current();
        let count = InFlight::enter(self, shard);
        oxblk_ring::perturb::point();
        if self.0.quiesced.load(SeqCst) != 0 {
            return Ok(None);
        }
        let root = self.0.roots.at(shard).load_full().ok_or_else(no_medium)?;
        let epochs = root.enter(shard);
        Ok(Some(Request {
            root,
            guards: Some((epochs, count)),
            backend: self,
            changes_nothing: false,
        }))
    }
}

/// The epochs that a request has entered, in the order of [`BelowRoot::epochs`](super::root::BelowRoot).
enum Entered {
    None,
    One(u64),
    /// For example, an overlay and its backing file were opened separately.
    Two([u64; 2]),
    Many(Vec<u64>),
}

impl RootEdge {
    /// Enters the current epochs. `shard` is the shard of the calling thread.
    #[inline]
    fn enter(&self, shard: Shard) -> Entered {
        match &*self.below.epochs {
            [] => Entered::None,
            [epochs] => Entered::One(epochs.enter_at(shard)),
            [one, two] => Entered::Two([one.enter_at(shard), two.enter_at(shard)]),
            many => Entered::Many(many.iter().map(|epochs| epochs.enter_at(shard)).collect()),
        }
    }

    /// Leaves the epochs that a request has entered on this shard.
    #[inline]
    fn leave(&self, shard: Shard, entered: &Entered) {
        match (&*self.below.epochs, entered) {
            ([epochs, ..], Entered::One(epoch)) => epochs.leave(shard, *epoch),
            (all, Entered::Two(entered)) => leave_all(all, shard, entered),
            (all, Entered::Many(entered)) => leave_all(all, shard, entered),
            _ => {}
        }
    }
}

fn leave_all(all: &[Arc<Epochs>], shard: Shard, entered: &[u64]) {
    for (epochs, epoch) in all.iter().zip(entered) {
        epochs.leave(shard, *epoch);
    }
}

/// A guard that holds back the requests of a backend until the guard is dropped.
#[derive(Debug)]
pub(crate) struct Quiesced(Backend);

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

/// The in-flight count of one request. Dropping this value lowers the count.
pub(super) struct InFlight<'a> {
    shard: Shard,
    backend: &'a Inner,
}

impl<'a> InFlight<'a> {
    fn enter(backend: &'a Backend, shard: Shard) -> Self {
        backend.0.in_flight.at(shard).fetch_add(1, SeqCst);
        Self { shard, backend: &backend.0 }
    }

    /// Consumes this value without lowering the count.
    fn detach(self) -> Shard {
        let shard = self.shard;
        std::mem::forget(self);
        shard
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.backend.in_flight.at(self.shard).fetch_sub(1, SeqCst);
        if self.backend.quiesced.load(SeqCst) != 0 {
            self.backend.changed.notify(usize::MAX);
        }
    }
}

/// A request in progress. If the request fails after it has started a host operation, or if its future is dropped, this
/// value is dropped without [`Request::done`]. The host may then still carry out operations of the request. The request
/// stays counted until these operations have ended, so that the clusters and buffers that the operations access are not
/// reused.
pub(super) struct Request<'a> {
    pub(super) root: Arc<RootEdge>,
    guards: Option<(Entered, InFlight<'a>)>,
    backend: &'a Backend,
    /// Set by [`Request::only_reads`].
    changes_nothing: bool,
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.detach_counts() {
            keep_until_settled(place);
        }
    }
}

/// The counts of a request (in flight, epoch), kept apart from the request's future. Dropping this value lowers both
/// counts.
pub(super) struct RequestCounts {
    backend: Backend,
    root: Arc<RootEdge>,
    epochs: Entered,
    shard: Shard,
    /// Cleared by [`RequestCounts::done`]. If this value is dropped earlier, the root node is marked as unflushed, because the
    /// host may have written data after the last flush.
    is_unfinished: bool,
}

impl RequestCounts {
    /// Lowers the counts of a request that has succeeded. Such a request has already marked its nodes as unflushed.
    pub(super) fn done(mut self) {
        self.is_unfinished = false;
    }
}

impl Drop for RequestCounts {
    fn drop(&mut self) {
        let node = self.root.edge.node();
        if self.is_unfinished && !node.is_read_only() {
            node.mark_unflushed();
        }
        self.root.leave(self.shard, &self.epochs);
        drop(InFlight { shard: self.shard, backend: &self.backend.0 });
    }
}

impl Request<'_> {
    /// Takes the counts out of the request and returns them. `None` if this was done before.
    pub(super) fn detach_counts(&mut self) -> Option<RequestCounts> {
        let (epochs, count) = self.guards.take()?;
        let (backend, root) = (self.backend.clone(), Arc::clone(&self.root));
        let (shard, is_unfinished) = (count.detach(), !self.changes_nothing);
        Some(RequestCounts { backend, root, epochs, shard, is_unfinished })
    }

    /// Records that the request writes nothing. If such a request fails, the node has no more data to flush than before.
    #[inline]
    pub(super) fn only_reads(mut self) -> Self {
        self.changes_nothing = !self.root.below.reads_write;
        self
    }

    /// Runs the work of the request. Once begun, the work runs to its end even if the caller's future is dropped.
    pub(super) async fn run_to_completion<T: 'static>(
        mut self,
        work: impl Future<Output = Result<T>> + 'static,
    ) -> Result<T> {
        let place = UntilSettled::new(self.detach_counts());
        run_to_completion(async move {
            let outcome = work.await;
            if outcome.is_ok() {
                // After success, no host operation of the request is in flight.
                if let Some(place) = place.release().flatten() {
                    place.done();
                }
            }
            outcome
        })
        .await
    }

    /// Ends a request that has no host operation in flight: the request has succeeded, or it has started no operation.
    /// So the counts are lowered immediately, without waiting for other operations of the thread.
    #[inline]
    pub(super) fn done(mut self) {
        if let Some((epochs, count)) = self.guards.take() {
            self.root.leave(count.shard, &epochs);
            drop(count);
        }
    }

    /// Returns the request if the range lies inside the disk. Otherwise, ends the request and returns `OutOfRange`.
    #[inline]
    pub(super) fn check(self, offset: u64, len: u64) -> Result<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= self.root.edge.size() => Ok(self),
            _ => {
                self.done();
                Err(Error::new(ErrorKind::OutOfRange, "Request lies outside the device").at(offset))
            }
        }
    }

    /// Returns the request if the backend may make such a write. Otherwise, ends the request and returns the error.
    #[inline]
    pub(super) fn check_write(self, flags: WriteFlags) -> Result<Self> {
        match self.root.edge.may_write_with(flags) {
            Ok(()) => Ok(self),
            Err(error) => {
                self.done();
                Err(error)
            }
        }
    }
}
