//! Holds back a write of metadata until one that was given up has come to its end on the host.
//!
//! Reads may have to write metadata back to make room for more, and a read may be dropped at any time. What it had
//! begun to write is dirty again then, and the next write of it goes to the same place: were both under way at once, the
//! older might come last.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use oxblk_ring::Event;

#[derive(Debug, Default)]
struct State {
    given_up: AtomicUsize,
    settled: Event,
}

/// Whether writes that were given up may still be under way.
#[derive(Debug, Default)]
pub(super) struct Gate(Arc<State>);

impl Gate {
    /// Waits until none are, and begins to write. The caller holds the lock that keeps others from beginning.
    pub(super) async fn pass(&self) -> Writing<'_> {
        while self.0.given_up.load(SeqCst) > 0 {
            let listener = self.0.settled.listen();
            if self.0.given_up.load(SeqCst) > 0 {
                listener.await;
            }
        }
        Writing { gate: self, done: false }
    }
}

/// A write under way. Dropped before it is done, it closes the gate until the host is.
pub(super) struct Writing<'a> {
    gate: &'a Gate,
    done: bool,
}

impl Writing<'_> {
    /// Nothing is under way any more, whether it succeeded or failed.
    pub(super) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.gate.0.given_up.fetch_add(1, SeqCst);
            oxblk_ring::keep_until_settled(GivenUp(Arc::clone(&self.gate.0)));
        }
    }
}

/// A write that was given up and may still be under way; kept until the host is done.
struct GivenUp(Arc<State>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.given_up.fetch_sub(1, SeqCst);
        self.0.settled.notify(usize::MAX);
    }
}
