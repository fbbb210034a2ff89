//! The limit on the memory of all connections of a server together.
//!
//! Every connection has an [`Account`](super::account::Account) with its own allowance. Memory beyond the allowance is
//! taken from this budget. If the budget has nothing left, one connection at a time may overdraw the budget by a little
//! more than the size of the largest request. This prevents a deadlock: a write takes memory step by step while its
//! data arrives, so without an overdraft all connections could hold a part of a write and wait for each other forever.

use oxblk_ring::{Event, EventListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// Whether a connection has overdrawn the budget.
    overdrawn: AtomicBool,
    /// Number of connections that wait for memory.
    waiting: AtomicUsize,
    freed: Event,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget {
            limit,
            used: AtomicUsize::new(0),
            overdrawn: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            freed: Event::new(),
        })
    }

    /// Takes `bytes` bytes. Returns false if the budget has fewer bytes left.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let within = |used: usize| used.checked_add(bytes).filter(|after| *after <= self.limit);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, within).is_ok()
    }

    pub(super) fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            self.used.fetch_sub(bytes, Ordering::SeqCst);
            self.freed.notify(usize::MAX);
        }
    }

    /// Allows the caller to hold more memory than is available. Returns false if a connection already has this
    /// permission and has not called [`Budget::repay`].
    pub(super) fn overdraw(&self) -> bool {
        !self.overdrawn.swap(true, Ordering::SeqCst)
    }

    pub(super) fn repay(&self) {
        self.overdrawn.store(false, Ordering::SeqCst);
        self.freed.notify(usize::MAX);
    }

    /// Whether a connection waits for memory.
    pub(super) fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Records that the caller waits for memory. The record ends when the guard is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(self)
    }

    /// Wakes all waiting connections.
    pub(super) fn notify(&self) {
        self.freed.notify(usize::MAX);
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }
}

/// A connection that waits for memory.
pub(super) struct Waiting<'a>(&'a Budget);

impl Waiting<'_> {
    /// A future that completes when memory is released after this call.
    pub(super) fn listen(&self) -> EventListener {
        self.0.freed.listen()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
