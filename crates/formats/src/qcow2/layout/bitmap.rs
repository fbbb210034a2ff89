//! Persistent bitmaps: the directory, the tables, and their entries ("Bitmaps").
//!
//! Parsing a directory returns all its entries, also those whose bitmap cannot be used. Such an entry is preserved unchanged,
//! and [`BitmapEntry::fault`] reports why its bitmap cannot be used. Parsing fails only if the directory is empty, if the
//! boundaries of the entries cannot be found, or if the number of entries is wrong.

use std::borrow::Cow;

use oxblk_core::bitmap::{MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY};
use oxblk_core::{Error, Result, names};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BadEntry, Geometry};

/// Maximum number of bitmaps of an image, as in QEMU.
pub const MAX_BITMAPS: u32 = 65_535;
/// Maximum length of the bitmap directory in bytes, as in QEMU.
pub const MAX_BITMAP_DIRECTORY: u64 = MAX_BITMAPS as u64 * 1024;
/// Maximum length of the data of one bitmap in bytes, as in QEMU.
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// Maximum number of entries of a bitmap table, as in QEMU.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;

/// The only type of bitmap that the format defines.
const DIRTY_TRACKING: u8 = 1;

/// Bits 9 to 55 of a table entry: the offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of a table entry without an offset: all bits of this cluster of bitmap data are one.
const ONES: u64 = 1;

bitflags::bitflags! {
    /// The flags of a directory entry. Unknown bits are preserved.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct BitmapFlags: u32 {
        /// A program uses the bitmap, or did not store the bitmap after its last use. The stored contents may be outdated.
        const IN_USE = 1;
        /// The bitmap must record all writes to the disk.
        const AUTO = 2;
        /// A program that does not know the extra data may use the bitmap.
        const EXTRA_DATA_COMPATIBLE = 4;
        /// All other bits.
        const _ = !0;
    }
}

/// A directory entry without its variable parts ("Bitmap directory").
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    table_offset: U64,
    table_entries: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    write_size: U16,
    extra_size: U32,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawEntry>() == 24);
    assert!(offset_of!(RawEntry, table_entries) == 8);
    assert!(offset_of!(RawEntry, flags) == 12);
    assert!(offset_of!(RawEntry, kind) == 16);
    assert!(offset_of!(RawEntry, granularity_bits) == 17);
    assert!(offset_of!(RawEntry, write_size) == 18);
    assert!(offset_of!(RawEntry, extra_size) == 20);
};

/// A directory entry: the description of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Byte offset of the bitmap table.
    pub table_offset: u64,
    /// Number of entries of the bitmap table.
    pub table_entries: u32,
    /// Flags of the bitmap.
    pub flags: BitmapFlags,
    /// Binary logarithm of the granularity: the number of bytes that one bit represents.
    pub granularity_bits: u8,
    kind: u8,
    extra: Vec<u8>,
    name: Vec<u8>,
}

impl BitmapEntry {
    /// An entry for a bitmap of `granularity` bytes per bit (a power of two), without a table.
    pub fn new(name: &str, granularity: u64) -> Self {
        Self {
            table_offset: 0,
            table_entries: 0,
            flags: BitmapFlags::empty(),
            granularity_bits: u8::try_from(granularity.trailing_zeros()).unwrap_or(u8::MAX),
            kind: DIRTY_TRACKING,
            extra: Vec::new(),
            name: names::to_bytes(name).into_owned(),
        }
    }

