//! Whether there is something to flush: one flag that writers set and a flush takes.
//!
//! A writer calls [`Unflushed::mark`] after its write has completed. A flush calls [`Unflushed::take`] and, if the flag was
//! set, has the host make its data durable afterwards. A flush that finds the flag clear does nothing, so this must hold:
//! if a mark finds the flag set and leaves it, the flush that takes it later sees the write's data.
//!
//! The writer stores data and then loads the flag; the flush stores the flag and then has the data read. Without an order
//! between each store and the load after it, both could see the old value: the mark an old "set", the host old data. Acquire and
//! release do not order a store before a later load (on ARMv8 and RISC-V such a pair may change places), so both sides have
//! a sequentially consistent fence in between. If the mark's load comes before the take in the flag's order, then the
//! writer's fence comes before the flush's, and what the flush does after its fence sees the data. The writer that finds the
//! flag clear sets it with release, and the take acquires it: the data comes along.

use super::atomics::{AtomicBool, Ordering, fence};

/// Writes have completed that no flush has covered.
#[derive(Debug)]
pub(crate) struct Unflushed(AtomicBool);

impl Unflushed {
    /// Nothing to flush.
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Notes that a write has completed. Reads first, so that the line stays shared among threads.
    pub(crate) fn mark(&self) {
        fence(Ordering::SeqCst);
        oxblk_ring::perturb::point();
        if !self.0.load(Ordering::Relaxed) {
            oxblk_ring::perturb::point();
            self.0.store(true, Ordering::Release);
        }
    }

    /// Notes that a write is about to start. It is no more than a hint: only [`Self::mark`] after the write counts.
    pub(crate) fn expect(&self) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Release);
        }
    }

    /// Whether there is something to flush. The caller flushes it, or marks it again.
    pub(crate) fn take(&self) -> bool {
        let taken = self.0.swap(false, Ordering::AcqRel);
        oxblk_ring::perturb::point();
        fence(Ordering::SeqCst);
        taken
    }
}
