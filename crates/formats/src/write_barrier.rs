//! Delays a metadata write until the host has completed earlier writes that were cancelled.
//!
//! A read may have to write back metadata to free space in a cache, and the future of a read may be dropped at any
//! time. The metadata is then dirty again, and is later written to the same offset again. If the cancelled write were
//! still in flight, it could reach the file after the later write, and the file would contain old metadata.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use oxblk_ring::Event;

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicUsize,
    settled: Event,
}

/// Counts the cancelled writes that may still be in flight.
#[derive(Debug, Default)]
pub(crate) struct WriteBarrier(Arc<State>);

impl WriteBarrier {
    /// Waits until no cancelled write is in flight, and begins a write. The caller holds the lock that serialises these
    /// writes.
    pub(crate) async fn pass(&self) -> Writing<'_> {
        while self.0.cancelled.load(SeqCst) > 0 {
            let listener = self.0.settled.listen();
            if self.0.cancelled.load(SeqCst) > 0 {
                listener.await;
            }
        }
        Writing { barrier: self, done: false }
    }
}

/// A write in progress. If this value is dropped before [`Writing::done`], the next write waits until the host has
/// completed the operations of this write.
pub(crate) struct Writing<'a> {
    barrier: &'a WriteBarrier,
    done: bool,
}

impl Writing<'_> {
    /// Ends the write, after success or failure: none of its operations is in flight.
    pub(crate) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.barrier.0.cancelled.fetch_add(1, SeqCst);
            oxblk_ring::keep_until_settled(Cancelled(Arc::clone(&self.barrier.0)));
        }
    }
}

/// A cancelled write that may still be in flight. The runtime drops this value when the host has completed the write.
struct Cancelled(Arc<State>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.0.cancelled.fetch_sub(1, SeqCst);
        self.0.settled.notify(usize::MAX);
    }
}