    /// The name as text: up to the first zero byte.
    pub fn name(&self) -> Cow<'_, str> {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        Cow::Owned(names::to_text(self.name.get(..end).unwrap_or_default()))
    }

    /// The number of bytes that one bit represents. `None` if it does not fit in 64 bits.
    pub fn granularity(&self) -> Option<u64> {
        1_u64.checked_shl(self.granularity_bits.into())
    }

    /// Bytes in the bitmap table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Why the bitmap cannot be used, with the text of QEMU's tools. `None` if the entry has no fault.
    pub fn fault(&self, geometry: Geometry) -> Option<String> {
        if !self.extra.is_empty() && !self.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE) {
            return Some("Bitmap extra data is not supported".to_owned());
        }
        let known = BitmapFlags::IN_USE | BitmapFlags::AUTO | BitmapFlags::EXTRA_DATA_COMPATIBLE;
        let fits = (MIN_GRANULARITY..=MAX_GRANULARITY).contains(&self.granularity().unwrap_or(0))
            && (1..=MAX_NAME).contains(&self.name.len())
            && !self.name.starts_with(&[0])
            && known.contains(self.flags)
            && (!self.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE) || !self.extra.is_empty())
            && self.kind == DIRTY_TRACKING
            && (1..=MAX_TABLE_ENTRIES).contains(&self.table_entries)
            && u64::from(self.table_entries).saturating_mul(geometry.cluster_size())
                <= MAX_BITMAP_BYTES
            && self.table_offset != 0
            && geometry.is_aligned(self.table_offset)
            && self.table_offset <= OFFSET;
        (!fits).then(|| format!("Bitmap '{}' doesn't satisfy the constraints", self.name()))
    }

    /// Length of the entry in the directory in bytes, including padding.
    pub fn encoded_len(&self) -> u64 {
        let len = size_of::<RawEntry>() + self.extra.len() + self.name.len();
        u64::try_from(len.next_multiple_of(8)).unwrap_or(u64::MAX)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawEntry {
            table_offset: self.table_offset.into(),
            table_entries: self.table_entries.into(),
            flags: self.flags.bits().into(),
            kind: self.kind,
            granularity_bits: self.granularity_bits,
            write_size: u16::try_from(self.name.len()).unwrap_or(u16::MAX).into(),
            extra_size: u32::try_from(self.extra.len()).unwrap_or(u32::MAX).into(),
        };
        out.extend(raw.as_bytes());
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// The entry at the start of `bytes`, and the bytes behind the entry. `None` if `bytes` is too short.
    fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (raw, rest) = RawEntry::read_from_prefix(bytes).ok()?;
        let extra_size = usize::try_from(raw.extra_size.get()).ok()?;
        let (extra, rest) = rest.split_at_checked(extra_size)?;
        let (name, _) = rest.split_at_checked(raw.write_size.get().into())?;
        let entry = Self {
            table_offset: raw.table_offset.get(),
            table_entries: raw.table_entries.get(),
            flags: BitmapFlags::from_bits_retain(raw.flags.get()),
            granularity_bits: raw.granularity_bits,
            kind: raw.kind,
            extra: extra.to_vec(),
            name: name.to_vec(),
        };
        let len = usize::try_from(entry.encoded_len()).ok()?;
        Some((entry, bytes.get(len..)?))
    }
}

/// Reads a directory of `count` entries.
///
/// # Errors
/// When the directory is empty, the entry boundaries cannot be found, or the count is wrong. The text is the same as in QEMU's
/// tools.
pub fn parse_bitmap_directory(bytes: &[u8], count: u32) -> Result<Vec<BitmapEntry>> {
    if bytes.is_empty() {
        return Err(Error::invalid("Requested bitmap directory size is zero"));
    }
    let mut entries = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        if rest.len() < size_of::<RawEntry>() {
            return Err(Error::invalid("Broken bitmap directory"));
        }
        if u32::try_from(entries.len()).unwrap_or(u32::MAX) == count {
            return Err(Error::invalid("More bitmaps found than specified in header extension"));
        }
        let Some((entry, after)) = BitmapEntry::parse(rest) else {
            return Err(Error::invalid("Broken bitmap directory"));
        };
        entries.push(entry);
        rest = after;
    }
    if u32::try_from(entries.len()).unwrap_or(u32::MAX) < count {
        return Err(Error::invalid("Less bitmaps found than specified in header extension"));
    }
    Ok(entries)
}

/// Encodes the directory of these bitmaps.
pub fn encode_bitmap_directory<'a>(entries: impl Iterator<Item = &'a BitmapEntry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.for_each(|entry| entry.encode(&mut bytes));
    bytes
}

/// Size of the data of a bitmap over a disk of `size` bytes, in bytes.
pub fn bitmap_bytes(size: u64, granularity: u64) -> u64 {
    size.div_ceil(granularity.max(1)).div_ceil(8)
}

/// The contents or the location of a cluster of bitmap data ("Bitmap table").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapData {
    /// Not stored: all bits are zero.
    Zeroes,
    /// Not stored: all bits are one.
    Ones,
    /// In the cluster at this byte offset.
    At(u64),
}

