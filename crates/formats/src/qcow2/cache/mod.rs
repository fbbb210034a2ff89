//! The metadata cache: L2 and refcount tables in slices, read without a lock.
//!
//! A *slice* is a run of 64-bit words of a table (4 KiB, or a cluster if that is smaller), known by its index
//! counted over all tables. [`SliceCache`] keeps slices in numbered *slots* that are made once and then only change
//! their contents; a [`Radix`](radix::Radix) tree tells the slot of a slice.
//!
//! - A **hit** ([`SliceCache::peek`]) takes no lock and writes nothing shared: the slot's version is read before and
//!   after the words (a sequence lock over atomics), so that a slot that was given to another slice meanwhile is
//!   noticed.
//! - A **change** needs the slot pinned ([`Pinned`]); a pinned or dirty slot is never given away. Who changes a word, and
//!   in which order with respect to the disk, is the caller's business. Words that only mean something together change
//!   under [`Pinned::begin_change`]: neither a hit nor a write to disk sees some of them changed and others not.
//! - A **miss** is loaded once: others that want the same slice wait for the one that loads it. Nothing that a hit needs
//!   is held while it loads.
//! - **Eviction** is CLOCK over clean, unpinned slots. If there is none, [`SliceCache::get`] says so and the caller
//!   writes metadata back first.
//! - **Unused** slices are dropped from time to time ([`clean`]), and their memory goes back to the host: the words of
//!   slots lie in memory that can be released while readers look at it. They see zeroes then, and notice by the version
//!   that these are not what they looked for.

mod clean;
mod radix;
mod slot;
mod state;
#[cfg(test)]
mod under_loom;
mod version;

/// The primitives of the parts that also run under loom.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(super) use std::sync::{Mutex, MutexGuard};

    /// Nothing that holds these locks leaves anything half done when it panics.
    pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{
    AtomicU32, AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, OnceLock};

use oxblk_core::Result;
use oxblk_ring::perturb::point;
use oxblk_ring::{Event, WordMemory};

pub(super) use clean::Cleaner;
pub(super) use radix::Radix;
pub(super) use version::Changing;

use atomics::lock;
use slot::Slot;
use state::DirtyList;

/// Slots are made this many at a time.
const CHUNK: usize = 16;
/// A cache can be made to hold so many slices later, however few it begins with.
const LIMIT_LATER: usize = 16 << 10;

/// A cache of table slices.
pub(super) struct SliceCache {
    words: usize,
    /// Most slices; more are kept only if there were more before it was lowered.
    limit: AtomicUsize,
    directory: Radix<AtomicU32>,
    chunks: Box<[OnceLock<Chunk>]>,
    made: AtomicUsize,
    hand: AtomicUsize,
    /// Held by whoever takes slots from their slices; slots that belong to none.
    claiming: Mutex<Vec<u32>>,
    /// Slots that hold a slice.
    in_use: AtomicUsize,
    /// Told when the first slice is cached.
    filled: Arc<Event>,
    dirty: DirtyList,
    loading: Mutex<HashMap<u64, Arc<Event>>>,
}

/// Slots that lie next to each other in memory.
struct Chunk {
    slots: Box<[Slot]>,
    memory: Arc<WordMemory>,
}

impl Chunk {
    fn new(words: usize) -> Self {
        let memory = WordMemory::new(words.saturating_mul(CHUNK));
        let starts = (0..CHUNK).map(|index| index.saturating_mul(words));
        let views = starts.filter_map(|start| memory.view(start..start.saturating_add(words)));
        Self { slots: views.map(Slot::new).collect(), memory }
    }
}

/// No slot can be given away: metadata must be written back first.
pub(super) struct Full;

