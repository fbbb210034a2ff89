//! Entries of L1 tables, L2 tables and the refcount table ("Cluster mapping", "Host cluster
//! management").
//!
//! An entry type wraps the raw number. The methods that return a checked offset of a cluster fail if this offset is not
//! aligned. Reserved bits of L1 entries and of standard L2 entries have no effect, as in QEMU; a check reports these bits. L2
//! entries are decoded on every request, so the common case takes only a few branches.

use std::fmt;

use super::Geometry;

/// Bit 63: the refcount of the cluster to which the entry points is exactly one.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9 to 55: the offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of an L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of a standard L2 entry.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Reserved bits of a refcount table entry.
const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;
/// Host offsets are below this number.
const MAX_OFFSET: u64 = 1 << 56;
/// The length of compressed data is stored in sectors of this many bytes.
const SECTOR: u64 = 512;

/// Why an entry is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadEntry {
    /// Bits that must be zero are set. Contains the entry.
    Reserved(u64),
    /// The offset is not a multiple of the cluster size. Contains the offset in bytes.
    Unaligned(u64),
    /// The zero flag is set in a version 2 image. Contains the entry.
    ZeroBeforeVersion3(u64),
    /// A subcluster is both allocated and zero, or it is allocated in an unallocated cluster. Contains the bitmap.
    Subclusters(u64),
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved(entry) => write!(f, "table entry with reserved bits set: {entry:x}"),
            Self::Unaligned(offset) => write!(f, "offset {offset:#x} unaligned"),
            Self::ZeroBeforeVersion3(entry) => {
                write!(f, "Zero cluster entry found in pre-v3 image ({entry:#x})")
            }
            Self::Subclusters(bitmap) => write!(f, "corrupted subcluster bitmap {bitmap:#x}"),
        }
    }
}

impl std::error::Error for BadEntry {}

/// An entry of an L1 table ("L1 table entry").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// No L2 table.
    pub const EMPTY: Self = Self(0);

    /// An entry for the L2 table at `offset`, with the copied flag set.
    pub fn new(offset: u64) -> Self {
        Self(offset & OFFSET | COPIED)
    }

    /// Byte offset of the L2 table, or `None` if there is none.
    ///
    /// # Errors
    /// When the offset is not aligned.
    #[inline]
    pub fn l2_offset(self, geometry: Geometry) -> Result<Option<u64>, BadEntry> {
        let offset = self.raw_offset();
        if !geometry.is_aligned(offset) {
            return Err(BadEntry::Unaligned(offset));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// The offset without checks: it may be unaligned. 0 means none.
    #[inline]
    pub fn raw_offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// The reserved bits that are set.
    pub fn reserved(self) -> u64 {
        self.0 & L1_RESERVED
    }

    /// The same entry for a table that has moved to `offset`.
    #[must_use]
    pub fn moved_to(self, offset: u64) -> Self {
        Self(self.0 & !OFFSET | offset & OFFSET)
    }

    /// Whether the copied flag is set: the refcount of the L2 table is exactly one.
    #[inline]
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }
}

/// The kind of a guest cluster, as its L2 entry describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Kind {
    /// Reads return the data of the backing file, or zeroes without a backing file.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// Byte offset of the preallocated host cluster, if there is one.
        host: Option<u64>,
    },
    /// Stored uncompressed.
    Data {
        /// Byte offset of the host cluster.
        host: u64,
    },
    /// Stored compressed.
    Compressed {
        /// Byte offset of the compressed data.
        host: u64,
        /// Bytes from `host` to the end of the last 512-byte sector used.
        len: u64,
    },
}

/// An entry of an L2 table ("L2 table entry").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct L2Entry(pub u64);

impl L2Entry {
    /// Unallocated.
    pub const EMPTY: Self = Self(0);

    /// Decodes the entry, in an image of `version`. For an extended entry, this decodes only the first word. `Data` then means
    /// that the cluster is allocated; all, some or none of its subclusters have data. `Zero` is never returned.
    ///
    /// # Errors
    /// When the entry is invalid; see [`BadEntry`].
    #[inline]
    pub fn kind(self, geometry: Geometry, version: u32) -> Result<L2Kind, BadEntry> {
        let host = self.raw_offset();
        let suspicious = COMPRESSED | ZERO | (geometry.cluster_size() - 1);
        if self.0 & suspicious == 0 {
            return Ok(if host != 0 || self.is_at_zero(geometry) {
                L2Kind::Data { host }
            } else {
                L2Kind::Unallocated
            });
        }
        self.unusual_kind(geometry, version)
    }

