//! Sectors: the unit of the sizes of disks and files that the tools report.

/// Size of a sector in bytes. Sizes of disks are multiples of it.
pub const SECTOR: u64 = 512;

/// `bytes` rounded up to whole sectors.
pub fn in_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}
