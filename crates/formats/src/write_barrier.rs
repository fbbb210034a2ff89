//! Holds back a write of metadata until one that was cancelled has come to its end on the host.
//!
//! Reads may have to write metadata back to make room for more, and a read may be dropped at any time. What it had
//! begun to write is dirty again then, and the next write of it goes to the same place: were both under way at once, the
//! older might come last.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use oxblk_ring::Event;

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicUsize,
    settled: Event,
}

/// Whether writes that were cancelled may still be under way.
#[derive(Debug, Default)]
pub(crate) struct WriteBarrier(Arc<State>);

impl WriteBarrier {
    /// Waits until none are, and begins to write. The caller holds the lock that keeps others from beginning.
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

/// A write under way. Dropped before it is done, it closes the barrier until the host is done.
pub(crate) struct Writing<'a> {
    barrier: &'a WriteBarrier,
    done: bool,
}

impl Writing<'_> {
    /// Nothing is under way any more, whether it succeeded or failed.
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

/// A write that was cancelled and may still be under way; kept until the host is done.
struct Cancelled(Arc<State>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.0.cancelled.fetch_sub(1, SeqCst);
        self.0.settled.notify(usize::MAX);
    }
}