impl SliceCache {
    /// A cache of slices of `words` words each, `limit` slices at most (at least 2).
    /// `filled` is told whenever a slice is cached and none was.
    pub(super) fn new(words: usize, limit: usize, filled: Arc<Event>) -> Self {
        let limit = limit.clamp(2, 1 << 24);
        let most = limit.max(LIMIT_LATER);
        Self {
            words,
            limit: AtomicUsize::new(limit),
            directory: Radix::default(),
            chunks: (0..most.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
            made: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
            claiming: Mutex::default(),
            in_use: AtomicUsize::new(0),
            filled,
            dirty: DirtyList::default(),
            loading: Mutex::default(),
        }
    }

    /// Changes how many slices are cached at most, as far as there is room for so many.
    pub(super) fn set_limit(&self, limit: usize) {
        let most = self.chunks.len().saturating_mul(CHUNK);
        self.limit.store(limit.clamp(2, most), Relaxed);
    }

    /// How many slices are cached.
    pub(super) fn in_use(&self) -> usize {
        self.in_use.load(Acquire)
    }

    /// Forgets all slices that are neither dirty nor pinned; tells whether that were all.
    pub(super) fn clear(&self) -> bool {
        let mut free = lock(&self.claiming);
        let mut all = true;
        for index in 0..self.chunks.len() {
            match self.drop_slices(index, &mut free, |_| true) {
                Some(dropped) => all &= dropped,
                None => break,
            }
        }
        all
    }

    /// Drops the slices of the chunk `index` that were not used since the last time and are neither dirty nor pinned.
    /// Tells whether there is such a chunk.
    pub(super) fn drop_unused(&self, index: usize) -> bool {
        let mut free = lock(&self.claiming);
        self.drop_slices(index, &mut free, |slot| !slot.was_used_in_interval()).is_some()
    }

    /// Drops the slices of a chunk for which `unwanted` says so and that are neither dirty nor pinned, and gives back the
    /// memory of pages that hold nothing else. Tells whether none is left, if there is such a chunk.
    fn drop_slices(
        &self,
        index: usize,
        free: &mut Vec<u32>,
        unwanted: impl Fn(&Slot) -> bool,
    ) -> Option<bool> {
        let chunk = self.chunks.get(index)?.get()?;
        let together = (WordMemory::page_words() / self.words.max(1)).clamp(1, CHUNK);
        let mut all = true;
        let mut place = 0_usize;
        for slots in chunk.slots.chunks(together) {
            let first = place;
            place = place.saturating_add(slots.len());
            let mut claimed = Vec::with_capacity(together);
            for (slot, at) in slots.iter().zip(first..) {
                // Slots of nobody are claimed too: their memory may not have gone back yet.
                if (slot.key().is_none() || unwanted(slot)) && slot.claim() {
                    let number = index.saturating_mul(CHUNK).saturating_add(at).saturating_add(1);
                    let number = u32::try_from(number).unwrap_or(u32::MAX);
                    if slot.key().is_some() {
                        self.unlist(slot, number);
                        self.in_use.fetch_sub(1, AcqRel);
                        free.push(number);
                    }
                    claimed.push((slot, slot.forget()));
                }
            }
            let whole = claimed.len() == slots.len();
            all &= whole;
            if whole && slots.iter().any(Slot::is_filled) {
                let start = first.saturating_mul(self.words);
                chunk.memory.release(start..place.saturating_mul(self.words));
                slots.iter().for_each(Slot::set_released);
            }
            for (slot, changing) in claimed {
                drop(changing);
                slot.unclaim();
            }
        }
        Some(all)
    }

    /// The slice of a claimed slot is not found there any more.
    fn unlist(&self, slot: &Slot, number: u32) {
        if let Some(old) = slot.key()
            && let Some(entry) = self.directory.get(old)
        {
            // Only if it still leads here.
            let _ = entry.compare_exchange(number, 0, AcqRel, Relaxed);
        }
    }

    fn slot(&self, number: u32) -> Option<&Slot> {
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        self.chunks.get(index / CHUNK)?.get()?.slots.get(index % CHUNK)
    }

    /// Looks at a slice if it is cached. `look` may run on words that are being replaced; its answer is thrown away
    /// then.
    pub(super) fn peek<R>(&self, slice: u64, look: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let number = self.directory.get(slice)?.load(Acquire);
        point();
        self.slot(number)?.peek(slice, look)
    }

    /// Pins a slice if it is cached.
    pub(super) fn pin(&self, slice: u64) -> Option<Pinned<'_>> {
        let number = self.directory.get(slice)?.load(Acquire);
        point();
        let slot = self.slot(number)?;
        slot.pin(slice).then_some(Pinned { cache: self, slot, number })
    }

    /// Pins a slice, loading it with `load` (which gives the words in big-endian bytes) if it is not cached.
    /// `Ok(None)`: the cache is full of slices that must be written back first.
    ///
    /// # Errors
    /// As `load` reports.
    pub(super) async fn get<L>(
        &self,
        slice: u64,
        load: impl Fn() -> L,
    ) -> Result<Option<Pinned<'_>>>
    where
        L: Future<Output = Result<oxblk_ring::IoBufMut>>,
    {
        loop {
            if let Some(pinned) = self.pin(slice) {
                return Ok(Some(pinned));
            }
            match self.begin_load(slice) {
                Err(event) => {
                    let listener = event.listen();
                    if lock(&self.loading).contains_key(&slice) {
                        listener.await;
                    }
                }
                Ok(_turn) => {
                    // It may have been loaded between the look and the turn.
                    if let Some(pinned) = self.pin(slice) {
                        return Ok(Some(pinned));
                    }
                    let bytes = load().await?;
                    return Ok(self.insert(slice, &bytes).ok());
                }
            }
        }
    }