    fn unusual_kind(self, geometry: Geometry, version: u32) -> Result<L2Kind, BadEntry> {
        if self.is_compressed() {
            let (host, len) = self.compressed_extent(geometry);
            if host >= MAX_OFFSET {
                return Err(BadEntry::Reserved(self.0));
            }
            return Ok(L2Kind::Compressed { host, len });
        }
        // In an extended entry, the zero flag has no meaning: the bitmap says which subclusters read as zeroes.
        let zero = self.has_zero_flag() && !geometry.extended_l2;
        if zero && version < 3 {
            return Err(BadEntry::ZeroBeforeVersion3(self.0));
        }
        let host = self.raw_offset();
        if !geometry.is_aligned(host) {
            return Err(BadEntry::Unaligned(host));
        }
        Ok(match (zero, host) {
            (true, host) => L2Kind::Zero { host: (host != 0).then_some(host) },
            (false, 0) if !self.is_at_zero(geometry) => L2Kind::Unallocated,
            (false, host) => L2Kind::Data { host },
        })
    }

    /// Whether an offset of 0 is a valid cluster offset: only with a data file and the copied flag.
    #[inline]
    fn is_at_zero(self, geometry: Geometry) -> bool {
        geometry.data_file && self.copied()
    }

    /// Whether the copied flag is set: the refcount of the cluster is exactly one.
    #[inline]
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Whether the entry describes compressed data.
    #[inline]
    pub fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// Whether bit 0 is set. This bit has no meaning in entries of compressed clusters and in extended entries.
    pub fn has_zero_flag(self) -> bool {
        self.0 & ZERO != 0
    }

    /// The offset of a standard cluster without checks: it may be unaligned. 0 means none.
    #[inline]
    pub fn raw_offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// The reserved bits of a standard cluster's entry that are set.
    pub fn reserved(self) -> u64 {
        self.0 & L2_RESERVED
    }

    /// Byte offset and length of the compressed data, unchecked ("Compressed Clusters Descriptor").
    pub fn compressed_extent(self, geometry: Geometry) -> (u64, u64) {
        let offset_bits = compressed_offset_bits(geometry);
        let host = self.0 & ((1 << offset_bits) - 1);
        let sectors = ((self.0 & (COMPRESSED - 1)) >> offset_bits) + 1;
        (host, sectors * SECTOR - host % SECTOR)
    }

    /// An entry for the data cluster at `host`, with the copied flag set.
    pub fn data(host: u64) -> Self {
        Self(host & OFFSET | COPIED)
    }

    /// An entry that reads as zeroes, without a preallocated cluster. Version 3 only.
    pub fn zero_plain() -> Self {
        Self(ZERO)
    }

    /// An entry that reads as zeroes, with the preallocated cluster at `host` and the copied flag set. Version 3 only.
    pub fn zero_allocated(host: u64) -> Self {
        Self(host & OFFSET | COPIED | ZERO)
    }

    /// An entry for `len` bytes of compressed data at `host`. `None` if the entry cannot store this offset or length.
    pub fn compressed(geometry: Geometry, host: u64, len: u64) -> Option<Self> {
        let offset_bits = compressed_offset_bits(geometry);
        let last = host.checked_add(len.checked_sub(1)?)?;
        let more_sectors = (last / SECTOR).checked_sub(host / SECTOR)?;
        let fits = host < MAX_OFFSET.min(1 << offset_bits)
            && more_sectors < 1 << geometry.cluster_bits.checked_sub(8)?;
        fits.then_some(Self(COMPRESSED | more_sectors << offset_bits | host))
    }

    /// The same entry of a standard cluster that has moved to `host`.
    #[must_use]
    pub fn moved_to(self, host: u64) -> Self {
        Self(self.0 & !OFFSET | host & OFFSET)
    }

    /// The same entry with the copied flag set or cleared.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }
}

/// Number of bits of the offset in a compressed cluster's descriptor.
fn compressed_offset_bits(geometry: Geometry) -> u32 {
    62u32.saturating_sub(geometry.cluster_bits.saturating_sub(8)).clamp(1, 61)
}

