//! The image header: 512 bytes with little-endian fields. The parser makes all checks that need only the header and the
//! file size.
//!
//! The order of the checks is the same as in QEMU, so that an image with several faults gets the same message. The checks
//! that QEMU does not make come last.

use oxblk_core::{Error, ErrorKind, Result};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blocks::ENTRY_BYTES;

/// Length of the header in bytes.
pub const HEADER_BYTES: u64 = 512;
/// Bytes of a block, the unit of allocation.
pub const BLOCK: u64 = 1 << 20;
/// Maximum number of blocks of an image.
pub const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// Maximum virtual size in bytes.
pub const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK;

/// The magic number of vdi images.
pub(super) const SIGNATURE: u32 = 0xbeda_107f;
/// Byte offset of the magic number.
pub(super) const SIGNATURE_OFFSET: usize = 0x40;
/// Offset of the number of allocated blocks in the header.
pub(super) const ALLOCATED_OFFSET: u64 = 0x184;
pub(super) const SECTOR: u64 = 512;

const VERSION: u32 = 0x0001_0001;
/// Value of `header_size` in version 1.1: the number of bytes from the field `header_size` to the end of the last field.
const FIELDS_BYTES: u32 = 0x180;
const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

/// The header in its on-disk format.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    text: [u8; 64],
    signature: U32,
    version: U32,
    header_size: U32,
    image_type: U32,
    image_flags: U32,
    description: [u8; 256],
    map_offset: U32,
    data_offset: U32,
    cylinders: U32,
    heads: U32,
    sectors: U32,
    sector_size: U32,
    unused: U32,
    disk_size: U64,
    block_size: U32,
    block_extra: U32,
    blocks: U32,
    allocated: U32,
    uuid_image: [u8; 16],
    uuid_last_snapshot: [u8; 16],
    uuid_link: [u8; 16],
    uuid_parent: [u8; 16],
    rest: [u8; 56],
}

const _: () = {
    assert!(size_of::<RawHeader>() == 512);
    assert!(std::mem::offset_of!(RawHeader, signature) == SIGNATURE_OFFSET);
    assert!(std::mem::offset_of!(RawHeader, map_offset) == 0x154);
    assert!(std::mem::offset_of!(RawHeader, disk_size) == 0x170);
    assert!(std::mem::offset_of!(RawHeader, allocated) == 0x184);
    assert!(std::mem::offset_of!(RawHeader, uuid_parent) == 0x1b8);
};

/// The type of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageType {
    /// Blocks are allocated when they are written.
    Dynamic,
    /// All blocks were allocated when the image was created.
    Static,
    /// Another type. The layout of the image is the same for all types.
    Other(u32),
}

impl ImageType {
    fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Dynamic,
            2 => Self::Static,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Dynamic => 1,
            Self::Static => 2,
            Self::Other(other) => other,
        }
    }
}

/// A header that has been checked: the block map lies after the header and inside the file, and the blocks lie after the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The type of the image.
    pub image_type: ImageType,
    /// Byte offset of the block map; a multiple of 512.
    pub map_offset: u64,
    /// Byte offset of block 0; a multiple of 512.
    pub data_offset: u64,
    /// Virtual size in bytes; a multiple of 512.
    pub size: u64,
    /// Number of entries in the block map.
    pub blocks: u32,
    /// Number of allocated blocks. In a valid image, these are the first blocks of the file.
    pub allocated: u32,
    /// The UUIDs of the image and of its last snapshot (`uuid_image` and `uuid_last_snapshot`).
    pub uuids: [[u8; 16]; 2],
}

/// Whether a file that begins with these bytes is a vdi image.
pub(super) fn looks_like_vdi(head: &[u8]) -> bool {
    let bytes = head.get(SIGNATURE_OFFSET..).and_then(|rest| rest.first_chunk());
    bytes.is_some_and(|bytes| u32::from_le_bytes(*bytes) == SIGNATURE)
}

fn unsupported(what: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("unsupported VDI image ({what})"))
}

/// The error for an image whose size of `size` bytes is too large.
pub(super) fn too_large(size: u64) -> Error {
    Error::unsupported(format!(
        "Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"
    ))
}

