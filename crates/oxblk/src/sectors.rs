//! Sectors, the unit of the disk sizes that the tools report.

/// Size of a sector in bytes. The tools report disk sizes that are multiples of this number.
pub const SECTOR: u64 = 512;

/// `bytes`, rounded up to a multiple of the sector size.
pub fn in_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}