/// An entry of the refcount table ("Refcount table entry").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Byte offset of the refcount block, or `None` if there is none.
    ///
    /// # Errors
    /// When a reserved bit is set or the offset is not aligned.
    pub fn block_offset(self, geometry: Geometry) -> Result<Option<u64>, BadEntry> {
        if self.reserved() != 0 {
            return Err(BadEntry::Reserved(self.0));
        }
        let offset = self.raw_offset();
        if !geometry.is_aligned(offset) {
            return Err(BadEntry::Unaligned(offset));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// The offset without checks: it may be unaligned. 0 means none.
    pub fn raw_offset(self) -> u64 {
        self.0 & !REFCOUNT_TABLE_RESERVED
    }

    /// The reserved bits that are set.
    pub fn reserved(self) -> u64 {
        self.0 & REFCOUNT_TABLE_RESERVED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K64: Geometry =
        Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };

    #[test]
    fn standard_entries_decode_to_their_kind_and_offset() {
        assert_eq!(L2Entry::EMPTY.kind(K64, 3), Ok(L2Kind::Unallocated));
        assert_eq!(L2Entry::data(0x5_0000).kind(K64, 3), Ok(L2Kind::Data { host: 0x5_0000 }));
        assert!(L2Entry::data(0x5_0000).copied());
        assert_eq!(L2Entry::zero_plain().kind(K64, 3), Ok(L2Kind::Zero { host: None }));
        let allocated = L2Entry::zero_allocated(0x5_0000);
        assert_eq!(allocated.kind(K64, 3), Ok(L2Kind::Zero { host: Some(0x5_0000) }));
        assert_eq!(L1Entry::new(0x3_0000).l2_offset(K64), Ok(Some(0x3_0000)));
        assert_eq!(L1Entry::EMPTY.l2_offset(K64), Ok(None));
    }

    #[test]
    fn reserved_bits_have_no_effect_and_every_unaligned_offset_is_refused() {
        for bit in (1..9).chain(56..62) {
            let entry = L2Entry(0x5_0000 | COPIED | 1 << bit);
            assert_eq!(entry.kind(K64, 3), Ok(L2Kind::Data { host: 0x5_0000 }), "bit {bit}");
            assert_ne!(entry.reserved(), 0, "bit {bit}");
            assert_eq!(L2Entry(1 << bit).kind(K64, 3), Ok(L2Kind::Unallocated), "bit {bit}");
        }
        for bit in (0..9).chain(56..63) {
            let entry = L1Entry(0x5_0000 | COPIED | 1 << bit);
            assert_eq!(entry.l2_offset(K64), Ok(Some(0x5_0000)), "bit {bit}");
            assert_ne!(entry.reserved(), 0, "bit {bit}");
        }
        for bit in 9..16 {
            assert!(L2Entry(0x5_0000 | COPIED | 1 << bit).kind(K64, 3).is_err(), "bit {bit}");
            assert!(L1Entry(0x5_0000 | COPIED | 1 << bit).l2_offset(K64).is_err(), "bit {bit}");
        }
        for bit in 0..16 {
            assert!(RefcountTableEntry(0x5_0000 | 1 << bit).block_offset(K64).is_err());
        }
        assert_eq!(RefcountTableEntry(1 << 63).block_offset(K64), Ok(Some(1 << 63)));
    }

    #[test]
    fn offset_0_is_a_cluster_only_with_a_data_file() {
        let entry = L2Entry::data(0);
        assert_eq!(entry.kind(K64, 3), Ok(L2Kind::Unallocated));
        let apart = Geometry { data_file: true, ..K64 };
        assert_eq!(entry.kind(apart, 3), Ok(L2Kind::Data { host: 0 }));
        assert_eq!(L2Entry::EMPTY.kind(apart, 3), Ok(L2Kind::Unallocated));
    }

    #[test]
    fn the_zero_flag_is_refused_in_version_2() {
        let entry = L2Entry::zero_plain();
        assert_eq!(entry.kind(K64, 2), Err(BadEntry::ZeroBeforeVersion3(1)));
    }

    #[test]
    fn compressed_extents_decode_rounded_up_to_whole_sectors() {
        for cluster_bits in 9..=21 {
            let geometry =
                Geometry { cluster_bits, refcount_order: 4, extended_l2: false, data_file: false };
            let cluster = geometry.cluster_size();
            for (host, len) in
                [(512, 1), (1000, 24), (1000, 25), (513, cluster), (1023, cluster - 1)]
            {
                let entry = L2Entry::compressed(geometry, host, len).unwrap();
                let end = (host + len).next_multiple_of(512);
                let expect = L2Kind::Compressed { host, len: end - host };
                assert_eq!(entry.kind(geometry, 2), Ok(expect), "{cluster_bits} {host} {len}");
                assert!(!entry.copied());
            }
            assert_eq!(L2Entry::compressed(geometry, 0, 0), None);
            assert_eq!(L2Entry::compressed(geometry, 0, 2 * cluster + 1), None);
            assert_eq!(L2Entry::compressed(geometry, 1 << 56, 1), None);
        }
    }

    #[test]
    fn compressed_offsets_above_56_bits_are_refused() {
        let small =
            Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false, data_file: false };
        assert!(L2Entry(COMPRESSED | 1 << 56).kind(small, 3).is_err());
    }
}
