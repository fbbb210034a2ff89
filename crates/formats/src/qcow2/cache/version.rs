//! The sequence lock of a slot.
//!
//! A [`Version`] counts, in its low bits, the threads that are changing what belongs together: the owner of the words,
//! or several words of one entry. Above them it counts how often that has happened. Readers compare it before and
//! after, and what they saw counts only if nobody was changing anything meanwhile (all words are atomics, so a torn read
//! is a wrong answer at worst, and discarded). Single words that mean something by themselves change without it.

use oxblk_ring::perturb::point;

use super::atomics::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};

/// One thread that is changing something.
const CHANGING: u64 = 1;
/// The number of threads that are.
const ANY_CHANGING: u64 = 0xffff;
/// Something was changed.
const CHANGED: u64 = ANY_CHANGING + 1;

pub(super) struct Version(AtomicU64);

impl Version {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// For a reader, before it reads; `None` while something is being changed.
    pub(super) fn before(&self) -> Option<u64> {
        let before = self.0.load(Acquire);
        point();
        (before & ANY_CHANGING == 0).then_some(before)
    }

    /// For a reader, after it has read: whether nothing was changed since [`Self::before`].
    pub(super) fn is_still(&self, before: u64) -> bool {
        point();
        fence(Acquire);
        self.0.load(Relaxed) == before
    }

    /// From here until the guard is dropped, readers discard what they see. Several threads may change different words
    /// at once; nobody waits while changing.
    pub(super) fn begin_change(&self) -> Changing<'_> {
        self.0.fetch_add(CHANGING, Relaxed);
        fence(Release);
        point();
        Changing(self)
    }
}

/// Words are being changed.
pub(in super::super) struct Changing<'a>(&'a Version);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        point();
        self.0.0.fetch_add(CHANGED - CHANGING, Release);
    }
}
