//! Entries of the block map.

use super::Vdi;

/// An entry of a block that is not allocated.
const ABSENT: u32 = u32::MAX;
/// An entry of a block that was discarded.
const DISCARDED: u32 = u32::MAX - 1;

/// What the map says of a block of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// It reads as zeroes.
    Zero,
    /// It is in this block of the file.
    At(u32),
}

impl Entry {
    /// Reads an entry's number.
    pub fn from_number(number: u32) -> Self {
        match number {
            ABSENT | DISCARDED => Self::Zero,
            at => Self::At(at),
        }
    }

    /// The number that stands for it.
    pub fn number(self) -> u32 {
        match self {
            Self::Zero => ABSENT,
            Self::At(at) => at,
        }
    }
}

impl Vdi {
    /// The entry of a block of the disk; `None` when it is not loaded.
    pub(super) fn entry(&self, index: u32) -> Option<Entry> {
        self.map.get(index).map(Entry::from_number)
    }

    /// What all entries of a chunk are, and how many there are from `index` to its end, where they are all the same.
    pub(super) fn uniform(&self, index: u32) -> Option<(Entry, u32)> {
        let (number, count) = self.map.uniform(index)?;
        Some((Entry::from_number(number), count))
    }

    /// Changes an entry, and notes that it is to be written. Readers see what was written before this call.
    pub(super) fn set_entry(&self, index: u32, entry: Entry) {
        self.map.set(index, entry.number());
        oxblk_ring::perturb::point();
        self.dirty.mark(index, 1);
    }
}
