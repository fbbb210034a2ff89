//! The metadata cache of qcow2 and qed: slices of L2 tables and of qcow2 refcount blocks, read without a lock.
//!
//! A *slice* is a part of a table: a run of 64-bit words, usually 4 KiB. The slices of all tables are numbered
//! consecutively. [`SliceCache`] stores slices in numbered *slots*. A slot is created once. Later, only its contents
//! change. A [`Radix`](radix::Radix) tree maps the number of a slice to its slot.
//!
//! - A **hit** ([`SliceCache::peek`]) takes no lock and writes no shared data, apart from a usage flag. A hit reads the slot's
//!   version before and after the words (a sequence lock over atomics). So it detects that the slot was reused for another
//!   slice while the words were read.
//! - A **change** needs a pinned slot ([`Pinned`]). A pinned or dirty slot is never reused. The caller must serialise changes
//!   of the same word, and must order changes with respect to disk writes. L2 entries change under [`Pinned::begin_change`]: a
//!   hit or a write to disk sees either all of these changes or none, and a hit sees them only when the slice is marked
//!   dirty.
//! - A **miss** loads the slice once: other tasks that need the same slice wait for the task that loads it. Hits continue while
//!   a slice is being loaded.
//! - **Eviction** is CLOCK over clean, unpinned slots. If there is none, [`SliceCache::get`] returns `None`, and the caller
//!   writes metadata back first.
//! - **Unused** slices are dropped periodically ([`clean`]), and their memory is returned to the host. The words of slots
//!   lie in memory that can be released while readers access it. Such a reader sees zeroes. The reader discards the zeroes,
//!   because the version has changed.

mod clean;
mod radix;
mod slot;
mod state;
#[cfg(test)]
mod under_loom;
mod version;

/// The synchronisation primitives of the files that are also compiled against loom.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    pub(super) use std::sync::{Mutex, MutexGuard};

    /// Ignores poisoning: a panic under these locks leaves no incomplete change.
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
use oxblk_ring::{Event, EventListener, WordMemory};

pub(crate) use clean::Cleaner;
pub(crate) use radix::Radix;
use version::Changing;

use atomics::lock;
use slot::Slot;
use state::DirtyList;

/// Number of slots that are created together.
const CHUNK: usize = 16;
/// The limit of a cache can later be raised to at least this many slices.
const LIMIT_LATER: usize = 16 << 10;

/// A cache of table slices.
pub(crate) struct SliceCache {
    words: usize,
    /// Maximum number of slices. After the limit was lowered, the cache may contain more slices for some time.
    limit: AtomicUsize,
    directory: Radix<AtomicU32>,
    chunks: Box<[OnceLock<Chunk>]>,
    made: AtomicUsize,
    hand: AtomicUsize,
    /// The numbers of free slots: slots without a slice. The lock is held while slices are removed from slots or stored
    /// there.
    claiming: Mutex<Vec<u32>>,
    /// Number of slots that contain a slice.
    in_use: AtomicUsize,
    /// Notified when a slice is cached and the cache was empty.
    filled: Arc<Event>,
    dirty: DirtyList,
    loading: Mutex<HashMap<u64, Arc<Event>>>,
}

/// Slots whose words are contiguous in memory.
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

/// No slot can be reused, because all slots are dirty, pinned or claimed. A write-back makes dirty slots clean.
pub(crate) struct Full;