impl Header {
    /// The header of a new image. The data area follows the map.
    pub(super) fn new(size: u64, blocks: u32, is_static: bool, uuids: [[u8; 16]; 2]) -> Self {
        let map_bytes = (u64::from(blocks) * ENTRY_BYTES).next_multiple_of(SECTOR);
        Self {
            image_type: if is_static { ImageType::Static } else { ImageType::Dynamic },
            map_offset: HEADER_BYTES,
            data_offset: HEADER_BYTES + map_bytes,
            size,
            blocks,
            allocated: if is_static { blocks } else { 0 },
            uuids,
        }
    }

    /// Parses the first bytes of a file of `file_size` bytes. If `bytes` is shorter than the header, the rest counts
    /// as zeroes.
    ///
    /// # Errors
    /// Fails if the image has an unsupported property, or its header is invalid.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self> {
        let mut whole = [0_u8; 512];
        for (to, from) in whole.iter_mut().zip(bytes) {
            *to = *from;
        }
        let raw = RawHeader::read_from_bytes(&whole)
            .map_err(|_| Error::corrupt("the VDI header is too short"))?;
        let disk_size = raw.disk_size.get();
        if disk_size > MAX_SIZE {
            return Err(too_large(disk_size));
        }
        let size = disk_size.next_multiple_of(SECTOR);
        let (blocks, map_offset) = (raw.blocks.get(), u64::from(raw.map_offset.get()));
        let data_offset = u64::from(raw.data_offset.get());
        if raw.signature.get() != SIGNATURE {
            let text =
                format!("Image not in VDI format (bad signature {:08x})", raw.signature.get());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let version = raw.version.get();
        if version != VERSION {
            return Err(unsupported(format_args!(
                "version {}.{}",
                version >> 16,
                version & 0xffff
            )));
        }
        if !map_offset.is_multiple_of(SECTOR) {
            return Err(unsupported(format_args!("unaligned block map offset {map_offset:#x}")));
        }
        if !data_offset.is_multiple_of(SECTOR) {
            return Err(unsupported(format_args!("unaligned data offset {data_offset:#x}")));
        }
        let sector_size = raw.sector_size.get();
        if u64::from(sector_size) != SECTOR {
            return Err(unsupported(format_args!("sector size {sector_size} is not {SECTOR}")));
        }
        let block_size = raw.block_size.get();
        if u64::from(block_size) != BLOCK {
            return Err(unsupported(format_args!("block size {block_size} is not {BLOCK}")));
        }
        let room = u64::from(blocks) * BLOCK;
        if size > room {
            return Err(unsupported(format_args!(
                "disk size {size}, image bitmap has room for {room}"
            )));
        }
        if raw.uuid_link != [0; 16] {
            return Err(unsupported("non-NULL link UUID"));
        }
        if raw.uuid_parent != [0; 16] {
            return Err(unsupported("non-NULL parent UUID"));
        }
        if blocks > MAX_BLOCKS {
            return Err(unsupported(format_args!("too many blocks {blocks}, max is {MAX_BLOCKS}")));
        }
        let header = Self {
            image_type: ImageType::from_number(raw.image_type.get()),
            map_offset,
            data_offset,
            size,
            blocks,
            allocated: raw.allocated.get(),
            uuids: [raw.uuid_image, raw.uuid_last_snapshot],
        };
        header.check_places(file_size)?;
        Ok(header)
    }

    /// Checks that the header, the block map and the blocks do not overlap, and that the file contains the complete
    /// map.
    fn check_places(&self, file_size: u64) -> Result<()> {
        if self.map_offset < HEADER_BYTES {
            return Err(unsupported(format_args!(
                "block map offset {:#x} within the header",
                self.map_offset
            )));
        }
        if self.data_offset < self.map_end() {
            return Err(unsupported(format_args!(
                "data offset {:#x} before the end of the block map, {:#x}",
                self.data_offset,
                self.map_end()
            )));
        }
        if self.map_end() > file_size {
            return Err(Error::corrupt(format!(
                "unsupported VDI image (block map up to {:#x}, but the file ends at {file_size:#x})",
                self.map_end()
            )));
        }
        Ok(())
    }

