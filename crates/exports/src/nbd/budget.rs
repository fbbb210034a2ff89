//! The memory that all connections of a server may hold together.
//!
//! Every connection has an [`Account`](super::account::Account) with an allowance of its own; it takes the memory that it
//! needs beyond the allowance from this budget. When nothing is left, one connection at a time may overdraw the budget by
//! the size of one largest request. This prevents a deadlock: a write takes its memory step by step while it arrives, so
//! all connections could hold a part of a write and wait for one another for ever.

use oxblk_ring::{Event, EventListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// A connection has overdrawn the budget.
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

    /// Takes `bytes` if they are available.
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

    /// Allows the caller to hold more than is available. Until [`Budget::repay`], no other connection may do so.
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

    /// Records that the caller waits, until the guard is dropped.
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
    /// Completes when memory is returned after this call.
    pub(super) fn listen(&self) -> EventListener {
        self.0.freed.listen()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
