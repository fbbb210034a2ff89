//! One slot of the cache: a slice's words, whose they are, and who relies on them.
//!
//! `state` counts pins in its low bits and has a bit for dirty and one for claimed. A slot may be claimed only when
//! `state` is 0, and pinned only when not claimed.
//!
//! `version` counts, in its low bits, those who are changing what belongs together: the owner of the words, or several
//! words of one entry. Above them it counts how often that has happened. Readers compare it before and after, and what
//! they saw counts only if nobody was changing anything meanwhile (all words are atomics, so a torn read is a wrong
//! answer at worst, and discarded). Single words that mean something by themselves change without it.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    fence,
};

use oxblk_ring::Words;

const DIRTY: u32 = 1 << 31;
const CLAIMED: u32 = 1 << 30;
const NO_KEY: u64 = u64::MAX;
/// In `version`: one who is changing something.
const CHANGING: u64 = 1;
/// In `version`: those who are.
const ANY_CHANGING: u64 = 0xffff;
/// In `version`: something was changed.
const CHANGED: u64 = ANY_CHANGING + 1;
/// In `used`: since CLOCK has last come by.
const USED_FOR_CLOCK: u8 = 1;
/// In `used`: since unused slices were last dropped.
const USED_IN_INTERVAL: u8 = 2;
const USED: u8 = USED_FOR_CLOCK | USED_IN_INTERVAL;
/// Tries to copy a slice between changes before other threads are let come first.
const PATIENCE: u32 = 64;

pub(super) struct Slot {
    version: AtomicU64,
    key: AtomicU64,
    state: AtomicU32,
    used: AtomicU8,
    /// The words take up memory of the host.
    filled: AtomicBool,
    words: Words,
}

impl Slot {
    pub(super) fn new(words: Words) -> Self {
        Self {
            version: AtomicU64::new(0),
            key: AtomicU64::new(NO_KEY),
            state: AtomicU32::new(0),
            used: AtomicU8::new(0),
            filled: AtomicBool::new(false),
            words,
        }
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    pub(super) fn key(&self) -> Option<u64> {
        Some(self.key.load(Relaxed)).filter(|key| *key != NO_KEY)
    }

    /// Lets `look` see the words if they are those of `slice` from beginning to end.
    pub(super) fn peek<R>(&self, slice: u64, look: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let before = self.version.load(Acquire);
        if before & ANY_CHANGING != 0 || self.key.load(Relaxed) != slice {
            return None;
        }
        let seen = look(&self.words);
        fence(Acquire);
        if self.version.load(Relaxed) != before {
            return None;
        }
        if self.used.load(Relaxed) != USED {
            self.used.store(USED, Relaxed);
        }
        Some(seen)
    }

    /// Pins the slot if it holds `slice`.
    pub(super) fn pin(&self, slice: u64) -> bool {
        let pinned = self.state.fetch_update(AcqRel, Acquire, |state| {
            (state & CLAIMED == 0).then_some(state.wrapping_add(1))
        });
        if pinned.is_err() {
            return false;
        }
        // While pinned the key cannot change.
        if self.key.load(Acquire) != slice {
            self.unpin();
            return false;
        }
        self.used.store(USED, Relaxed);
        true
    }

    pub(super) fn unpin(&self) {
        self.state.fetch_sub(1, AcqRel);
    }

    /// Whether it was used since CLOCK last asked.
    pub(super) fn take_second_chance(&self) -> bool {
        self.take_used(USED_FOR_CLOCK)
    }

    /// Whether it was used since the last time asked.
    pub(super) fn was_used_in_interval(&self) -> bool {
        self.take_used(USED_IN_INTERVAL)
    }

    fn take_used(&self, bit: u8) -> bool {
        self.used.load(Relaxed) & bit != 0 && self.used.fetch_and(!bit, Relaxed) & bit != 0
    }

    /// Whether the words take up memory of the host.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Relaxed)
    }

    /// The memory of the words was given back.
    pub(super) fn set_released(&self) {
        self.filled.store(false, Relaxed);
    }

    /// Claims a slot that is clean and not pinned.
    pub(super) fn claim(&self) -> bool {
        self.state.compare_exchange(0, CLAIMED, AcqRel, Relaxed).is_ok()
    }

    /// Gives a claimed slot to `slice`, pinned once.
    pub(super) fn refill(&self, slice: u64, bytes: &[u8]) {
        let changing = self.begin_change();
        self.key.store(slice, Relaxed);
        let mut rest = bytes;
        self.filled.store(true, Relaxed);
        for word in self.words.iter() {
            let value = match rest.split_first_chunk::<8>() {
                Some((head, tail)) => {
                    rest = tail;
                    u64::from_be_bytes(*head)
                }
                None => 0,
            };
            word.store(value, Relaxed);
        }
        drop(changing);
        self.used.store(USED, Relaxed);
        self.state.store(1, Release);
    }

    /// Takes a claimed slot from its slice. What its words are is nobody's business until the guard is dropped.
    pub(super) fn forget(&self) -> Changing<'_> {
        let changing = self.begin_change();
        self.key.store(NO_KEY, Relaxed);
        changing
    }

    /// Leaves a claimed slot to nobody.
    pub(super) fn unclaim(&self) {
        self.state.store(0, Release);
    }

    /// Sets the dirty bit; true if it was clear.
    pub(super) fn set_dirty(&self) -> bool {
        self.state.fetch_or(DIRTY, AcqRel) & DIRTY == 0
    }

    /// If dirty: clears the bit, pins, and copies the words (in that order, so that a change during the copy makes it
    /// dirty again).
    pub(super) fn copy_dirty(&self) -> Option<(u64, Vec<u8>)> {
        let taken = self.state.fetch_update(AcqRel, Acquire, |state| {
            (state & DIRTY != 0).then_some((state & !DIRTY).wrapping_add(1))
        });
        taken.ok()?;
        let mut bytes = Vec::with_capacity(self.words.len().saturating_mul(8));
        let mut tries = 0_u32;
        loop {
            let before = self.version.load(Acquire);
            bytes.clear();
            for word in self.words.iter() {
                bytes.extend_from_slice(&word.load(Acquire).to_be_bytes());
            }
            fence(Acquire);
            if before & ANY_CHANGING == 0 && self.version.load(Relaxed) == before {
                return Some((self.key.load(Relaxed), bytes));
            }
            tries = tries.saturating_add(1);
            if tries.is_multiple_of(PATIENCE) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    /// From here until the guard is dropped, readers take what they see for nothing. Several may change different words
    /// at once; nobody waits while changing.
    pub(super) fn begin_change(&self) -> Changing<'_> {
        self.version.fetch_add(CHANGING, Relaxed);
        fence(Release);
        Changing(self)
    }
}

/// Words are being changed.
pub(in super::super) struct Changing<'a>(&'a Slot);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.version.fetch_add(CHANGED - CHANGING, Release);
    }
}
