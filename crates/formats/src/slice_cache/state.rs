//! The state of a slot in one atomic word, and the list of dirty slots.
//!
//! A [`State`] counts pins in its low bits. It has a dirty bit and a claimed bit. A slot may be claimed only when the state is
//! 0, and pinned only when it is not claimed.
//!
//! Invariant: after [`DirtyList::mark`] returns, a thread that takes the list finds the slot in it, unless the slot was copied
//! after the caller's change. For this reason, the dirty bit is set and the slot is added to the list under the list's lock. A
//! thread that finds the bit set returns without waiting for the lock. If the slot is not in the list yet, the thread that set
//! the bit still holds the lock, so every thread that takes the list waits until the slot is in it.
//!
//! The first thread that changes a clean slot takes the lock. Later threads only check the bit, until a copy clears it.

use oxblk_ring::perturb::point;

use super::atomics::{
    AtomicU32, Mutex,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    lock,
};

const DIRTY: u32 = 1 << 31;
const CLAIMED: u32 = 1 << 30;

/// The state of a slot.
pub(super) struct State(AtomicU32);

impl State {
    pub(super) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Pins the slot unless it is claimed.
    pub(super) fn pin(&self) -> bool {
        let pinned = self.0.fetch_update(AcqRel, Acquire, |state| {
            (state & CLAIMED == 0).then_some(state.wrapping_add(1))
        });
        pinned.is_ok()
    }

    pub(super) fn unpin(&self) {
        self.0.fetch_sub(1, AcqRel);
    }

    /// Claims a slot that is clean and not pinned.
    pub(super) fn claim(&self) -> bool {
        self.0.compare_exchange(0, CLAIMED, AcqRel, Relaxed).is_ok()
    }

    /// Ends a claim: the slot can be pinned again.
    pub(super) fn unclaim(&self) {
        self.0.store(0, Release);
    }

    /// Ends a claim and pins the slot once.
    pub(super) fn unclaim_pinned(&self) {
        self.0.store(1, Release);
    }

    /// If the slot is dirty, clears the dirty bit and pins the slot. The caller then sees all changes that were made before a
    /// [`DirtyList::mark`] that found the bit set.
    pub(super) fn take_dirty(&self) -> bool {
        let taken = self.0.fetch_update(AcqRel, Acquire, |state| {
            (state & DIRTY != 0).then_some((state & !DIRTY).wrapping_add(1))
        });
        taken.is_ok()
    }
}

/// The numbers of the slots whose dirty bit was set since the list was last taken.
#[derive(Default)]
pub(super) struct DirtyList(Mutex<Vec<u32>>);

impl DirtyList {
    /// Marks a pinned slot dirty after a change of its words.
    pub(super) fn mark(&self, state: &State, number: u32) {
        // This is a read-modify-write, although it changes no bit: so the thread that clears the bit sees the caller's change.
        if state.0.fetch_or(0, AcqRel) & DIRTY != 0 {
            return;
        }
        point();
        let mut numbers = lock(&self.0);
        if state.0.fetch_or(DIRTY, AcqRel) & DIRTY == 0 {
            point();
            numbers.push(number);
        }
    }

    /// Holds the list, so that no other thread can add to it or take it.
    #[cfg(test)]
    pub(super) fn hold(&self) -> super::atomics::MutexGuard<'_, Vec<u32>> {
        lock(&self.0)
    }

    /// Takes the list. The list may contain a slot twice, or a slot that is already clean.
    pub(super) fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *lock(&self.0))
    }
}
