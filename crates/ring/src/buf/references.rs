//! The reference count of a block of memory.
//!
//! When one reference is left, two facts must hold across threads. First, the owner of this reference has exclusive
//! use of the bytes: all accesses through dropped references happened before. Second, no other thread can increase
//! the count, so the last owner may free the block without decreasing the count.

use super::atomics::{AtomicUsize, Ordering, fence};

/// A count of references.
pub(super) struct References(AtomicUsize);

impl References {
    /// One reference.
    pub(super) fn one() -> Self {
        References(AtomicUsize::new(1))
    }

    /// Sets the count to one. The caller has the only reference.
    pub(super) fn restart(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Adds one reference. The caller already has a reference. The increment needs no memory ordering, because
    /// passing the new reference to another thread synchronises the threads.
    pub(super) fn add(&self) {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        if before > isize::MAX.unsigned_abs() {
            std::process::abort(); // references were leaked until the count nearly wrapped
        }
    }

    /// Whether the caller's reference is the only one. If so, all accesses through dropped references happened
    /// before.
    pub(super) fn is_one(&self) -> bool {
        self.0.load(Ordering::Acquire) == 1
    }

    /// Drops one reference. Returns true if it was the last reference; all accesses through the others then happened
    /// before.
    pub(super) fn release(&self) -> bool {
        // If this is the only reference, no atomic read-modify-write is necessary.
        if self.is_one() {
            return true;
        }
        crate::perturb::point();
        if self.0.fetch_sub(1, Ordering::Release) != 1 {
            return false;
        }
        fence(Ordering::Acquire);
        true
    }
}
