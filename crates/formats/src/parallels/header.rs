//! The image header: 64 bytes with little-endian fields. The parser makes all checks that need only the header and the file
//! size.
//!
//! Spec: docs/interop/parallels of QEMU, section "Header".

use oxblk_core::Errno;
use oxblk_core::{Error, ErrorKind, Result};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blocks::ENTRY_BYTES;

/// Length of the header in bytes. The BAT follows the header.
pub const HEADER_BYTES: u64 = 64;
/// Maximum number of entries of the BAT.
pub const MAX_ENTRIES: u32 = 0x1fff_ffff;

pub(super) const SECTOR: u64 = 512;
/// Value of the field `in_use` of an image that a program has open for writing, or has not closed cleanly.
pub(super) const IN_USE: u32 = 0x746f_6e59;
/// Byte offset of the field `in_use` in the header.
pub(super) const IN_USE_OFFSET: u64 = 44;
/// Byte offset of the field `data_off` in the header.
pub(super) const DATA_OFF_OFFSET: u64 = 48;

const MAGIC: &[u8; 16] = b"WithoutFreeSpace";
const MAGIC_EXT: &[u8; 16] = b"WithouFreSpacExt";
const VERSION: u32 = 2;
/// Maximum number of sectors of a cluster.
const MAX_TRACKS: u32 = 0x7fff_ffff / 513;
/// Geometry of new images.
const HEADS: u32 = 16;
const SECTORS_PER_TRACK: u64 = 32;

/// The header in its on-disk format.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 16],
    version: U32,
    heads: U32,
    cylinders: U32,
    tracks: U32,
    entries: U32,
    sectors: U64,
    in_use: U32,
    data_off: U32,
    flags: U32,
    ext_off: U64,
}

const _: () = {
    assert!(size_of::<RawHeader>() == 64);
    assert!(std::mem::offset_of!(RawHeader, in_use) == 44);
    assert!(std::mem::offset_of!(RawHeader, data_off) == 48);
};

/// A header that has been checked: the file contains the complete BAT, and the clusters lie after the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The unit of BAT entries is a cluster (true) or a sector (false).
    pub extended: bool,
    /// Length of a cluster in bytes; a multiple of 512.
    pub cluster: u64,
    /// Number of entries in the BAT.
    pub entries: u32,
    /// Virtual size in bytes; a multiple of 512.
    pub size: u64,
    /// The field `in_use` is set: a program has the image open for writing, or has not closed the image cleanly.
    pub in_use: bool,
    /// Byte offset of the first cluster.
    pub data_offset: u64,
    /// Whether the field `data_off` of the header on disk is valid (in the old format, 0 is valid). If not, `data_offset` was
    /// computed.
    pub data_offset_is_valid: bool,
    /// The image has a format extension.
    pub has_extension: bool,
}

/// Whether a file that begins with these bytes is a parallels image.
pub(super) fn looks_like_parallels(head: &[u8]) -> bool {
    let version = head.get(16..).and_then(|rest| rest.first_chunk());
    (head.starts_with(MAGIC) || head.starts_with(MAGIC_EXT))
        && version.is_some_and(|bytes| u32::from_le_bytes(*bytes) == VERSION)
}

fn invalid(text: &'static str) -> Error {
    Error::invalid(text)
}

fn multiple(number: u64, of: u64) -> u64 {
    number.checked_next_multiple_of(of).unwrap_or(u64::MAX)
}

impl Header {
    /// The header of a new image.
    pub(super) fn new(size: u64, cluster: u64, entries: u32) -> Self {
        let mut header = Self {
            extended: true,
            cluster,
            entries,
            size,
            in_use: false,
            data_offset: 0,
            data_offset_is_valid: true,
            has_extension: false,
        };
        header.data_offset = header.least_data_offset();
        header
    }

