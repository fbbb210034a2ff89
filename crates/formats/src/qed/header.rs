//! The image header: 64 bytes with little-endian fields, and the name of the backing file. The parser makes all checks that
//! need only the header and the file size.
//!
//! Spec: docs/interop/qed_spec of QEMU, section "Header". After the parser's checks, products of the sizes in a [`Header`] fit
//! in 64 bits, and the L1 table lies inside the file.

use oxblk_core::{Error, ErrorKind, MAX_LENGTH, Result};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of the fixed part of the header in bytes.
pub const HEADER_BYTES: u64 = 64;
/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 8;
/// Maximum length of the name of a backing file, in bytes.
pub const MAX_NAME: usize = 4095;

/// Byte offset of the header field with the feature bits.
pub(super) const FEATURES_OFFSET: u64 = 16;
/// Byte offset of the header field with the autoclear feature bits.
pub(super) const AUTOCLEAR_OFFSET: u64 = 32;

pub(super) const SECTOR: u64 = 512;
const MAGIC: &[u8; 4] = b"QED\0";
/// Limits of the cluster size, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=26;
/// Maximum number of clusters of a table.
const MAX_TABLE_CLUSTERS: u32 = 16;

const HAS_BACKING: u64 = 1;
const NEED_CHECK: u64 = 2;
const BACKING_IS_RAW: u64 = 4;
const KNOWN_FEATURES: u64 = HAS_BACKING | NEED_CHECK | BACKING_IS_RAW;

/// The fixed part in its on-disk format.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    cluster_size: U32,
    table_size: U32,
    header_size: U32,
    features: U64,
    compat_features: U64,
    autoclear_features: U64,
    l1_table_offset: U64,
    image_size: U64,
    backing_offset: U32,
    backing_size: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == 64);
    assert!(std::mem::offset_of!(RawHeader, features) == 16);
    assert!(std::mem::offset_of!(RawHeader, autoclear_features) == 32);
    assert!(std::mem::offset_of!(RawHeader, image_size) == 48);
};

/// The sizes of clusters and tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// A cluster has `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// Number of clusters of a table: 1, 2, 4, 8 or 16.
    pub table_clusters: u32,
}

impl Geometry {
    /// Creates a geometry with these sizes. Returns an error if a size is not permitted.
    pub fn new(cluster_size: u64, table_clusters: u64) -> Result<Self, BadGeometry> {
        let bits = cluster_size.trailing_zeros();
        if !cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return Err(BadGeometry::Cluster);
        }
        match u32::try_from(table_clusters) {
            Ok(clusters @ 1..=MAX_TABLE_CLUSTERS) if clusters.is_power_of_two() => {
                Ok(Self { cluster_bits: bits, table_clusters: clusters })
            }
            _ => Err(BadGeometry::Table),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_clusters) << self.cluster_bits
    }

    /// Number of entries of a table: at most 2^27.
    pub fn table_entries(&self) -> u64 {
        self.table_bytes() / ENTRY_BYTES
    }

    /// Bytes of the disk that an L2 table maps: at most 2^53.
    pub fn table_reach(&self) -> u64 {
        self.table_entries() << self.cluster_bits
    }

    /// Maximum size of a disk in bytes.
    pub fn max_size(&self) -> u64 {
        self.table_reach().saturating_mul(self.table_entries()).min(MAX_LENGTH)
    }

    /// Number of L1 entries that the largest disk needs.
    pub fn l1_entries(&self) -> u64 {
        self.max_size().div_ceil(self.table_reach()).min(self.table_entries())
    }

    /// The index of the cluster that contains the byte at `offset` of the disk or of the file.
    pub fn index(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// The first byte of the cluster that contains `offset`.
    pub fn start(&self, offset: u64) -> u64 {
        offset & !(self.cluster() - 1)
    }

    /// `offset`, rounded up to a multiple of the cluster size.
    pub fn end(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.cluster()).unwrap_or(u64::MAX)
    }

    /// The offset inside the cluster that contains `offset`.
    pub fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }

    /// Whether a cluster begins at `offset`.
    pub fn is_aligned(&self, offset: u64) -> bool {
        self.within(offset) == 0
    }
}

/// Says which size is not permitted in a [`Geometry`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadGeometry {
    /// The cluster size.
    Cluster,
    /// The table size.
    Table,
}

/// A header that has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The sizes of clusters and tables.
    pub geometry: Geometry,
    /// Number of clusters of the header. No table or data lies in these clusters.
    pub header_clusters: u32,
    /// The image was changed and was not closed cleanly after that, so its tables must be checked.
    pub need_check: bool,
    /// Feature bits that a program may ignore if it does not know them.
    pub compat_features: u64,
    /// Feature bits. A program that writes to the image must clear each bit that it does not know.
    pub autoclear_features: u64,
    /// Byte offset of the L1 table.
    pub l1_offset: u64,
    /// Virtual size in bytes; a multiple of 512.
    pub size: u64,
    /// The reference to the backing file.
    pub backing: Option<BackingName>,
}

