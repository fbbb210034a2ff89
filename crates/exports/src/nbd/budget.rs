//! The memory that all connections of a server may hold together.
//!
//! Every connection has an [`Account`](super::account::Account) with an allowance of its own; what it holds beyond that
//! it takes from here. When nothing is left, one connection at a time may overdraw the budget by one largest request:
//! a write takes its memory step by step while it arrives, so all connections could otherwise hold a part of a write
//! and wait for one another for ever.

use oxblk_ring::{Event, EventListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// A connection holds more than what was left.
    overdrawn: AtomicBool,
    /// How many connections wait.
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

    /// Takes `bytes` if they are free.
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

    /// Allows the caller, and nobody else until [`Budget::repay`], to hold more than is free.
    pub(super) fn overdraw(&self) -> bool {
        !self.overdrawn.swap(true, Ordering::SeqCst)
    }

    pub(super) fn repay(&self) {
        self.overdrawn.store(false, Ordering::SeqCst);
        self.freed.notify(usize::MAX);
    }

    /// Whether somebody waits.
    pub(super) fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Says that the caller waits, until the guard is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(self)
    }

    /// Wakes everybody who waits.
    pub(super) fn notify(&self) {
        self.freed.notify(usize::MAX);
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }
}

/// Somebody waits for memory.
pub(super) struct Waiting<'a>(&'a Budget);

impl Waiting<'_> {
    /// Ends when memory is given back after this call.
    pub(super) fn listen(&self) -> EventListener {
        self.0.freed.listen()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
