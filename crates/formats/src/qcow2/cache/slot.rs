//! One slot of the cache: a slice's words, whose they are, and who relies on them.
//!
//! `state` counts pins in its low bits and has a bit for dirty and one for claimed. A slot may be claimed only when
//! `state` is 0, and pinned only when not claimed. `version` is odd while the words change owner; readers compare it
//! before and after (all words are atomics, so a torn read is a wrong answer at worst, and discarded).

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    fence,
};

const DIRTY: u32 = 1 << 31;
const CLAIMED: u32 = 1 << 30;
const NO_KEY: u64 = u64::MAX;

pub(super) struct Slot {
    version: AtomicU64,
    key: AtomicU64,
    state: AtomicU32,
    used: AtomicBool,
    words: Box<[AtomicU64]>,
}

impl Slot {
    pub(super) fn new(words: usize) -> Self {
        Self {
            version: AtomicU64::new(0),
            key: AtomicU64::new(NO_KEY),
            state: AtomicU32::new(0),
            used: AtomicBool::new(false),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
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
        if before & 1 == 1 || self.key.load(Relaxed) != slice {
            return None;
        }
        let seen = look(&self.words);
        fence(Acquire);
        if self.version.load(Relaxed) != before {
            return None;
        }
        if !self.used.load(Relaxed) {
            self.used.store(true, Relaxed);
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
        self.used.store(true, Relaxed);
        true
    }

    pub(super) fn unpin(&self) {
        self.state.fetch_sub(1, AcqRel);
    }

    /// Whether it was used since the last time asked.
    pub(super) fn take_second_chance(&self) -> bool {
        self.used.load(Relaxed) && self.used.swap(false, Relaxed)
    }

    /// Claims a slot that is clean and not pinned.
    pub(super) fn claim(&self) -> bool {
        self.state.compare_exchange(0, CLAIMED, AcqRel, Relaxed).is_ok()
    }

    /// Gives a claimed slot to `slice`, pinned once.
    pub(super) fn refill(&self, slice: u64, bytes: &[u8]) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.key.store(slice, Relaxed);
        let mut rest = bytes;
        for word in &self.words {
            let value = match rest.split_first_chunk::<8>() {
                Some((head, tail)) => {
                    rest = tail;
                    u64::from_be_bytes(*head)
                }
                None => 0,
            };
            word.store(value, Relaxed);
        }
        self.version.store(version.wrapping_add(2), Release);
        self.used.store(true, Relaxed);
        self.state.store(1, Release);
    }

    /// Leaves a claimed slot to nobody.
    pub(super) fn forget(&self) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.key.store(NO_KEY, Relaxed);
        self.version.store(version.wrapping_add(2), Release);
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
        for word in &self.words {
            bytes.extend_from_slice(&word.load(Acquire).to_be_bytes());
        }
        Some((self.key.load(Relaxed), bytes))
    }
}
