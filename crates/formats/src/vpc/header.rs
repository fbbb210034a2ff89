//! The header of a dynamic image: 1024 bytes. The footer contains its offset. The parser makes all checks that need only
//! the header, the disk size and the file size. The checks that QEMU also makes come first, with the messages of QEMU.

use oxblk_core::{Error, ErrorKind, Result};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{FOOTER_BYTES, SECTOR, checksum};
use crate::blocks::ENTRY_BYTES;

/// Length of the header in bytes.
pub const HEADER_BYTES: u64 = 1024;
/// Size of the blocks of new images in bytes.
pub const NEW_BLOCK: u64 = 2 << 20;

const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x1_0000;
const CHECKSUM_OFFSET: usize = 36;
/// Maximum number of entries of a BAT.
const MAX_ENTRIES: u32 = 0x1fff_ffff;

/// The header in its on-disk format.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
struct RawHeader {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    entries: U32,
    block_size: U32,
    checksum: U32,
    parent_uuid: [u8; 16],
    parent_time_stamp: U32,
    reserved: U32,
    parent_name: [u8; 512],
    parent_locators: [[u8; 24]; 8],
    rest: [u8; 256],
}

const _: () = {
    assert!(size_of::<RawHeader>() == 1024);
    assert!(std::mem::offset_of!(RawHeader, checksum) == CHECKSUM_OFFSET);
    assert!(std::mem::offset_of!(RawHeader, parent_locators) == 576);
};

/// A header that has been checked: the copy of the footer, the header, and the part of the BAT that the disk needs do not
/// overlap, and the file contains the header and this part of the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    raw: RawHeader,
    /// Byte offset of the header.
    pub offset: u64,
    /// Number of blocks of the disk. The BAT has at least this number of entries.
    pub blocks: u32,
}

impl Header {
    /// The header of a new image of `size` bytes, directly after the copy of the footer.
    pub(super) fn new(size: u64) -> Self {
        let blocks = u32::try_from(size.div_ceil(NEW_BLOCK)).unwrap_or(u32::MAX);
        let mut raw = RawHeader {
            cookie: COOKIE,
            data_offset: U64::new(u64::MAX),
            table_offset: U64::new(FOOTER_BYTES + HEADER_BYTES),
            version: U32::new(VERSION),
            entries: U32::new(blocks),
            block_size: U32::new(u32::try_from(NEW_BLOCK).unwrap_or(0)),
            checksum: U32::ZERO,
            parent_uuid: [0; 16],
            parent_time_stamp: U32::ZERO,
            reserved: U32::ZERO,
            parent_name: [0; 512],
            parent_locators: [[0; 24]; 8],
            rest: [0; 256],
        };
        raw.checksum = U32::new(checksum(raw.as_bytes(), 0));
        Self { raw, offset: FOOTER_BYTES, blocks }
    }

    /// Parses the header at `offset` of a file of `file_size` bytes, for a disk of `size` bytes. If `bytes` is
    /// shorter than the header, the rest counts as zeroes.
    ///
    /// # Errors
    /// Fails if the header is invalid, or if the file ends before the end of the header or of the BAT.
    pub fn parse(bytes: &[u8], offset: u64, size: u64, file_size: u64) -> Result<Self> {
        let mut whole = [0_u8; 1024];
        for (to, from) in whole.iter_mut().zip(bytes) {
            *to = *from;
        }
        let raw = RawHeader::read_from_bytes(&whole)
            .map_err(|_| Error::corrupt("the VHD header is too short"))?;
        let invalid = |text: String| Error::new(ErrorKind::Invalid, text);
        if raw.cookie != COOKIE {
            return Err(invalid("Invalid header magic".to_owned()));
        }
        let block_size = raw.block_size.get();
        let block = u64::from(block_size);
        if !block_size.is_power_of_two() || block < SECTOR {
            return Err(invalid(format!("Invalid block size {block_size}")));
        }
        let entries = raw.entries.get();
        if entries > MAX_ENTRIES {
            return Err(invalid(format!("Max Table Entries too large ({entries})")));
        }
        let blocks = u32::try_from(size.div_ceil(block)).unwrap_or(u32::MAX);
        if blocks > entries {
            return Err(invalid("Page table too small".to_owned()));
        }
        let header = Self { raw, offset, blocks };
        header.check_places(file_size)?;
        Ok(header)
    }

    fn check_places(&self, file_size: u64) -> Result<()> {
        let table = self.table_offset();
        let needed = u64::from(self.blocks).saturating_mul(ENTRY_BYTES);
        let (header_end, table_end) = (self.end(), table.saturating_add(needed));
        if self.offset < FOOTER_BYTES {
            let text = format!("Header offset {:#x} within the copy of the footer", self.offset);
            return Err(Error::corrupt(text));
        }
        if table < FOOTER_BYTES || table < header_end && table_end > self.offset {
            let text = format!("Block table offset {table:#x} within the footer or the header");
            return Err(Error::corrupt(text));
        }
        if header_end > file_size || table_end > file_size {
            return Err(Error::corrupt(format!(
                "The image has been truncated: its metadata ends at {:#x}, but the file at {file_size:#x}",
                header_end.max(table_end)
            )));
        }
        Ok(())
    }

