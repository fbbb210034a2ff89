//! A map of 32-bit little-endian entries in memory: one for each block of the disk.
//!
//! The map is read in chunks when they are needed. A lookup takes no lock. A chunk that is loaded with equal entries takes
//! no memory for its entries until one of them changes. The map of a sparse image consists mostly of such chunks. One
//! atomic store changes an entry. Once a chunk is loaded, its entries in memory are valid, and the file may contain older
//! entries.

use std::sync::OnceLock;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: u64 = 4;
/// Entries of a chunk, the unit of loading.
pub(crate) const CHUNK: u32 = 1 << 14;
/// Flag of a chunk whose entries are all equal. The low half is their value.
const UNIFORM: u64 = 1 << 32;

#[derive(Default)]
struct Chunk {
    /// 0: the chunk is not loaded, or its entries differ.
    uniform: AtomicU64,
    own: OnceLock<Box<[AtomicU32]>>,
}

impl Chunk {
    fn is_loaded(&self) -> bool {
        self.own.get().is_some() || self.uniform.load(Acquire) != 0
    }

    fn number(&self, index: usize) -> Option<u32> {
        match self.own.get() {
            Some(own) => own.get(index).map(|entry| entry.load(Acquire)),
            None => uniform(self.uniform.load(Acquire)),
        }
    }
}

fn uniform(word: u64) -> Option<u32> {
    // The value is the low half of the word.
    word.checked_sub(UNIFORM).and_then(|number| u32::try_from(number).ok())
}

/// The map.
pub(crate) struct EntryMap {
    entries: u32,
    chunks: Box<[Chunk]>,
}

fn split(index: u32) -> (usize, usize) {
    let place = |number| usize::try_from(number).unwrap_or(usize::MAX);
    (place(index / CHUNK), place(index % CHUNK))
}

impl EntryMap {
    /// A map without loaded chunks.
    pub(crate) fn new(entries: u32) -> Self {
        let chunks = (0..entries.div_ceil(CHUNK)).map(|_| Chunk::default()).collect();
        Self { entries, chunks }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> u32 {
        self.entries
    }

    /// The indices of the entries in the chunk of `index`.
    pub(crate) fn chunk_of(&self, index: u32) -> std::ops::Range<u32> {
        let start = index - index % CHUNK;
        start..start.saturating_add(CHUNK).min(self.entries)
    }

    /// The entry at `index`. `None` if this entry is not loaded or does not exist.
    pub(crate) fn get(&self, index: u32) -> Option<u32> {
        let (chunk, within) = split(index);
        self.chunks.get(chunk)?.number(within)
    }

    /// If the chunk of `index` is stored as one value: this value, and the number of entries from `index` to the end of the
    /// chunk.
    pub(crate) fn uniform(&self, index: u32) -> Option<(u32, u32)> {
        let chunk = self.chunks.get(split(index).0)?;
        if chunk.own.get().is_some() {
            return None;
        }
        let number = uniform(chunk.uniform.load(Acquire))?;
        Some((number, self.chunk_of(index).end.saturating_sub(index)))
    }

    /// Whether the entry at `index` is loaded. Also true if there is no such entry.
    pub(crate) fn is_loaded(&self, index: u32) -> bool {
        self.chunks.get(split(index).0).is_none_or(Chunk::is_loaded)
    }

    /// Loads the chunk of `index` from its bytes, unless another task has loaded it already.
    pub(crate) fn load(&self, index: u32, bytes: &[u8]) {
        let Some(chunk) = self.chunks.get(split(index).0) else { return };
        if chunk.is_loaded() {
            return;
        }
        let mut numbers = numbers(bytes);
        let Some(first) = numbers.next() else { return };
        if numbers.all(|number| number == first) {
            let word = UNIFORM | u64::from(first);
            // If another task was first, that task has loaded the same value, because a chunk changes only after it is
            // loaded.
            let _ = chunk.uniform.compare_exchange(0, word, Release, Relaxed);
        } else {
            let own = self::numbers(bytes).map(AtomicU32::new).collect();
            let _ = chunk.own.set(own);
        }
    }

    /// Whether the entries of a loaded chunk equal those in `bytes`.
    pub(crate) fn is_same(&self, index: u32, bytes: &[u8]) -> bool {
        let range = self.chunk_of(index);
        range.zip(numbers(bytes)).all(|(index, number)| {
            let (chunk, within) = split(index);
            self.chunks.get(chunk).and_then(|chunk| chunk.number(within)) == Some(number)
        })
    }

    /// Changes an entry of a loaded chunk. A thread that reads the new entry also sees all writes to memory before this
    /// call.
    pub(crate) fn set(&self, index: u32, number: u32) {
        let (chunk, within) = split(index);
        let Some(chunk) = self.chunks.get(chunk) else { return };
        let own = chunk.own.get_or_init(|| {
            let number = uniform(chunk.uniform.load(Acquire)).unwrap_or_default();
            self.chunk_of(index).map(|_| AtomicU32::new(number)).collect()
        });
        if let Some(place) = own.get(within) {
            place.store(number, Release);
        }
    }

    /// The bytes of the loaded entries in `range`, as they are stored in the file.
    pub(crate) fn encode(&self, range: std::ops::Range<u32>) -> Vec<u8> {
        let number = |index| {
            let (chunk, within) = split(index);
            self.chunks.get(chunk).and_then(|chunk| chunk.number(within)).unwrap_or_default()
        };
        range.flat_map(|index| number(index).to_le_bytes()).collect()
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let width = usize::try_from(ENTRY_BYTES).unwrap_or(4);
    bytes.chunks_exact(width).map(|word| word.try_into().map_or(0, u32::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    const ABSENT: u32 = u32::MAX;
    const DISCARDED: u32 = u32::MAX - 1;

    #[test]
    fn entries_of_a_chunk_that_is_not_loaded_are_unknown() {
        let map = EntryMap::new(CHUNK + 2);
        assert_eq!(map.get(0), None);
        map.load(CHUNK + 1, &bytes(&[7, ABSENT]));
        assert_eq!(map.get(0), None);
        assert_eq!(map.get(CHUNK), Some(7));
        assert_eq!(map.get(CHUNK + 1), Some(ABSENT));
        assert_eq!(map.get(CHUNK + 2), None);
    }

    #[test]
    fn a_chunk_of_equal_entries_takes_memory_when_one_changes() {
        let map = EntryMap::new(CHUNK);
        map.load(0, &bytes(&vec![DISCARDED; 1 << 14]));
        assert_eq!(map.uniform(5), Some((DISCARDED, CHUNK - 5)));
        map.set(5, 9);
        assert_eq!(map.uniform(5), None);
        assert_eq!((map.get(5), map.get(6)), (Some(9), Some(DISCARDED)));
        // Entries that did not change keep their number.
        assert_eq!(map.encode(4..7), bytes(&[DISCARDED, 9, DISCARDED]));
    }

    #[test]
    fn a_late_load_does_not_undo_a_change() {
        let map = EntryMap::new(2);
        let before = bytes(&[ABSENT, 3]);
        map.load(0, &before);
        assert!(map.is_same(0, &before));
        map.set(0, 4);
        map.load(0, &before);
        assert_eq!(map.get(0), Some(4));
        assert!(!map.is_same(0, &before));
    }
}