/// An entry of a bitmap table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapTableEntry(pub u64);

impl BitmapTableEntry {
    /// The decoded entry.
    ///
    /// # Errors
    /// When a reserved bit is set or the offset is not aligned.
    pub fn data(self, geometry: Geometry) -> Result<BitmapData, BadEntry> {
        let offset = self.0 & OFFSET;
        let allowed = if offset == 0 { ONES } else { OFFSET };
        if self.0 & !allowed != 0 {
            return Err(BadEntry::Reserved(self.0));
        }
        if !geometry.is_aligned(offset) {
            return Err(BadEntry::Unaligned(offset));
        }
        Ok(match (offset, self.0) {
            (0, 0) => BitmapData::Zeroes,
            (0, _) => BitmapData::Ones,
            (offset, _) => BitmapData::At(offset),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };

    fn entry(name: &str) -> BitmapEntry {
        let mut entry = BitmapEntry::new(name, 65_536);
        entry.table_offset = 0x5_0000;
        entry.table_entries = 3;
        entry.flags = BitmapFlags::AUTO;
        entry
    }

    #[test]
    fn a_directory_survives_encoding_and_parsing() {
        let mut odd = entry("odd one");
        odd.extra = vec![7; 13];
        odd.flags = BitmapFlags::from_bits_retain(0xff00_0000);
        odd.kind = 9;
        let entries = [entry("a"), odd, entry(&"x".repeat(1023))];
        let bytes = encode_bitmap_directory(entries.iter());
        assert_eq!(bytes.len() as u64, entries.iter().map(BitmapEntry::encoded_len).sum::<u64>());
        assert_eq!(parse_bitmap_directory(&bytes, 3).unwrap(), entries);
        assert!(parse_bitmap_directory(&bytes, 2).unwrap_err().to_string().starts_with("More"));
        assert!(parse_bitmap_directory(&bytes, 4).unwrap_err().to_string().starts_with("Less"));
        for len in 1..bytes.len() {
            assert!(parse_bitmap_directory(&bytes[..len], 3).is_err(), "{len}");
        }
    }

    #[test]
    fn an_invalid_entry_is_reported_as_unusable() {
        assert_eq!(entry("b").fault(GEOMETRY), None);
        let broken: [fn(&mut BitmapEntry); 9] = [
            |entry| entry.table_offset = 0x5_0200,
            |entry| entry.table_offset = 0,
            |entry| entry.table_entries = 0,
            |entry| entry.table_entries = u32::MAX,
            |entry| entry.granularity_bits = 8,
            |entry| entry.granularity_bits = 200,
            |entry| entry.flags |= BitmapFlags::from_bits_retain(8),
            |entry| entry.kind = 2,
            |entry| entry.name.clear(),
        ];
        for (number, change) in broken.iter().enumerate() {
            let mut entry = entry("b");
            change(&mut entry);
            let fault = entry.fault(GEOMETRY).unwrap_or_else(|| panic!("{number}"));
            assert!(fault.ends_with("doesn't satisfy the constraints"), "{number}: {fault}");
        }
    }

    #[test]
    fn unknown_extra_data_is_accepted_only_with_the_compatible_flag() {
        let mut with_extra = entry("b");
        with_extra.extra = vec![0; 8];
        assert!(with_extra.fault(GEOMETRY).is_some());
        with_extra.flags |= BitmapFlags::EXTRA_DATA_COMPATIBLE;
        assert_eq!(with_extra.fault(GEOMETRY), None);
    }

    #[test]
    fn a_table_entry_is_an_offset_or_means_all_zeroes_or_all_ones() {
        let data = |entry| BitmapTableEntry(entry).data(GEOMETRY);
        assert_eq!(data(0), Ok(BitmapData::Zeroes));
        assert_eq!(data(1), Ok(BitmapData::Ones));
        assert_eq!(data(0x3_0000), Ok(BitmapData::At(0x3_0000)));
        for bad in [2, 0x3_0001, 0x3_0200, 1 << 60, (1 << 60) | 0x3_0000] {
            assert!(data(bad).is_err(), "{bad:x}");
        }
    }
}
