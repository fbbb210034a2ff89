//! The footer: 512 bytes at the end of every image, with a copy at the beginning of a dynamic image.

use oxblk_core::{Errno, Error, Options, Result};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;

/// Length of the footer in bytes.
pub const FOOTER_BYTES: u64 = 512;
/// Maximum virtual size in bytes: 2040 GiB.
pub const MAX_SIZE: u64 = 0xff00_0000 * SECTOR;
pub(super) const SECTOR: u64 = 512;

const COOKIE: [u8; 8] = *b"conectix";
/// The feature bit that must be set in every image.
const FEATURES: u32 = 2;
const VERSION: u32 = 0x1_0000;
/// Seconds from 1970 to 2000. A time stamp of a footer is the number of seconds since 2000.
const YEAR_2000: u64 = 946_684_800;
/// Creator applications that compute the size of the disk from the geometry.
const CREATORS_BY_GEOMETRY: [[u8; 4]; 2] = [*b"vpc ", *b"qemu"];

/// The footer in its on-disk format.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    time_stamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    disk_type: U32,
    checksum: U32,
    uuid: [u8; 16],
    saved_state: u8,
    rest: [u8; 427],
}

const _: () = {
    assert!(size_of::<RawFooter>() == 512);
    assert!(std::mem::offset_of!(RawFooter, cylinders) == 56);
    assert!(std::mem::offset_of!(RawFooter, checksum) == 64);
};

/// The type of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// The data of the disk lies at the beginning of the file.
    Fixed,
    /// Blocks are allocated when they are written.
    Dynamic,
    /// Blocks that are not allocated are read from a parent image.
    Differencing,
    /// Another type. An image of another type is treated as a dynamic image.
    Other(u32),
}

impl DiskType {
    fn from_number(number: u32) -> Self {
        match number {
            2 => Self::Fixed,
            3 => Self::Dynamic,
            4 => Self::Differencing,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
            Self::Other(other) => other,
        }
    }
}

/// The field of the footer that contains the size of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SizeRule {
    /// Like `Geometry` if the creator is "vpc " (Virtual PC) or "qemu" (QEMU without `force_size`). Otherwise like
    /// `CurrentSize`.
    #[default]
    ByCreator,
    /// The geometry. For the largest geometry, the current size.
    Geometry,
    /// The current size.
    CurrentSize,
}

impl SizeRule {
    /// Takes the option `force_size_calc`.
    ///
    /// # Errors
    /// When the value of the option is neither `chs` nor `current_size`.
    pub(super) fn take(options: &mut Options) -> Result<Option<Self>> {
        match options.take_str("force_size_calc")?.as_deref() {
            None => Ok(None),
            Some("chs") => Ok(Some(Self::Geometry)),
            Some("current_size") => Ok(Some(Self::CurrentSize)),
            Some(name) => Err(Error::invalid(format!("Invalid size calculation mode: '{name}'"))),
        }
    }
}

/// Reasons why 512 bytes are not a valid footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// The cookie is missing.
    Cookie,
    /// The checksum is wrong. The type is the one in the footer.
    Checksum(DiskType),
}

/// The ones' complement of the sum of all bytes of a structure without its checksum. `field` is the checksum that `bytes`
/// contains.
pub(super) fn checksum(bytes: &[u8], field: u32) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
    !sum(bytes).wrapping_sub(sum(&field.to_be_bytes()))
}

/// A footer whose cookie and checksum are correct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer(RawFooter);

/// Whether a file that begins with these bytes is a dynamic vpc image.
pub(super) fn looks_like_vpc(head: &[u8]) -> bool {
    head.starts_with(&COOKIE)
}

/// Properties of a new image that are stored in its footer.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewFooter {
    pub(super) disk_type: DiskType,
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// `None`: the size does not depend on the geometry, as with `force_size`.
    pub(super) geometry: Option<Geometry>,
    /// Byte offset of the header of a dynamic image.
    pub(super) header_offset: u64,
    /// Seconds since 1970.
    pub(super) time: u64,
    pub(super) uuid: [u8; 16],
}