    /// Byte offset of the end of the block map.
    pub fn map_end(&self) -> u64 {
        self.map_offset + u64::from(self.blocks) * ENTRY_BYTES
    }

    /// Byte offset of a block; also the end of the previous block. The sum cannot overflow, because block numbers have 32
    /// bits.
    pub fn block_offset(&self, block: u32) -> u64 {
        self.data_offset + u64::from(block) * BLOCK
    }

    /// The header in its on-disk format, 512 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let [uuid_image, uuid_last_snapshot] = self.uuids;
        let place = |offset: u64| U32::new(u32::try_from(offset).unwrap_or(u32::MAX));
        let mut text = [0; 64];
        for (to, from) in text.iter_mut().zip(TEXT) {
            *to = *from;
        }
        let raw = RawHeader {
            text,
            signature: U32::new(SIGNATURE),
            version: U32::new(VERSION),
            header_size: U32::new(FIELDS_BYTES),
            image_type: U32::new(self.image_type.number()),
            image_flags: U32::ZERO,
            description: [0; 256],
            map_offset: place(self.map_offset),
            data_offset: place(self.data_offset),
            cylinders: U32::ZERO,
            heads: U32::ZERO,
            sectors: U32::ZERO,
            sector_size: place(SECTOR),
            unused: U32::ZERO,
            disk_size: U64::new(self.size),
            block_size: place(BLOCK),
            block_extra: U32::ZERO,
            blocks: U32::new(self.blocks),
            allocated: U32::new(self.allocated),
            uuid_image,
            uuid_last_snapshot,
            uuid_link: [0; 16],
            uuid_parent: [0; 16],
            rest: [0; 56],
        };
        raw.as_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Vec<u8> {
        Header::new(10 << 20, 10, false, [[1; 16], [2; 16]]).encode()
    }

    fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut header = good();
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
        header
    }

    #[test]
    fn an_encoded_header_parses_to_the_same_header() {
        let header = Header::new(3_500_032, 4, true, [[1; 16], [2; 16]]);
        assert_eq!(header.allocated, 4);
        assert_eq!(Header::parse(&header.encode(), 1024).unwrap(), header);
        assert!(looks_like_vdi(&good()));
        assert!(!looks_like_vdi(&good()[..66]));
    }

    #[test]
    fn a_size_that_is_not_whole_sectors_is_rounded_up() {
        let header = Header::parse(&with(0x170, &1000_u64.to_le_bytes()), 1024).unwrap();
        assert_eq!(header.size, 1024);
    }

    #[test]
    fn the_error_of_an_invalid_header_says_which_field_is_wrong() {
        let cases: [(usize, u64, usize, &str); 13] = [
            (0x40, 0, 4, "bad signature 00000000"),
            (0x44, 0x1_0002, 4, "version 1.2"),
            (0x154, 0x201, 4, "unaligned block map offset 0x201"),
            (0x154, 0, 4, "block map offset 0x0 within the header"),
            (0x158, 0x401, 4, "unaligned data offset 0x401"),
            (0x158, 0x200, 4, "data offset 0x200 before the end of the block map, 0x228"),
            (0x168, 4096, 4, "sector size 4096 is not 512"),
            (0x178, 1 << 21, 4, "block size 2097152 is not 1048576"),
            (0x180, 9, 4, "disk size 10485760, image bitmap has room for 9437184"),
            (0x180, 0x1fff_ff81, 4, "too many blocks 536870785, max is 536870784"),
            (0x170, u64::MAX, 8, "size is 0xffffffffffffffff, max supported is 0x1fffff8000000"),
            (0x1a8, 1, 4, "non-NULL link UUID"),
            (0x1b8, 1, 4, "non-NULL parent UUID"),
        ];
        for (offset, value, len, text) in cases {
            let error = Header::parse(&with(offset, &value.to_le_bytes()[..len]), 1 << 30);
            let error = error.expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
        let error = Header::parse(&good(), 551).unwrap_err().to_string();
        assert!(error.contains("block map up to 0x228, but the file ends at 0x227"), "{error}");
        assert!(Header::parse(&good(), 552).is_ok());
    }
}