/// The reference to the backing file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Byte offset of the name.
    pub offset: u32,
    /// Length of the name in bytes, at most [`MAX_NAME`].
    pub len: u32,
    /// The backing file is a raw image. Its format must not be probed.
    pub is_raw: bool,
}

/// Whether a file that begins with these bytes is a QED image.
pub(super) fn looks_like_qed(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

impl Header {
    /// Parses the first bytes of a file of `file_size` bytes.
    ///
    /// # Errors
    /// Fails if the file is not a QED image, if the image has an unsupported feature, or if its header is invalid.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self> {
        let not_qed = || Error::invalid("Image not in QED format");
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| not_qed())?;
        if !looks_like_qed(bytes) {
            return Err(not_qed());
        }
        let features = raw.features.get();
        if features & !KNOWN_FEATURES != 0 {
            let text = format!("Unsupported QED features: {:x}", features & !KNOWN_FEATURES);
            return Err(Error::unsupported(text));
        }
        let geometry = Geometry::new(raw.cluster_size.get().into(), raw.table_size.get().into());
        let geometry = geometry.map_err(|bad| match bad {
            BadGeometry::Cluster => Error::invalid("QED cluster size is invalid"),
            BadGeometry::Table => Error::invalid("QED table size is invalid"),
        })?;
        let size = raw.image_size.get();
        if !size.is_multiple_of(SECTOR) || size > geometry.max_size() {
            return Err(Error::invalid("QED image size is invalid"));
        }
        let mut header = Self {
            geometry,
            header_clusters: raw.header_size.get(),
            need_check: features & NEED_CHECK != 0,
            compat_features: raw.compat_features.get(),
            autoclear_features: raw.autoclear_features.get(),
            l1_offset: raw.l1_table_offset.get(),
            size,
            backing: None,
        };
        let l1_end = header.l1_offset.checked_add(geometry.table_bytes());
        if !geometry.is_aligned(header.l1_offset)
            || header.l1_offset < header.first_cluster()
            || l1_end.is_none_or(|end| end > file_size)
        {
            return Err(Error::invalid("QED table offset is invalid"));
        }
        if features & HAS_BACKING != 0 {
            header.backing = header.backing_name(&raw, features & BACKING_IS_RAW != 0)?;
        }
        Ok(header)
    }

    fn backing_name(&self, raw: &RawHeader, is_raw: bool) -> Result<Option<BackingName>> {
        let (offset, len) = (raw.backing_offset.get(), raw.backing_size.get());
        if len == 0 {
            return Ok(None);
        }
        let end = u64::from(offset).saturating_add(len.into());
        if end > self.first_cluster() || usize::try_from(len).is_ok_and(|len| len > MAX_NAME) {
            return Err(Error::invalid("QED backing filename is invalid"));
        }
        Ok(Some(BackingName { offset, len, is_raw }))
    }

    /// Byte offset of the first cluster that can store a table or data. The first cluster of the file always belongs to
    /// the header.
    pub fn first_cluster(&self) -> u64 {
        // The result is below 2^58.
        u64::from(self.header_clusters.max(1)) << self.geometry.cluster_bits
    }

    /// Byte offset of the end of the L1 table.
    pub fn l1_end(&self) -> u64 {
        self.l1_offset.saturating_add(self.geometry.table_bytes())
    }

    /// The value of the field `features`.
    pub(super) fn features(&self) -> u64 {
        let backing = match &self.backing {
            Some(BackingName { is_raw: true, .. }) => HAS_BACKING | BACKING_IS_RAW,
            Some(_) => HAS_BACKING,
            None => 0,
        };
        backing | if self.need_check { NEED_CHECK } else { 0 }
    }

    /// The fixed part in its on-disk format.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawHeader {
            magic: *MAGIC,
            cluster_size: U32::new(1 << self.geometry.cluster_bits),
            table_size: U32::new(self.geometry.table_clusters),
            header_size: U32::new(self.header_clusters),
            features: U64::new(self.features()),
            compat_features: U64::new(self.compat_features),
            autoclear_features: U64::new(self.autoclear_features),
            l1_table_offset: U64::new(self.l1_offset),
            image_size: U64::new(self.size),
            backing_offset: U32::new(self.backing.as_ref().map_or(0, |name| name.offset)),
            backing_size: U32::new(self.backing.as_ref().map_or(0, |name| name.len)),
        };
        raw.as_bytes().to_vec()
    }
}

/// Checks the length of the name of a backing file before the name is stored.
///
/// # Errors
/// Fails if the name is too long.
pub(super) fn check_name(name: &str) -> Result<()> {
    if name.len() > MAX_NAME {
        return Err(Error::new(ErrorKind::NoSpace, "Backing file name too long"));
    }
    Ok(())
}

/// The meaning of an entry of an L1 or L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing is allocated.
    Unallocated,
    /// The cluster reads as zeroes (L2 entries only).
    Zero,
    /// A table or a data cluster begins at this offset of the file.
    At(u64),
    /// The entry is invalid.
    Bad,
}