impl Footer {
    /// Parses a footer. If `bytes` is shorter than a footer, the rest counts as zeroes.
    ///
    /// # Errors
    /// Fails if the cookie or the checksum is wrong.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, Invalid> {
        let mut whole = [0_u8; 512];
        for (to, from) in whole.iter_mut().zip(bytes) {
            *to = *from;
        }
        let raw = RawFooter::read_from_bytes(&whole).map_err(|_| Invalid::Cookie)?;
        if raw.cookie != COOKIE {
            return Err(Invalid::Cookie);
        }
        if raw.checksum.get() != checksum(&whole, raw.checksum.get()) {
            return Err(Invalid::Checksum(DiskType::from_number(raw.disk_type.get())));
        }
        Ok(Self(raw))
    }

    /// The footer of a new image, with the creator names that QEMU writes. Programs decide by the creator name which field
    /// contains the size.
    pub(super) fn new(new: NewFooter) -> Self {
        let geometry = new.geometry.unwrap_or(Geometry::LARGEST);
        let time = new.time.saturating_sub(YEAR_2000);
        let mut raw = RawFooter {
            cookie: COOKIE,
            features: U32::new(FEATURES),
            version: U32::new(VERSION),
            data_offset: U64::new(new.header_offset),
            time_stamp: U32::new(u32::try_from(time).unwrap_or(u32::MAX)),
            creator: if new.geometry.is_some() { *b"qemu" } else { *b"qem2" },
            creator_version: U32::new(0x5_0003),
            creator_os: *b"Wi2k",
            original_size: U64::new(new.size),
            current_size: U64::new(new.size),
            cylinders: U16::new(geometry.cylinders),
            heads: geometry.heads,
            sectors: geometry.sectors,
            disk_type: U32::new(new.disk_type.number()),
            checksum: U32::ZERO,
            uuid: new.uuid,
            saved_state: 0,
            rest: [0; 427],
        };
        raw.checksum = U32::new(checksum(raw.as_bytes(), 0));
        Self(raw)
    }

    /// The footer in its on-disk format, 512 bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.0.as_bytes().to_vec()
    }

    /// The type of the image.
    pub fn disk_type(&self) -> DiskType {
        DiskType::from_number(self.0.disk_type.get())
    }

    /// Byte offset of the header of a dynamic image.
    pub fn header_offset(&self) -> u64 {
        self.0.data_offset.get()
    }

    /// Whether the creator is "tap" (XenServer). Such an image may have more metadata after its BAT.
    pub(super) fn is_by_xen(&self) -> bool {
        self.0.creator == *b"tap\0"
    }

    /// The virtual size in bytes, a multiple of 512.
    ///
    /// # Errors
    /// `EFBIG` if the size is larger than `MAX_SIZE`.
    pub fn size(&self, rule: SizeRule) -> Result<u64> {
        let raw = &self.0;
        let (cylinders, heads, sectors) = (raw.cylinders.get(), raw.heads, raw.sectors);
        let geometry = Geometry { cylinders, heads, sectors };
        let by_geometry = match rule {
            SizeRule::ByCreator => CREATORS_BY_GEOMETRY.contains(&raw.creator),
            SizeRule::Geometry => true,
            SizeRule::CurrentSize => false,
        };
        let current = raw.current_size.get() / SECTOR * SECTOR;
        // Every disk that is larger than the largest geometry has this geometry. The size of such a disk is in the field for
        // the current size.
        let size = match by_geometry && geometry != Geometry::LARGEST {
            true => geometry.product() * SECTOR,
            false => current,
        };
        if size > MAX_SIZE {
            return Err(Error::from_errno(Errno::FBIG));
        }
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(geometry: Option<Geometry>) -> Footer {
        Footer::new(NewFooter {
            disk_type: DiskType::Dynamic,
            size: 10 << 20,
            geometry,
            header_offset: 512,
            time: 1_796_025_624,
            uuid: [7; 16],
        })
    }

    fn with(offset: usize, bytes: &[u8]) -> Footer {
        let mut footer = new(Some(Geometry::holding(20480))).encode();
        footer[offset..offset + bytes.len()].copy_from_slice(bytes);
        let old = u32::from_be_bytes(footer[64..68].try_into().unwrap());
        let sum = checksum(&footer, old);
        footer[64..68].copy_from_slice(&sum.to_be_bytes());
        Footer::parse(&footer).unwrap()
    }

    #[test]
    fn an_encoded_footer_parses_to_the_same_footer() {
        let footer = new(None);
        let bytes = footer.encode();
        assert_eq!(Footer::parse(&bytes), Ok(footer));
        assert_eq!(footer.size(SizeRule::ByCreator).unwrap(), 10 << 20);
        assert_eq!((footer.disk_type(), footer.header_offset()), (DiskType::Dynamic, 512));
        assert_eq!(Footer::parse(&bytes[1..]), Err(Invalid::Cookie));
        assert_eq!(Footer::parse(&[]), Err(Invalid::Cookie));
        let mut wrong = bytes;
        wrong[400] = 1;
        assert_eq!(Footer::parse(&wrong), Err(Invalid::Checksum(DiskType::Dynamic)));
    }

    #[test]
    fn the_creator_decides_which_field_contains_the_size() {
        let chs = 302 * 4 * 17 * 512;
        let size = |creator: &[u8; 4], rule| {
            let mut with_size = with(28, creator).encode();
            with_size[48..56].copy_from_slice(&(11_u64 << 20).to_be_bytes());
            let raw = RawFooter::read_from_bytes(&with_size).unwrap();
            Footer(raw).size(rule).unwrap()
        };
        for creator in [b"vpc ", b"qemu"] {
            assert_eq!(size(creator, SizeRule::ByCreator), chs);
            assert_eq!(size(creator, SizeRule::CurrentSize), 11 << 20);
        }
        // QEMU with force_size, Virtual Server, Hyper-V, Disk2vhd, Azure, XenServer.
        for creator in [b"qem2", b"vs  ", b"win ", b"d2v\0", b"wa\0\0", b"tap\0", b"CTXS"] {
            assert_eq!(size(creator, SizeRule::ByCreator), 11 << 20);
            assert_eq!(size(creator, SizeRule::Geometry), chs);
        }
    }

    #[test]
    fn the_largest_geometry_and_sizes_beyond_the_limit() {
        let largest = with(56, &[0xff, 0xff, 16, 255]);
        assert_eq!(largest.size(SizeRule::Geometry).unwrap(), 302 * 4 * 17 * 512 - 28672);
        for (size, fits) in [(MAX_SIZE, true), (MAX_SIZE + 511, true), (MAX_SIZE + 512, false)] {
            let footer = with(48, &size.to_be_bytes());
            assert_eq!(footer.size(SizeRule::CurrentSize).is_ok(), fits, "{size}");
        }
    }
}