    /// Byte offset of the BAT.
    pub fn table_offset(&self) -> u64 {
        self.raw.table_offset.get()
    }

    /// Number of entries of the BAT. The disk may need fewer.
    pub fn entries(&self) -> u32 {
        self.raw.entries.get()
    }

    /// Bytes of the data of a block: a power of two, at least 512.
    pub fn block(&self) -> u64 {
        self.raw.block_size.get().into()
    }

    /// Bytes of the sector bitmap of a block: whole sectors.
    pub fn bitmap(&self) -> u64 {
        (self.block() / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// Bytes of a block in the file: the sector bitmap and the data.
    pub fn stride(&self) -> u64 {
        self.bitmap() + self.block()
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(HEADER_BYTES)
    }

    /// Byte offset of the end of the BAT with all of its entries. The length of the BAT is rounded up to a multiple of 512.
    pub fn table_end(&self) -> u64 {
        let bytes = u64::from(self.entries()) * ENTRY_BYTES;
        self.table_offset().saturating_add(bytes.next_multiple_of(SECTOR))
    }

    /// Byte offset of the end of the header and the BAT, rounded up to a multiple of 512.
    pub fn metadata_end(&self) -> u64 {
        let end = self.end().max(self.table_end());
        end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX)
    }

    /// Whether a byte range of the file overlaps the copy of the footer, the header, or the part of the BAT that the
    /// disk needs.
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        let needed = u64::from(self.blocks).saturating_mul(ENTRY_BYTES);
        let table = self.table_offset();
        let places =
            [(0, FOOTER_BYTES), (self.offset, self.end()), (table, table.saturating_add(needed))];
        places.iter().any(|(from, to)| start < *to && end > *from)
    }

    /// Whether the checksum is correct. QEMU does not check it.
    pub fn has_correct_checksum(&self) -> bool {
        let field = self.raw.checksum.get();
        field == checksum(self.raw.as_bytes(), field)
    }

    /// The header in its on-disk format, 1024 bytes, with the correct checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = self.raw;
        raw.checksum = U32::new(checksum(raw.as_bytes(), raw.checksum.get()));
        raw.as_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 10 << 20;

    fn with(offset: usize, value: u64, len: usize) -> Vec<u8> {
        let mut header = Header::new(SIZE).encode();
        header[offset..offset + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        header
    }

    #[test]
    fn an_encoded_header_parses_to_the_same_header() {
        let header = Header::new(SIZE);
        assert_eq!((header.blocks, header.entries(), header.block()), (5, 5, 2 << 20));
        assert_eq!((header.bitmap(), header.stride()), (512, (2 << 20) + 512));
        assert_eq!((header.table_offset(), header.metadata_end()), (0x600, 0x800));
        assert_eq!(Header::parse(&header.encode(), 512, SIZE, 2560).unwrap(), header);
        assert!(header.has_correct_checksum());
    }

    #[test]
    fn a_header_with_a_wrong_checksum_parses_and_the_checksum_is_reported_as_wrong() {
        let header = Header::parse(&with(1000, 1, 1), 512, SIZE, 2560).unwrap();
        assert!(!header.has_correct_checksum());
        let again = Header::parse(&header.encode(), 512, SIZE, 2560).unwrap();
        assert!(again.has_correct_checksum());
    }

    #[test]
    fn the_bitmap_of_a_small_block_takes_a_sector() {
        let small = Header::parse(&with(32, 512, 4), 512, 512, 2560).unwrap();
        assert_eq!((small.bitmap(), small.stride()), (512, 1024));
        let large = Header::parse(&with(32, 1 << 31, 4), 512, SIZE, 2560).unwrap();
        assert_eq!(large.bitmap(), 512 << 10);
    }

    #[test]
    fn the_error_of_an_invalid_header_says_which_field_is_wrong() {
        let cases: [(usize, u64, usize, &str); 13] = [
            (0, 0, 1, "Invalid header magic"),
            (32, 0, 4, "Invalid block size 0"),
            (32, 256, 4, "Invalid block size 256"),
            (32, 3 << 20, 4, "Invalid block size 3145728"),
            (32, u64::from(u32::MAX), 4, "Invalid block size 4294967295"),
            (32, 1 << 20, 4, "Page table too small"),
            (28, 4, 4, "Page table too small"),
            (28, 0x2000_0000, 4, "Max Table Entries too large (536870912)"),
            (16, 0, 8, "Block table offset 0x0 within the footer or the header"),
            (16, 0x5ff, 8, "Block table offset 0x5ff within the footer or the header"),
            (16, 0x5fd, 8, "Block table offset 0x5fd within the footer or the header"),
            (16, u64::MAX, 8, "The image has been truncated"),
            (16, 2541, 8, "metadata ends at 0xa01, but the file at 0xa00"),
        ];
        for (offset, value, len, text) in cases {
            let error = Header::parse(&with(offset, value, len), 512, SIZE, 2560);
            let error = error.expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
        let header = Header::new(SIZE).encode();
        for offset in [0, 511, u64::MAX, 2000] {
            assert!(Header::parse(&header, offset, SIZE, 2560).is_err(), "{offset}");
        }
    }
}
