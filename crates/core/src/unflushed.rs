//! A flag that shows whether a node has unflushed writes. Writers set the flag, and a flush clears it.
//!
//! A writer calls [`Unflushed::mark`] after its write has completed. A flush calls [`Unflushed::take`]. If the flag was
//! set, the flush then makes the host write the data to stable storage; if the flag was clear, the flush does nothing.
//! So this invariant holds: if [`Unflushed::mark`] finds the flag set and leaves it set, the flush that takes the flag
//! later sees the write's data.
//!
//! The writer stores data and then loads the flag. The flush stores the flag and then reads the data. Without an order
//! between each store and the load after it, both could see the old value: the writer sees an old "set" flag, and the
//! flush sees old data. Acquire and release do not order a store before a later load (ARMv8 and RISC-V may reorder such
//! a pair). Therefore both have a sequentially consistent fence between the store and the load. If the writer's
//! load comes before the flush's store in the flag's modification order, the writer's fence comes before the flush's
//! fence, and every access of the flush after its fence sees the data. A writer that finds the flag clear sets it with
//! release ordering, and the flush loads the flag with acquire ordering. So the flush sees the data in this case too.

use super::atomics::{AtomicBool, Ordering, fence};

/// The flag. After a write has completed, the flag is set until a flush covers the write.
#[derive(Debug)]
pub(crate) struct Unflushed(AtomicBool);

impl Unflushed {
    /// A node without unflushed writes.
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Records that a write has completed. This function reads the flag first and writes it only if necessary, so that
    /// the cache line stays shared among threads.
    pub(crate) fn mark(&self) {
        fence(Ordering::SeqCst);
        oxblk_ring::perturb::point();
        if !self.0.load(Ordering::Relaxed) {
            oxblk_ring::perturb::point();
            self.0.store(true, Ordering::Release);
        }
    }

    /// Records that a write is about to start. This record is only a hint: correctness depends on [`Self::mark`] after
    /// the write.
    pub(crate) fn expect(&self) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Release);
        }
    }

    /// Clears the flag and returns whether it was set. If the flag was set, the caller must flush the data or set the
    /// flag again.
    pub(crate) fn take(&self) -> bool {
        let taken = self.0.swap(false, Ordering::AcqRel);
        oxblk_ring::perturb::point();
        fence(Ordering::SeqCst);
        taken
    }
}
