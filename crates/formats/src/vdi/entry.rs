//! Entries of the block map.

use super::Vdi;

/// Value of the entry of a block that is not allocated.
const ABSENT: u32 = u32::MAX;
/// Value of the entry of a block that was discarded.
const DISCARDED: u32 = u32::MAX - 1;

/// The meaning of an entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The block reads as zeroes.
    Zero,
    /// The data lies in this block of the file.
    At(u32),
}

impl Entry {
    /// Decodes the value of an entry.
    pub fn from_number(number: u32) -> Self {
        match number {
            ABSENT | DISCARDED => Self::Zero,
            at => Self::At(at),
        }
    }

    /// The value that encodes the entry.
    pub fn number(self) -> u32 {
        match self {
            Self::Zero => ABSENT,
            Self::At(at) => at,
        }
    }
}

impl Vdi {
    /// The entry of a block of the disk. `None` if this entry is not loaded or does not exist.
    pub(super) fn entry(&self, index: u32) -> Option<Entry> {
        self.map.get(index).map(Entry::from_number)
    }

    /// If the chunk of `index` is stored as one value: the entry, and the number of entries from `index` to the end of the
    /// chunk.
    pub(super) fn uniform(&self, index: u32) -> Option<(Entry, u32)> {
        let (number, count) = self.map.uniform(index)?;
        Some((Entry::from_number(number), count))
    }

    /// Changes an entry and marks it as dirty. A thread that reads the new entry also sees all writes to memory before this
    /// call.
    pub(super) fn set_entry(&self, index: u32, entry: Entry) {
        self.dirty.change(index, || self.map.set(index, entry.number()));
    }
}
