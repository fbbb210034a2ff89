//! Finds the part of the served disk that can be mounted, for the mount command of the announcement.
//!
//! A disk with a partition table has its file systems in partitions, so the disk itself cannot be mounted. The command
//! then contains the number that Linux gives to the largest partition. The contents of the disk are not trusted: an
//! MBR with an entry past the end of the disk counts as no partition table, GPT entries past the end of the disk are
//! ignored, and the number of bytes that are read has a limit.

use oxblk_core::{Backend, Result};
use oxblk_ring::IoBufMut;

const SECTOR: u64 = 512;
/// Maximum number of bytes of GPT entries that are read. Later entries are ignored. The usual size of the table is 16 KiB.
const MAX_ENTRIES: u64 = 64 << 10;
/// Size of an MBR entry in bytes; the table of four entries begins at byte 446.
const MBR_ENTRY: usize = 16;
/// The MBR type of the entry that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// The MBR types of extended partitions, which contain further partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Length in bytes of the start of a disk. In every usual file system, the superblock is in this range.
const SUPERBLOCKS: u64 = 128 << 10;

/// The part of a disk that can be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mountable {
    /// Nothing: the disk is shorter than two sectors, or its start contains only zeroes.
    Nothing,
    /// The disk itself: no partition was found.
    Disk,
    /// The largest primary or GPT partition, or the first logical partition if the MBR has only an extended partition. The
    /// number is the number that Linux gives to this partition.
    Partition(u32),
}

/// Finds the part of a disk that can be mounted.
///
/// # Errors
/// If the disk cannot be read.
pub(super) async fn mountable(disk: &Backend) -> Result<Mountable> {
    let sectors = disk.size() / SECTOR;
    if sectors < 2 {
        return Ok(Mountable::Nothing);
    }
    let head = read(disk, 0, SUPERBLOCKS.min(sectors * SECTOR)).await?;
    if oxblk_ring::is_zero(&head) {
        return Ok(Mountable::Nothing);
    }
    let (mbr, rest) = head.split_at(512.min(head.len()));
    let largest = match parse_mbr(mbr, sectors) {
        Mbr::None => None,
        Mbr::Partition(number) => Some(number),
        Mbr::Protective => match parse_gpt_header(rest, sectors) {
            None => None,
            Some(place) => {
                let entries = read(disk, place.offset, place.len).await?;
                largest_gpt_entry(&entries, place.entry, sectors)
            }
        },
    };
    Ok(largest.map_or(Mountable::Disk, Mountable::Partition))
}

async fn read(disk: &Backend, offset: u64, len: u64) -> Result<Vec<u8>> {
    let buf = IoBufMut::new(usize::try_from(len).unwrap_or(0));
    Ok(disk.read(offset, buf).await?.to_vec())
}

#[derive(Debug, PartialEq, Eq)]
enum Mbr {
    None,
    Partition(u32),
    /// The partitions are in a GPT.
    Protective,
}

/// Reads the partition table in the first sector. The boot sector of a file system has the same signature, but not
/// valid entries at the offset of the table.
fn parse_mbr(sector: &[u8], sectors: u64) -> Mbr {
    if sector.get(510..512) != Some(&[0x55, 0xaa]) {
        return Mbr::None;
    }
    let entries = sector.get(446..510).unwrap_or_default().chunks_exact(MBR_ENTRY);
    let mut found: Option<(u64, u32)> = None;
    for (number, entry) in (1..).zip(entries) {
        let (Some(&active), Some(&kind)) = (entry.first(), entry.get(4)) else { return Mbr::None };
        if !matches!(active, 0 | 0x80) {
            return Mbr::None;
        }
        let (start, len) = (u64::from(le32(entry, 8)), u64::from(le32(entry, 12)));
        if kind == PROTECTIVE {
            return Mbr::Protective;
        }
        if kind == 0 {
            continue;
        }
        if start == 0 || len == 0 || start.saturating_add(len) > sectors {
            return Mbr::None;
        }
        // Linux numbers the partitions in an extended partition from 5 on.
        let (size, number) = if EXTENDED.contains(&kind) { (0, 5) } else { (len, number) };
        if found.is_none_or(|(largest, _)| size > largest) {
            found = Some((size, number));
        }
    }
    found.map_or(Mbr::None, |(_, number)| Mbr::Partition(number))
}

/// Offset and length of the GPT entries, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Entries {
    offset: u64,
    len: u64,
    /// Size of one entry.
    entry: usize,
}

fn parse_gpt_header(sector: &[u8], sectors: u64) -> Option<Entries> {
    if sector.get(..8) != Some(b"EFI PART") {
        return None;
    }
    let entry = le32(sector, 84);
    if !(128..=4096).contains(&entry) || !entry.is_power_of_two() {
        return None;
    }
    let offset = le64(sector, 72).checked_mul(SECTOR)?;
    let len = u64::from(le32(sector, 80)).saturating_mul(u64::from(entry)).min(MAX_ENTRIES);
    let end = offset.checked_add(len)?;
    let fits = len > 0 && end <= sectors.saturating_mul(SECTOR);
    fits.then_some(Entries { offset, len, entry: usize::try_from(entry).ok()? })
}

