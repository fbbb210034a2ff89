//! Entries of the BAT.
//!
//! The map in memory reads the stored bytes of an entry as a little-endian number, but the format is big-endian. [`Entry`]
//! converts the numbers.

use super::Vpc;

/// Value of the entry of a block that is not allocated.
const ABSENT: u32 = u32::MAX;

/// The meaning of an entry of the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The block reads as zeroes.
    Zero,
    /// The sector bitmap of the block starts at this sector of the file. The data follows the bitmap.
    At(u32),
}

impl Entry {
    /// Decodes a number of the map.
    pub fn from_number(number: u32) -> Self {
        match number.swap_bytes() {
            ABSENT => Self::Zero,
            sector => Self::At(sector),
        }
    }

    /// The number that encodes the entry in the map.
    pub fn number(self) -> u32 {
        match self {
            Self::Zero => ABSENT,
            Self::At(sector) => sector.swap_bytes(),
        }
    }
}

impl Vpc {
    /// The entry of a block of the disk. `None` if this entry is not loaded or does not exist.
    pub(super) fn entry(&self, index: u32) -> Option<Entry> {
        self.map.get(index).map(Entry::from_number)
    }

    /// Changes an entry and marks it as dirty. A thread that reads the new entry also sees all writes to memory before this
    /// call.
    pub(super) fn set_entry(&self, index: u32, entry: Entry) {
        self.dirty.change(index, || self.map.set(index, entry.number()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_stored_big_endian() {
        assert_eq!(Entry::At(4).number().to_le_bytes(), [0, 0, 0, 4]);
        assert_eq!(Entry::from_number(u32::from_le_bytes([0, 0, 16, 5])), Entry::At(0x1005));
        assert_eq!(Entry::from_number(u32::MAX), Entry::Zero);
    }
}
