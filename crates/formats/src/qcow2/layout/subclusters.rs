//! Extended L2 entries ("Extended L2 Entries"): a standard entry, and a bitmap of the cluster's subclusters.
//!
//! A cluster has 32 subclusters. Each subcluster is allocated (its data lies in the host cluster), zero, or unallocated (it
//! reads as the backing file). A subcluster can be zero or unallocated whether or not the entry has a host cluster. The bitmap
//! of a compressed cluster has no meaning.

use super::{BadEntry, Geometry, L2Entry, L2Kind};

/// Subclusters in a cluster.
pub const SUBCLUSTERS: u32 = 32;

/// The kind of a subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subcluster {
    /// Reads return the data of the backing file, or zeroes without a backing file.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Stored at its place in the host cluster.
    Data,
}

/// The second word of an extended entry. Bits 0 to 31 mark the allocated subclusters. Bits 32 to 63 mark the subclusters that
/// read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subclusters(pub u64);

impl Subclusters {
    /// No subcluster is allocated or zero.
    pub const NONE: Self = Self(0);
    /// All subclusters are allocated.
    pub const DATA: Self = Self(0xffff_ffff);
    /// All subclusters are zero.
    pub const ZERO: Self = Self(0xffff_ffff << SUBCLUSTERS);

    /// The allocated subclusters. The first subcluster is the lowest bit.
    #[inline]
    pub fn allocated(self) -> u32 {
        u32::try_from(self.0 & Self::DATA.0).unwrap_or(0)
    }

    /// The subclusters that read as zeroes. The first subcluster is the lowest bit.
    #[inline]
    pub fn zero(self) -> u32 {
        u32::try_from(self.0 >> SUBCLUSTERS).unwrap_or(0)
    }

    /// Whether a subcluster is marked both as allocated and as zero.
    #[inline]
    pub fn is_contradictory(self) -> bool {
        self.allocated() & self.zero() != 0
    }

    /// The same bitmap with the subclusters of `mask` allocated.
    #[must_use]
    pub fn with_data(self, mask: u32) -> Self {
        let mask = u64::from(mask);
        Self((self.0 | mask) & !(mask << SUBCLUSTERS))
    }

    /// The same bitmap with the subclusters of `mask` reading as zeroes.
    #[must_use]
    pub fn with_zero(self, mask: u32) -> Self {
        let mask = u64::from(mask);
        Self((self.0 | mask << SUBCLUSTERS) & !mask)
    }

    /// The same bitmap without allocated subclusters.
    #[must_use]
    pub fn without_data(self) -> Self {
        Self(self.0 & Self::ZERO.0)
    }

    /// The kind of the subcluster at `index`, and the number of subclusters of the same kind from there on (at least one). The
    /// run does not extend past the end of the cluster.
    #[inline]
    pub fn run(self, index: u32) -> (Subcluster, u32) {
        let index = index % SUBCLUSTERS;
        let allocated = self.allocated() >> index;
        let zero = (self.zero() & !self.allocated()) >> index;
        if allocated & 1 == 1 {
            (Subcluster::Data, allocated.trailing_ones())
        } else if zero & 1 == 1 {
            (Subcluster::Zero, zero.trailing_ones())
        } else {
            let count = (allocated | zero).trailing_zeros();
            (Subcluster::Unallocated, count.min(SUBCLUSTERS - index))
        }
    }

    /// The mask of the subclusters that the byte range `from..to` of a cluster touches.
    pub fn touched_by(geometry: Geometry, from: u64, to: u64) -> u32 {
        let bits = geometry.subcluster_bits();
        let first = u32::try_from(from >> bits).unwrap_or(SUBCLUSTERS);
        let end = u32::try_from(to.div_ceil(1 << bits)).unwrap_or(SUBCLUSTERS);
        below(end) & !below(first)
    }
}

/// The mask of the subclusters before `index`.
fn below(index: u32) -> u32 {
    1_u32.checked_shl(index).map_or(u32::MAX, |bit| bit.wrapping_sub(1))
}

/// Both words of an extended L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExtendedEntry {
    /// The first word.
    pub entry: L2Entry,
    /// The second word.
    pub bitmap: Subclusters,
}

impl ExtendedEntry {
    /// Unallocated.
    pub const EMPTY: Self = Self { entry: L2Entry::EMPTY, bitmap: Subclusters::NONE };
    /// Reads as zeroes, without a preallocated cluster.
    pub const ZERO: Self = Self { entry: L2Entry::EMPTY, bitmap: Subclusters::ZERO };

    /// An entry for a cluster with all subclusters allocated, or for a compressed cluster.
    pub fn whole(entry: L2Entry) -> Self {
        let bitmap = if entry.is_compressed() { Subclusters::NONE } else { Subclusters::DATA };
        Self { entry, bitmap }
    }

