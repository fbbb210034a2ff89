//! The format of the log: that of the device mapper target `log-writes` of Linux
//! (Documentation/admin-guide/device-mapper/log-writes.rst). All numbers are little-endian.
//!
//! The first sector of the log contains the superblock. Each entry consists of a header, which fills one sector, and of the data
//! that was written. Discards and flushes have no data.

use oxblk_core::{Error, Result};
use oxblk_ring::{IoBuf, IoBufMut};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

/// Number of bytes of the superblock that are used.
const SUPERBLOCK: usize = 28;
/// Number of bytes of an entry's header that are used.
pub(super) const HEADER: usize = 32;

/// All writes before the entry are on stable storage.
pub(super) const FLUSH: u64 = 1;
/// The data of the entry is on stable storage.
pub(super) const FUA: u64 = 2;
/// The range of the entry was discarded.
pub(super) const DISCARD: u64 = 4;

/// The superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    /// The number of entries.
    pub(super) entries: u64,
    /// The size of a sector in bytes.
    pub(super) sector_size: u32,
}

/// The header of an entry. Offset and length are in sectors of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) sector: u64,
    pub(super) sectors: u64,
    pub(super) flags: u64,
}

/// Checks the size of a sector of the log.
///
/// # Errors
/// When the size is no power of two, when a header does not fit into a sector, or when the size is 16 MiB or more.
pub(super) fn check_sector_size(size: u64) -> Result<u32> {
    let size_of_sector = u32::try_from(size).ok();
    let valid =
        size_of_sector.filter(|size| size.is_power_of_two() && (32..1 << 24).contains(size));
    valid.ok_or_else(|| Error::invalid(format!("Invalid log sector size {size}")))
}

impl Superblock {
    /// The sector that contains the superblock.
    pub(super) fn encode(self) -> IoBuf {
        let mut sector = IoBufMut::zeroed(usize::try_from(self.sector_size).unwrap_or(SUPERBLOCK));
        let fields = [MAGIC, VERSION, self.entries, u64::from(self.sector_size)];
        put(&mut sector, &fields);
        sector.freeze()
    }

    /// # Errors
    /// When `bytes` are not a superblock.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        if number(bytes, 0) != MAGIC {
            return Err(Error::invalid("Invalid log superblock magic"));
        }
        let version = number(bytes, 1);
        if version != VERSION {
            return Err(Error::invalid(format!("Unsupported log version {version}")));
        }
        let sector_size = check_sector_size(number(bytes, 3) & u64::from(u32::MAX))?;
        Ok(Self { entries: number(bytes, 2), sector_size })
    }
}

impl Entry {
    /// The sector that contains the header.
    pub(super) fn encode(self, sector_size: u32) -> IoBuf {
        let mut sector = IoBufMut::zeroed(usize::try_from(sector_size).unwrap_or(HEADER));
        put(&mut sector, &[self.sector, self.sectors, self.flags]);
        sector.freeze()
    }

    pub(super) fn decode(bytes: &[u8]) -> Self {
        Self { sector: number(bytes, 0), sectors: number(bytes, 1), flags: number(bytes, 2) }
    }

    /// The number of sectors of data behind the header.
    pub(super) fn data_sectors(self) -> u64 {
        if self.flags & DISCARD != 0 { 0 } else { self.sectors }
    }
}

/// Writes numbers to the start of a sector.
fn put(sector: &mut IoBufMut, numbers: &[u64]) {
    for (place, number) in sector.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// The number at a position, or 0 past the end.
fn number(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.chunks_exact(8).nth(at).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_and_entries_are_read_as_they_were_written() {
        let superblock = Superblock { entries: 7, sector_size: 4096 };
        let bytes = superblock.encode();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(&bytes[..8], b"rhswfsj\0");
        assert_eq!(Superblock::decode(&bytes).unwrap(), superblock);
        let entry = Entry { sector: 9, sectors: 3, flags: DISCARD };
        assert_eq!(Entry::decode(&entry.encode(512)), entry);
        assert_eq!((entry.data_sectors(), Entry { flags: FLUSH, ..entry }.data_sectors()), (0, 3));
    }

    #[test]
    fn sectors_have_a_valid_size() {
        for size in [32, 512, 1 << 23] {
            assert_eq!(check_sector_size(size).map(u64::from).unwrap(), size);
        }
        for size in [0, 16, 100, 1 << 24, 1 << 32] {
            let refused = check_sector_size(size).unwrap_err();
            assert_eq!(refused.to_string(), format!("Invalid log sector size {size}"));
        }
    }
}