    fn begin_load(&self, slice: u64) -> Result<Loading<'_>, Arc<Event>> {
        match lock(&self.loading).entry(slice) {
            std::collections::hash_map::Entry::Occupied(entry) => Err(Arc::clone(entry.get())),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Arc::new(Event::new()));
                Ok(Loading { cache: self, slice })
            }
        }
    }

    /// Puts a slice that is not cached into a slot.
    fn insert(&self, slice: u64, bytes: &[u8]) -> Result<Pinned<'_>, Full> {
        let mut free = lock(&self.claiming);
        let number = self.claim(&mut free)?;
        let slot = self.slot(number).ok_or(Full)?;
        let was_free = slot.key().is_none();
        self.unlist(slot, number);
        slot.refill(slice, bytes);
        point();
        self.directory.get_or_make(slice).store(number, Release);
        if was_free && self.in_use.fetch_add(1, AcqRel) == 0 {
            self.filled.notify(usize::MAX);
        }
        Ok(Pinned { cache: self, slot, number })
    }

    /// A slot taken from its slice, pinned once for the new one.
    fn claim(&self, free: &mut Vec<u32>) -> Result<u32, Full> {
        let (made, limit) = (self.made.load(Acquire), self.limit.load(Relaxed));
        while let Some(number) = free.pop() {
            // It may have been found without the list, or lie beyond a limit that was lowered.
            if usize::try_from(number).is_ok_and(|number| number <= limit)
                && let Some(slot) = self.slot(number)
                && slot.key().is_none()
                && slot.claim()
            {
                return Ok(number);
            }
        }
        if made < limit {
            let chunk = self.chunks.get(made / CHUNK).ok_or(Full)?;
            let chunk = chunk.get_or_init(|| Chunk::new(self.words));
            let slot = chunk.slots.get(made % CHUNK).ok_or(Full)?;
            self.made.store(made.saturating_add(1), Release);
            let number = u32::try_from(made.saturating_add(1)).map_err(|_| Full)?;
            return if slot.claim() { Ok(number) } else { Err(Full) };
        }
        for _ in 0..limit.saturating_mul(2) {
            let index = self.hand.fetch_add(1, Relaxed) % limit;
            let number = u32::try_from(index.saturating_add(1)).map_err(|_| Full)?;
            let Some(slot) = self.slot(number) else { continue };
            if !slot.take_second_chance() && slot.claim() {
                point();
                return Ok(number);
            }
        }
        Err(Full)
    }

    /// Takes all dirty slices as they are now, clean from here on unless changed again. They stay pinned until the
    /// copies are dropped, so that what is on disk is as new as what is cached whenever they may be evicted.
    pub(super) fn take_dirty(&self) -> Vec<DirtyCopy<'_>> {
        let numbers = self.dirty.take();
        point();
        let mut copies = Vec::with_capacity(numbers.len());
        for number in numbers {
            let Some(slot) = self.slot(number) else { continue };
            if let Some((slice, bytes)) = slot.copy_dirty() {
                copies.push(DirtyCopy {
                    pinned: Pinned { cache: self, slot, number },
                    slice,
                    bytes,
                    written: false,
                });
            }
        }
        copies
    }
}

struct Loading<'a> {
    cache: &'a SliceCache,
    slice: u64,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if let Some(event) = lock(&self.cache.loading).remove(&self.slice) {
            event.notify(usize::MAX);
        }
    }
}

/// A slice that stays where it is.
pub(super) struct Pinned<'a> {
    cache: &'a SliceCache,
    slot: &'a Slot,
    number: u32,
}

impl Pinned<'_> {
    /// The slice's words. Whoever changes one calls [`Self::mark_dirty`] afterwards.
    pub(super) fn words(&self) -> &[AtomicU64] {
        self.slot.words()
    }

    /// For a change of several words that belong together: they are seen together or not at all once the guard is dropped.
    /// Nothing may wait while it is held.
    pub(super) fn begin_change(&self) -> Changing<'_> {
        self.slot.begin_change()
    }

    /// Says that words were changed, after they were. When it returns, [`SliceCache::take_dirty`] finds the change.
    pub(super) fn mark_dirty(&self) {
        self.cache.dirty.mark(self.slot.state(), self.number);
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.slot.unpin();
    }
}

/// A dirty slice as it was at one moment.
pub(super) struct DirtyCopy<'a> {
    pinned: Pinned<'a>,
    /// Which slice.
    pub(super) slice: u64,
    /// Its words in big-endian bytes.
    pub(super) bytes: Vec<u8>,
    written: bool,
}

impl DirtyCopy<'_> {
    /// The copy is on disk. One that is dropped without this makes its slice dirty again.
    pub(super) fn written(mut self) {
        self.written = true;
    }
}

impl Drop for DirtyCopy<'_> {
    fn drop(&mut self) {
        if !self.written {
            self.pinned.mark_dirty();
        }
    }
}

#[cfg(test)]
mod tests;