    /// The kind of the cluster; never `Zero`. If the cluster is not compressed, the bitmap describes its subclusters.
    ///
    /// # Errors
    /// When the entry is invalid; see [`BadEntry`].
    #[inline]
    pub fn kind(self, geometry: Geometry) -> Result<L2Kind, BadEntry> {
        let kind = self.entry.kind(geometry, 3)?;
        let bad = match kind {
            L2Kind::Unallocated => self.bitmap.allocated() != 0,
            L2Kind::Compressed { .. } => false,
            L2Kind::Data { .. } | L2Kind::Zero { .. } => self.bitmap.is_contradictory(),
        };
        if bad { Err(BadEntry::Subclusters(self.bitmap.0)) } else { Ok(kind) }
    }
}

/// The entries of an L2 table, or of a part of one, from big-endian bytes. The bitmap of a standard entry is empty.
pub fn l2_table(bytes: &[u8], geometry: Geometry) -> impl Iterator<Item = ExtendedEntry> {
    let size = if geometry.extended_l2 { 16 } else { 8 };
    bytes.chunks_exact(size).map(|entry| {
        let word = |at: usize| {
            let word = entry.get(at..).and_then(|rest| rest.first_chunk::<8>());
            word.map_or(0, |word| u64::from_be_bytes(*word))
        };
        ExtendedEntry { entry: L2Entry(word(0)), bitmap: Subclusters(word(8)) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const K64: Geometry =
        Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true, data_file: false };

    fn entry(entry: L2Entry, bitmap: u64) -> ExtendedEntry {
        ExtendedEntry { entry, bitmap: Subclusters(bitmap) }
    }

    #[test]
    fn runs_end_where_the_kind_changes_or_the_cluster_ends() {
        let bitmap = Subclusters(0x0000_0070_8000_000f);
        assert_eq!(bitmap.run(0), (Subcluster::Data, 4));
        assert_eq!(bitmap.run(3), (Subcluster::Data, 1));
        assert_eq!(bitmap.run(4), (Subcluster::Zero, 3));
        assert_eq!(bitmap.run(7), (Subcluster::Unallocated, 24));
        assert_eq!(bitmap.run(31), (Subcluster::Data, 1));
        assert_eq!(Subclusters::NONE.run(5), (Subcluster::Unallocated, 27));
        assert_eq!(Subclusters::DATA.run(0), (Subcluster::Data, 32));
        assert_eq!(Subclusters::ZERO.run(31), (Subcluster::Zero, 1));
    }

    #[test]
    fn a_subcluster_is_never_both_allocated_and_zero() {
        let bitmap = Subclusters::ZERO.with_data(0xff).with_zero(0x0f);
        assert_eq!((bitmap.allocated(), bitmap.zero()), (0xf0, 0xffff_ff0f));
        assert!(!bitmap.is_contradictory());
    }

    #[test]
    fn a_byte_range_touches_every_subcluster_that_it_overlaps() {
        let touched = |from, to| Subclusters::touched_by(K64, from, to);
        assert_eq!(touched(0, 1), 1);
        assert_eq!(touched(2047, 2049), 3);
        assert_eq!(touched(2048, 4096), 2);
        assert_eq!(touched(0, 65536), u32::MAX);
        assert_eq!(touched(63488, 65536), 1 << 31);
        assert_eq!(touched(4096, 4096), 0);
    }

    #[test]
    fn contradictory_bitmaps_are_refused_except_for_compressed_clusters() {
        let data = L2Entry::data(0x5_0000);
        assert_eq!(
            entry(data, 0x00ff_0000_00ff).kind(K64),
            Err(BadEntry::Subclusters(0x00ff_0000_00ff))
        );
        assert_eq!(entry(data, 0xff00).kind(K64), Ok(L2Kind::Data { host: 0x5_0000 }));
        assert_eq!(entry(L2Entry::EMPTY, 1).kind(K64), Err(BadEntry::Subclusters(1)));
        assert_eq!(entry(L2Entry::EMPTY, 1 << 32).kind(K64), Ok(L2Kind::Unallocated));
        let packed = L2Entry::compressed(K64, 0x5_0000, 700).unwrap();
        assert!(matches!(entry(packed, u64::MAX).kind(K64), Ok(L2Kind::Compressed { .. })));
    }

    #[test]
    fn bit_0_of_the_first_word_has_no_meaning() {
        let flagged = L2Entry(L2Entry::data(0x5_0000).0 | 1);
        assert_eq!(entry(flagged, 1).kind(K64), Ok(L2Kind::Data { host: 0x5_0000 }));
        assert_eq!(entry(L2Entry(1), 0).kind(K64), Ok(L2Kind::Unallocated));
    }

    #[test]
    fn l2_table_returns_the_entries_in_order() {
        let bytes: Vec<u8> = [1_u64, 2, 3, 4].iter().flat_map(|word| word.to_be_bytes()).collect();
        let wide: Vec<_> = l2_table(&bytes, K64).collect();
        assert_eq!(wide, [entry(L2Entry(1), 2), entry(L2Entry(3), 4)]);
        let narrow = l2_table(&bytes, Geometry { extended_l2: false, ..K64 });
        assert_eq!(narrow.map(|entry| entry.entry.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }
}