impl SliceCache {
    /// Creates a cache of at most `limit` slices (2 to 2^24) of `words` words each. `filled` is notified when a slice is
    /// cached and the cache was empty.
    pub(crate) fn new(words: usize, limit: usize, filled: Arc<Event>) -> Self {
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

    /// Changes the maximum number of cached slices. The number is at least 2, and cannot exceed the number of slots for
    /// which the cache was created.
    pub(crate) fn set_limit(&self, limit: usize) {
        let most = self.chunks.len().saturating_mul(CHUNK);
        self.limit.store(limit.clamp(2, most), Relaxed);
    }

    /// Number of cached slices.
    pub(crate) fn in_use(&self) -> usize {
        self.in_use.load(Acquire)
    }

    /// Drops all slices that are neither dirty nor pinned. Returns whether these were all slices.
    pub(crate) fn clear(&self) -> bool {
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

    /// Drops the slices of the chunk `index` that were not used since the last call and are neither dirty nor pinned. Returns
    /// whether the chunk exists.
    pub(crate) fn drop_unused(&self, index: usize) -> bool {
        let mut free = lock(&self.claiming);
        self.drop_slices(index, &mut free, |slot| !slot.was_used_in_interval()).is_some()
    }

    /// Drops the slices of a chunk for which `unwanted` is true and that are neither dirty nor pinned. Releases the memory of
    /// pages that then contain no slice. Returns whether the chunk is empty now, or `None` if there is no such chunk.
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
                // Free slots are claimed too, because their memory may not have been released yet.
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

    /// Removes the slice of a claimed slot from the directory.
    fn unlist(&self, slot: &Slot, number: u32) {
        if let Some(old) = slot.key()
            && let Some(entry) = self.directory.get(old)
        {
            // Clear the directory entry only if it still refers to this slot.
            let _ = entry.compare_exchange(number, 0, AcqRel, Relaxed);
        }
    }

    fn slot(&self, number: u32) -> Option<&Slot> {
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        self.chunks.get(index / CHUNK)?.get()?.slots.get(index % CHUNK)
    }

    /// Calls `look` on the words of a slice, if the slice is cached. If the words change during the call, the result of
    /// `look` is discarded.
    pub(crate) fn peek<R>(&self, slice: u64, look: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let number = self.directory.get(slice)?.load(Acquire);
        point();
        self.slot(number)?.peek(slice, look)
    }

    /// Pins a slice if it is cached.
    pub(crate) fn pin(&self, slice: u64) -> Option<Pinned<'_>> {
        let number = self.directory.get(slice)?.load(Acquire);
        point();
        let slot = self.slot(number)?;
        slot.pin(slice).then_some(Pinned { cache: self, slot, number })
    }

    /// Pins a slice. If the slice is not cached, loads it with `load`. `load` returns the words as big-endian bytes.
    /// Returns `Ok(None)` if no slot can be reused ([`Full`]).
    ///
    /// # Errors
    /// The errors of `load`.
    pub(crate) async fn get<L>(
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
                Err(listener) => listener.await,
                Ok(_guard) => {
                    // Another task may have loaded the slice before this task began its load.
                    if let Some(pinned) = self.pin(slice) {
                        return Ok(Some(pinned));
                    }
                    let bytes = load().await?;
                    return Ok(self.insert(slice, &bytes).ok());
                }
            }
        }
    }

    /// Begins to load a slice. If another task is loading the slice, returns a listener for the end of that load. The listener
    /// is created before the lock is released, so it cannot miss the end of the load.
    fn begin_load(&self, slice: u64) -> Result<Loading<'_>, EventListener> {
        match lock(&self.loading).entry(slice) {
            std::collections::hash_map::Entry::Occupied(entry) => Err(entry.get().listen()),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Arc::new(Event::new()));
                Ok(Loading { cache: self, slice })
            }
        }
    }

    /// Stores a slice that is not cached in a slot.
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

    /// Claims a slot for a new slice: a free slot, a new slot, or the slot that CLOCK selects.
    fn claim(&self, free: &mut Vec<u32>) -> Result<u32, Full> {
        let (made, limit) = (self.made.load(Acquire), self.limit.load(Relaxed));
        while let Some(number) = free.pop() {
            // CLOCK may have reused the slot already, or the limit was lowered below its number.
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

    /// Copies all dirty slices and marks them clean. The slices stay pinned until the copies are dropped. So a slice can be
    /// evicted only when its newest contents are on disk.
    pub(crate) fn take_dirty(&self) -> Vec<DirtyCopy<'_>> {
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

/// A pinned slice: its slot is not reused while this value exists.
pub(crate) struct Pinned<'a> {
    cache: &'a SliceCache,
    slot: &'a Slot,
    number: u32,
}

impl Pinned<'_> {
    /// The slice's words. Words that lookups read are changed under [`Self::begin_change`]. Code that changes other words must
    /// call [`Self::mark_dirty`] afterwards.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.slot.words()
    }

    /// Begins a change of words that lookups read. Lookups see either no part of the change, or, after the guard is dropped,
    /// the complete change. The holder of the guard must not wait.
    pub(crate) fn begin_change(&self) -> Change<'_> {
        Change { pinned: self, changed: false, _changing: self.slot.begin_change() }
    }

    /// Marks the slice dirty. Call this after the change of its words. After this call, [`SliceCache::take_dirty`] includes the
    /// change.
    pub(crate) fn mark_dirty(&self) {
        self.cache.dirty.mark(self.slot.state(), self.number);
    }
}

/// A running change of the words of a slice.
///
/// Invariant: a lookup sees a changed word only after the slice was marked dirty. Otherwise another thread could write data
/// through a new entry and flush, while the slice is not yet in the dirty list. A power cut would then lose flushed data.
pub(crate) struct Change<'a> {
    pinned: &'a Pinned<'a>,
    changed: bool,
    /// Dropped after the slice was marked dirty: fields are dropped after [`Drop::drop`] has run.
    _changing: Changing<'a>,
}

impl Change<'_> {
    /// The slice's words, for reading.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.pinned.words()
    }

    /// Replaces the word `index` and returns the old word. Returns 0 and changes nothing if the slice has no such word.
    pub(crate) fn replace(&mut self, index: usize, new: u64) -> u64 {
        let Some(word) = self.pinned.words().get(index) else { return 0 };
        self.changed = true;
        word.swap(new, AcqRel)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if self.changed {
            point();
            self.pinned.mark_dirty();
        }
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.slot.unpin();
    }
}

/// A consistent copy of a dirty slice.
pub(crate) struct DirtyCopy<'a> {
    pinned: Pinned<'a>,
    /// The number of the slice.
    pub(crate) slice: u64,
    /// The words of the slice in big-endian bytes.
    pub(crate) bytes: Vec<u8>,
    written: bool,
}

impl DirtyCopy<'_> {
    /// Call this when the copy is on disk. A copy that is dropped without this call makes its slice dirty again.
    pub(crate) fn written(mut self) {
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