/// The value of an L2 entry of a zero cluster.
pub(super) const ZERO_ENTRY: u64 = 1;

/// The meaning of an L2 entry in a file of `file_end` bytes. Tables and data lie at offset `first` or higher. A data
/// cluster must begin inside the file, but the file may end inside the cluster.
pub fn data_entry(geometry: Geometry, first: u64, entry: u64, file_end: u64) -> Entry {
    match entry {
        0 => Entry::Unallocated,
        ZERO_ENTRY => Entry::Zero,
        offset if geometry.is_aligned(offset) && (first..file_end).contains(&offset) => {
            Entry::At(offset)
        }
        _ => Entry::Bad,
    }
}

/// The meaning of an L1 entry. The parameters are the same as for [`data_entry`]. The complete table must lie inside the file.
pub fn table_entry(geometry: Geometry, first: u64, entry: u64, file_end: u64) -> Entry {
    let is_inside = |offset: u64| {
        let end = offset.checked_add(geometry.table_bytes());
        offset >= first && end.is_some_and(|end| end <= file_end)
    };
    match entry {
        0 => Entry::Unallocated,
        offset if geometry.is_aligned(offset) && is_inside(offset) => Entry::At(offset),
        _ => Entry::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 5 << 16;

    fn good() -> Header {
        Header {
            geometry: Geometry::new(1 << 16, 4).unwrap(),
            header_clusters: 1,
            need_check: false,
            compat_features: 0,
            autoclear_features: 0,
            l1_offset: 1 << 16,
            size: 64 << 20,
            backing: None,
        }
    }

    #[test]
    fn an_encoded_header_parses_to_the_same_header() {
        let backing = Some(BackingName { offset: 64, len: 8, is_raw: true });
        for header in [good(), Header { backing, need_check: true, ..good() }] {
            assert_eq!(Header::parse(&header.encode(), FILE).unwrap(), header);
        }
    }

    #[test]
    fn the_error_of_an_invalid_header_says_which_field_is_wrong() {
        let cases: [(usize, u64, usize, &str); 14] = [
            (0, 0, 4, "Image not in QED format"),
            (4, 5000, 4, "QED cluster size is invalid"),
            (4, 2048, 4, "QED cluster size is invalid"),
            (4, 1 << 27, 4, "QED cluster size is invalid"),
            (8, 0, 4, "QED table size is invalid"),
            (8, 3, 4, "QED table size is invalid"),
            (8, 32, 4, "QED table size is invalid"),
            (12, 2, 4, "QED table offset is invalid"),
            (16, 8, 8, "Unsupported QED features: 8"),
            (40, 0x123, 8, "QED table offset is invalid"),
            (40, 2 << 16, 8, "QED table offset is invalid"),
            (40, u64::MAX << 16, 8, "QED table offset is invalid"),
            (48, 100, 8, "QED image size is invalid"),
            (48, 65 << 40, 8, "QED image size is invalid"),
        ];
        for (offset, value, len, text) in cases {
            let mut bytes = good().encode();
            bytes[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
            let error = Header::parse(&bytes, FILE).expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_backing_file_name_lies_in_the_header() {
        for (offset, len, fits) in [(64, 10, true), (65000, 600, false), (64, 4096, false)] {
            let backing = Some(BackingName { offset, len, is_raw: false });
            let bytes = Header { backing, ..good() }.encode();
            assert_eq!(Header::parse(&bytes, FILE).is_ok(), fits, "{offset} {len}");
        }
    }

    #[test]
    fn sizes_of_every_geometry_fit_in_64_bits() {
        for bits in CLUSTER_BITS {
            for clusters in [1, 2, 4, 8, 16] {
                let geometry = Geometry::new(1 << bits, clusters).unwrap();
                assert!(geometry.max_size() <= MAX_LENGTH);
                let reach = u128::from(geometry.l1_entries()) * u128::from(geometry.table_reach());
                assert!(reach >= u128::from(geometry.max_size()));
            }
        }
        assert_eq!(Geometry::new(1 << 12, 1).unwrap().max_size(), 1 << 30);
    }

    #[test]
    fn entries_outside_the_file_or_not_aligned_are_bad() {
        let (geometry, first) = (good().geometry, good().first_cluster());
        let data = |entry| data_entry(geometry, first, entry, FILE);
        let table = |entry| table_entry(geometry, first, entry, FILE);
        assert_eq!(data(0), Entry::Unallocated);
        assert_eq!(data(1), Entry::Zero);
        assert_eq!(data(4 << 16), Entry::At(4 << 16));
        assert_eq!(table(1 << 16), Entry::At(1 << 16));
        for bad in [2, 0x123, 5 << 16, u64::MAX] {
            assert_eq!(data(bad), Entry::Bad, "{bad:#x}");
        }
        for bad in [1, 2 << 16, u64::MAX << 16] {
            assert_eq!(table(bad), Entry::Bad, "{bad:#x}");
        }
    }
}