fn largest_gpt_entry(entries: &[u8], entry: usize, sectors: u64) -> Option<u32> {
    let mut found: Option<(u64, u32)> = None;
    for (number, entry) in (1..).zip(entries.chunks_exact(entry)) {
        let is_used = entry.get(..16).is_some_and(|kind| kind.iter().any(|byte| *byte != 0));
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if !is_used || last < first || last >= sectors {
            continue;
        }
        let size = last.saturating_sub(first);
        if found.is_none_or(|(largest, _)| size > largest) {
            found = Some((size, number));
        }
    }
    found.map(|(_, number)| number)
}

/// The 32-bit number at byte `at`, or 0 if `bytes` is too short.
fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    field.map_or(0, |field| u32::from_le_bytes(*field))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    field.map_or(0, |field| u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 10_000;

    /// A sector with MBR entries: type, start and length.
    fn mbr(entries: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut sector = vec![0; 512];
        for (entry, (kind, start, len)) in sector[446..510].chunks_mut(16).zip(entries) {
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..16].copy_from_slice(&len.to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    #[test]
    fn the_largest_mbr_partition_is_found() {
        let found = |entries: &[_]| parse_mbr(&mbr(entries), SECTORS);
        assert_eq!(found(&[(0x83, 1, 9000)]), Mbr::Partition(1));
        assert_eq!(found(&[(0x83, 1, 10), (0x82, 20, 5000)]), Mbr::Partition(2));
        assert_eq!(found(&[(0, 0, 0), (0, 0, 0), (0x83, 1, 10)]), Mbr::Partition(3));
        assert_eq!(found(&[(0x05, 1, 9000)]), Mbr::Partition(5));
        assert_eq!(found(&[(0x83, 1, 10), (0x0f, 20, 900)]), Mbr::Partition(1));
        assert_eq!(found(&[(0xee, 1, u32::MAX)]), Mbr::Protective);
    }

    #[test]
    fn a_sector_without_valid_entries_is_no_partition_table() {
        assert_eq!(parse_mbr(&[0; 512], SECTORS), Mbr::None);
        assert_eq!(parse_mbr(&mbr(&[]), SECTORS), Mbr::None);
        assert_eq!(parse_mbr(&mbr(&[(0x83, 1, 10_000)]), SECTORS), Mbr::None);
        assert_eq!(parse_mbr(&mbr(&[(0x83, 0, 10)]), SECTORS), Mbr::None);
        let mut boot_sector = mbr(&[(0x83, 1, 10)]);
        boot_sector[446..510].fill(b'x');
        assert_eq!(parse_mbr(&boot_sector, SECTORS), Mbr::None);
        assert_eq!(parse_mbr(&[], SECTORS), Mbr::None);
    }

    #[test]
    fn the_largest_gpt_partition_is_found() {
        let mut entries = vec![0; 4 * 128];
        for (entry, (first, last)) in
            entries.chunks_mut(128).zip([(40, 50), (60, 5000), (70, 20_000), (90, 80)])
        {
            entry[0] = 1;
            entry[32..40].copy_from_slice(&u64::to_le_bytes(first));
            entry[40..48].copy_from_slice(&u64::to_le_bytes(last));
        }
        assert_eq!(largest_gpt_entry(&entries, 128, SECTORS), Some(2));
        assert_eq!(largest_gpt_entry(&[0; 512], 128, SECTORS), None);
    }

    #[test]
    fn a_gpt_header_with_impossible_fields_is_not_used() {
        let header = |lba: u64, count: u32, size: u32| {
            let mut sector = vec![0; 512];
            sector[..8].copy_from_slice(b"EFI PART");
            sector[72..80].copy_from_slice(&lba.to_le_bytes());
            sector[80..84].copy_from_slice(&count.to_le_bytes());
            sector[84..88].copy_from_slice(&size.to_le_bytes());
            parse_gpt_header(&sector, SECTORS)
        };
        let place = Entries { offset: 1024, len: 128 * 128, entry: 128 };
        assert_eq!(header(2, 128, 128), Some(place));
        assert_eq!(header(2, u32::MAX, 4096).unwrap().len, MAX_ENTRIES);
        for (lba, count, size) in
            [(2, 0, 128), (u64::MAX, 128, 128), (SECTORS, 1, 128), (2, 1, 0), (2, 1, 8192)]
        {
            assert_eq!(header(lba, count, size), None, "{lba} {count} {size}");
        }
        assert_eq!(parse_gpt_header(&[0; 512], SECTORS), None);
    }
}
