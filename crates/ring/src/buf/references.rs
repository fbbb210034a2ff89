//! The count of references to a block of memory.
//!
//! When one reference is left, two facts must hold across threads. First, its holder has exclusive use of the bytes:
//! everything that other threads did through dropped references happened before. Second, nobody else can increase the
//! count, so that the last holder may free the block without decreasing it.

use super::atomics::{AtomicUsize, Ordering, fence};

/// A count of references.
pub(super) struct References(AtomicUsize);

impl References {
    /// One reference.
    pub(super) fn one() -> Self {
        References(AtomicUsize::new(1))
    }

    /// Starts again at one. The caller has the only reference.
    pub(super) fn restart(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Adds one reference; the caller has one already. It needs no memory ordering: passing the new reference to
    /// another thread orders it.
    pub(super) fn add(&self) {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        if before > isize::MAX.unsigned_abs() {
            std::process::abort(); // references were leaked until the count nearly wrapped
        }
    }

    /// Whether the caller's reference is the only one. Acquires what was done through the dropped references.
    pub(super) fn is_one(&self) -> bool {
        self.0.load(Ordering::Acquire) == 1
    }

    /// Drops one reference. Returns true if it was the last; then everything done through the others happened before.
    pub(super) fn release(&self) -> bool {
        // A sole holder needs no read-modify-write.
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
