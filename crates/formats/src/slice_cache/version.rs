//! The sequence lock of a slot.
//!
//! The low bits of a [`Version`] count the threads that are changing several words that belong together: the key and the
//! words of a slot, or several words of one entry. The high bits count the completed changes. A reader compares the version
//! before and after its read. The reader discards the result if a change was running or completed between these two
//! moments. All words are atomics, so a torn read gives only a wrong result, and the reader discards this result. A change
//! of a single independent word does not use the version.

use oxblk_ring::perturb::point;

use super::atomics::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};

/// One running change.
const CHANGING: u64 = 1;
/// The bits that count the running changes.
const ANY_CHANGING: u64 = 0xffff;
/// One completed change.
const CHANGED: u64 = ANY_CHANGING + 1;

pub(super) struct Version(AtomicU64);

impl Version {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A reader calls this before it reads. Returns `None` while a change is running.
    pub(super) fn before(&self) -> Option<u64> {
        let before = self.0.load(Acquire);
        point();
        (before & ANY_CHANGING == 0).then_some(before)
    }

    /// A reader calls this after it has read. Returns whether no change has begun since [`Self::before`].
    pub(super) fn is_still(&self, before: u64) -> bool {
        point();
        fence(Acquire);
        self.0.load(Relaxed) == before
    }

    /// Begins a change. Until the guard is dropped, readers discard what they read. Several threads may change different words
    /// concurrently. The holder of the guard must not wait.
    pub(super) fn begin_change(&self) -> Changing<'_> {
        self.0.fetch_add(CHANGING, Relaxed);
        fence(Release);
        point();
        Changing(self)
    }
}

/// A running change.
pub(crate) struct Changing<'a>(&'a Version);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        point();
        self.0.0.fetch_add(CHANGED - CHANGING, Release);
    }
}
