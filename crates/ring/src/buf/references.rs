//! The count of references to a block of memory.
//!
//! Two facts follow from one reference being left, and each must hold across threads. Its holder may have the bytes for
//! itself: all that others did to them through references which are gone happened before. And nobody else can make the
//! count grow, so that the last holder may free the block without counting down.

use super::atomics::{AtomicUsize, Ordering, fence};

/// A count of references.
pub(super) struct References(AtomicUsize);

impl References {
    /// One reference.
    pub(super) fn one() -> Self {
        References(AtomicUsize::new(1))
    }

    /// Begins with one again. The caller has the only reference.
    pub(super) fn restart(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Adds one to those that the caller has. It needs no order: what the new one is passed on by orders it.
    pub(super) fn add(&self) {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        if before > isize::MAX.unsigned_abs() {
            std::process::abort(); // references were leaked until the count nearly wrapped
        }
    }

    /// Whether the caller's reference is the only one. Acquires what was done through those that are gone.
    pub(super) fn is_one(&self) -> bool {
        self.0.load(Ordering::Acquire) == 1
    }

    /// Gives up one; true when it was the last, and all that was done through the others happened before.
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