    /// Parses the first bytes of a file of `file_size` bytes.
    ///
    /// # Errors
    /// Fails if the file is not a parallels image, if the image has an unsupported property, or if its header is invalid.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self> {
        let not_parallels = || invalid("Image not in Parallels format");
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| not_parallels())?;
        if !looks_like_parallels(bytes) {
            return Err(not_parallels());
        }
        let extended = raw.magic == *MAGIC_EXT;
        let (tracks, entries) = (raw.tracks.get(), raw.entries.get());
        if tracks == 0 {
            return Err(invalid("Invalid image: Zero sectors per track"));
        }
        if tracks > MAX_TRACKS {
            return Err(invalid("Invalid image: Too big cluster"));
        }
        if entries > MAX_ENTRIES {
            return Err(Error::new(ErrorKind::Invalid, "Catalog too large").errno(Errno::FBIG));
        }
        let sectors = raw.sectors.get();
        let sectors = if extended { sectors } else { sectors & 0xffff_ffff };
        let size = sectors.checked_mul(SECTOR).filter(|size| i64::try_from(*size).is_ok());
        let size = size.ok_or_else(|| {
            let text = "Could not refresh total sector count: File too large";
            Error::new(ErrorKind::Invalid, text).errno(Errno::FBIG)
        })?;
        let mut header = Self {
            extended,
            cluster: u64::from(tracks) * SECTOR,
            entries,
            size,
            in_use: raw.in_use.get() == IN_USE,
            data_offset: u64::from(raw.data_off.get()) * SECTOR,
            data_offset_is_valid: true,
            has_extension: raw.ext_off.get() != 0,
        };
        if header.table_end() > file_size {
            return Err(Error::corrupt(format!(
                "Invalid image: BAT up to {:#x}, but the file ends at {file_size:#x}",
                header.table_end()
            )));
        }
        let least = header.least_data_offset();
        let stored = header.data_offset;
        let fits = stored >= least
            && stored / SECTOR <= file_size / SECTOR
            && (!extended || stored.is_multiple_of(header.cluster));
        if !fits {
            header.data_offset = least;
            header.data_offset_is_valid = stored == 0 && !extended;
        }
        Ok(header)
    }

    /// Byte offset of the end of the BAT.
    pub fn table_end(&self) -> u64 {
        HEADER_BYTES + u64::from(self.entries) * ENTRY_BYTES
    }

    /// The lowest offset after the BAT at which the first cluster may begin.
    fn least_data_offset(&self) -> u64 {
        let end = multiple(self.table_end(), SECTOR);
        if self.extended { multiple(end, self.cluster) } else { end }
    }

    /// The unit of BAT entries in bytes.
    fn unit(&self) -> u64 {
        if self.extended { self.cluster } else { SECTOR }
    }

    /// The byte offset in the file to which a BAT entry other than 0 refers.
    pub fn host(&self, entry: u32) -> u64 {
        // The product is below 2^63: an entry has 32 bits, and the unit is below 2^31.
        u64::from(entry) * self.unit()
    }

    /// Byte offset of a cluster of the data area; also the end of the previous cluster.
    pub fn cluster_offset(&self, index: u32) -> u64 {
        // Both summands are below 2^63.
        self.data_offset.saturating_add(u64::from(index) * self.cluster)
    }

    /// The cluster of the data area that begins at offset `host` of the file, if one begins there.
    pub fn cluster_index(&self, host: u64) -> Option<u32> {
        let within = host.checked_sub(self.data_offset)?;
        if !within.is_multiple_of(self.cluster) {
            return None;
        }
        u32::try_from(within / self.cluster).ok()
    }

    /// The BAT entry that refers to a cluster of the data area. `None` if the offset does not fit in an entry.
    pub fn entry(&self, index: u32) -> Option<u32> {
        u32::try_from(self.cluster_offset(index) / self.unit()).ok()
    }

    /// Number of clusters of the data area whose offsets fit in a BAT entry.
    pub(super) fn max_clusters(&self) -> u32 {
        let nameable = (u64::from(u32::MAX) * self.unit()).saturating_sub(self.data_offset);
        u32::try_from(nameable / self.cluster).unwrap_or(u32::MAX)
    }

    /// The header in its on-disk format, 64 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let low = |number: u64| U32::new(u32::try_from(number).unwrap_or(u32::MAX));
        let sectors = self.size / SECTOR;
        let raw = RawHeader {
            magic: if self.extended { *MAGIC_EXT } else { *MAGIC },
            version: U32::new(VERSION),
            heads: U32::new(HEADS),
            cylinders: low(sectors / u64::from(HEADS) / SECTORS_PER_TRACK),
            tracks: low(self.cluster / SECTOR),
            entries: U32::new(self.entries),
            sectors: U64::new(sectors),
            in_use: U32::new(if self.in_use { IN_USE } else { 0 }),
            data_off: low(self.data_offset / SECTOR),
            flags: U32::ZERO,
            ext_off: U64::ZERO,
        };
        raw.as_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 64 << 20;

    fn good() -> Vec<u8> {
        Header::new(10 << 20, 1 << 20, 10).encode()
    }

    fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut header = good();
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
        header
    }

    #[test]
    fn an_encoded_header_parses_to_the_same_header() {
        for (cluster, entries) in [(1 << 20, 10), (1024, 9000), (63 * 512, 400)] {
            let header = Header::new(9000 << 10, cluster, entries);
            assert_eq!(Header::parse(&header.encode(), FILE).unwrap(), header);
            assert!(header.data_offset >= header.table_end());
            assert_eq!(header.cluster_index(header.cluster_offset(7)), Some(7));
            assert_eq!(header.host(header.entry(7).unwrap()), header.cluster_offset(7));
        }
    }

    #[test]
    fn the_error_of_an_invalid_header_says_which_field_is_wrong() {
        let cases: [(usize, u64, usize, &str); 8] = [
            (0, 0, 4, "Image not in Parallels format"),
            (16, 3, 4, "Image not in Parallels format"),
            (28, 0, 4, "Invalid image: Zero sectors per track"),
            (28, 0x3f_ffff, 4, "Invalid image: Too big cluster"),
            (32, 0x2000_0000, 4, "Catalog too large"),
            (36, u64::MAX, 8, "File too large"),
            (36, 1 << 54, 8, "File too large"),
            (32, 0x1000_0000, 4, "BAT up to 0x40000040, but the file ends at 0x4000000"),
        ];
        for (offset, value, len, text) in cases {
            let error = Header::parse(&with(offset, &value.to_le_bytes()[..len]), FILE);
            let error = error.expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_wrong_data_offset_is_replaced() {
        for wrong in [0_u32, 1, 0x10, 0x801, 0xffff_fff0] {
            let header = Header::parse(&with(48, &wrong.to_le_bytes()), FILE).unwrap();
            assert_eq!((header.data_offset, header.data_offset_is_valid), (1 << 20, false));
        }
        let mut old = with(48, &[0; 4]);
        old[..16].copy_from_slice(MAGIC);
        let header = Header::parse(&old, FILE).unwrap();
        assert_eq!((header.data_offset, header.data_offset_is_valid), (512, true));
        assert_eq!(header.host(3), 3 * 512);
    }
}
