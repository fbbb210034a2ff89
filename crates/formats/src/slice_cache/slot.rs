//! One slot of the cache: the words of a slice, the number of that slice, and the slot's state.
//!
//! [`State`] counts pins and has the dirty and claimed bits. With [`Version`], a reader detects that words changed during
//! its read.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed},
};

use oxblk_ring::Words;
use oxblk_ring::perturb::point;

use super::state::State;
use super::version::{Changing, Version};

const NO_KEY: u64 = u64::MAX;
/// Bit of `used`: the slot was used since CLOCK last passed it.
const USED_FOR_CLOCK: u8 = 1;
/// Bit of `used`: the slot was used since unused slices were last dropped.
const USED_IN_INTERVAL: u8 = 2;
const USED: u8 = USED_FOR_CLOCK | USED_IN_INTERVAL;
/// Each time that a copy of a slice has failed this many times, the thread yields to other threads.
const TRIES_BEFORE_YIELD: u32 = 64;

pub(super) struct Slot {
    version: Version,
    key: AtomicU64,
    state: State,
    used: AtomicU8,
    /// The words occupy memory of the host: they were written since their memory was last released.
    filled: AtomicBool,
    words: Words,
}

impl Slot {
    pub(super) fn new(words: Words) -> Self {
        Self {
            version: Version::new(),
            key: AtomicU64::new(NO_KEY),
            state: State::new(),
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

    /// Calls `look` on the words if the slot contains `slice`. Returns the result only if the words did not change during the
    /// call.
    pub(super) fn peek<R>(&self, slice: u64, look: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let before = self.version.before()?;
        if self.key.load(Relaxed) != slice {
            return None;
        }
        let seen = look(&self.words);
        if !self.version.is_still(before) {
            return None;
        }
        if self.used.load(Relaxed) != USED {
            self.used.store(USED, Relaxed);
        }
        Some(seen)
    }

    /// Pins the slot if it contains `slice`.
    pub(super) fn pin(&self, slice: u64) -> bool {
        if !self.state.pin() {
            return false;
        }
        point();
        // The key cannot change while the slot is pinned.
        if self.key.load(Acquire) != slice {
            self.unpin();
            return false;
        }
        self.used.store(USED, Relaxed);
        true
    }

    pub(super) fn unpin(&self) {
        self.state.unpin();
    }

    /// Whether the slot was used since CLOCK last passed it. Clears the bit that records this.
    pub(super) fn take_second_chance(&self) -> bool {
        self.take_used(USED_FOR_CLOCK)
    }

    /// Whether the slot was used since the last call of this function. Clears the bit that records this.
    pub(super) fn was_used_in_interval(&self) -> bool {
        self.take_used(USED_IN_INTERVAL)
    }

    fn take_used(&self, bit: u8) -> bool {
        self.used.load(Relaxed) & bit != 0 && self.used.fetch_and(!bit, Relaxed) & bit != 0
    }

    /// Whether the words occupy memory of the host.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Relaxed)
    }

    /// Records that the memory of the words was released.
    pub(super) fn set_released(&self) {
        self.filled.store(false, Relaxed);
    }

    /// Claims a slot that is clean and not pinned.
    pub(super) fn claim(&self) -> bool {
        self.state.claim()
    }

    /// Fills a claimed slot with `slice`, ends the claim, and pins the slot once.
    pub(super) fn refill(&self, slice: u64, bytes: &[u8]) {
        let changing = self.version.begin_change();
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
        self.state.unclaim_pinned();
    }

    /// Removes the slice from a claimed slot. Readers discard the words of the slot until the guard is dropped.
    pub(super) fn forget(&self) -> Changing<'_> {
        let changing = self.version.begin_change();
        self.key.store(NO_KEY, Relaxed);
        changing
    }

    /// Ends the claim on a slot.
    pub(super) fn unclaim(&self) {
        self.state.unclaim();
    }

    /// The slot's state: pins, dirty and claimed.
    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// If the slot is dirty, clears the dirty bit, pins the slot and copies the words, in that order. So a change during the
    /// copy makes the slot dirty again.
    pub(super) fn copy_dirty(&self) -> Option<(u64, Vec<u8>)> {
        if !self.state.take_dirty() {
            return None;
        }
        point();
        let mut bytes = Vec::with_capacity(self.words.len().saturating_mul(8));
        let mut tries = 0_u32;
        loop {
            if let Some(before) = self.version.before() {
                bytes.clear();
                for word in self.words.iter() {
                    bytes.extend_from_slice(&word.load(Acquire).to_be_bytes());
                }
                if self.version.is_still(before) {
                    return Some((self.key.load(Relaxed), bytes));
                }
            }
            tries = tries.saturating_add(1);
            if tries.is_multiple_of(TRIES_BEFORE_YIELD) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    /// See [`Version::begin_change`].
    pub(super) fn begin_change(&self) -> Changing<'_> {
        self.version.begin_change()
    }
}
