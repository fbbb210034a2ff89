//! Sizes that are computed from the cluster size and the widths of table entries.

/// Cluster size and widths of an image's table entries, and whether the image has a data file. [`super::Header::parse`] only
/// creates values within the format's limits. The arithmetic below does not panic for other values either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Binary logarithm of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// Binary logarithm of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// L2 entries are 128 bits wide and describe subclusters ("Extended L2 Entries").
    pub extended_l2: bool,
    /// Guest data lies in a separate data file, at its guest offset.
    pub data_file: bool,
}

impl Geometry {
    /// Binary logarithm of the minimum cluster size in bytes.
    pub const MIN_CLUSTER_BITS: u32 = 9;
    /// Binary logarithm of the maximum cluster size in bytes.
    pub const MAX_CLUSTER_BITS: u32 = 21;
    /// Binary logarithm of the maximum refcount width in bits.
    pub const MAX_REFCOUNT_ORDER: u32 = 6;
    /// Binary logarithm of the minimum cluster size of an image with subclusters, in bytes.
    pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;

    /// Bytes per cluster.
    #[inline]
    pub fn cluster_size(self) -> u64 {
        1 << (self.cluster_bits & 63)
    }

    /// 64-bit words of an L2 entry.
    #[inline]
    pub fn l2_entry_words(self) -> u64 {
        1 << u32::from(self.extended_l2)
    }

    /// Bytes of an L2 entry.
    #[inline]
    pub fn l2_entry_size(self) -> u64 {
        8 << u32::from(self.extended_l2)
    }

    /// Number of entries of an L2 table. The table fills one cluster.
    #[inline]
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Binary logarithm of [`Self::l2_entries`].
    #[inline]
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits.saturating_sub(3 + u32::from(self.extended_l2))
    }

    /// Binary logarithm of [`Self::subcluster_size`].
    #[inline]
    pub fn subcluster_bits(self) -> u32 {
        if self.extended_l2 { self.cluster_bits.saturating_sub(5) } else { self.cluster_bits }
    }

    /// Bytes per subcluster. Without extended L2 entries, this is the cluster size.
    #[inline]
    pub fn subcluster_size(self) -> u64 {
        1 << (self.subcluster_bits() & 63)
    }

    /// Binary logarithm of the guest bytes that one L2 table maps.
    #[inline]
    pub fn l1_shift(self) -> u32 {
        self.cluster_bits.saturating_add(self.l2_bits())
    }

    /// Bits per refcount.
    #[inline]
    pub fn refcount_bits(self) -> u32 {
        1 << (self.refcount_order & 31)
    }

    /// Number of refcounts in a refcount block. The block fills one cluster.
    #[inline]
    pub fn refcounts_per_block(self) -> u64 {
        (self.cluster_size() << 3) >> (self.refcount_order & 63)
    }

    /// Number of L1 entries that map `size` bytes. `None` if the number exceeds `i32::MAX`. QEMU refuses an image of this size.
    pub fn l1_entries_for(self, size: u64) -> Option<u64> {
        let bytes_per_entry = 1u64.checked_shl(self.l1_shift())?;
        let entries = size.div_ceil(bytes_per_entry);
        (entries <= 0x7fff_ffff).then_some(entries)
    }

    /// The distance of `offset` from the start of its cluster, in bytes.
    #[inline]
    pub fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The start of the cluster that contains `offset`.
    #[inline]
    pub fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Whether `offset` is the start of a cluster.
    #[inline]
    pub fn is_aligned(self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    /// The number of the cluster that contains `offset`.
    #[inline]
    pub fn cluster_index(self, offset: u64) -> u64 {
        offset >> (self.cluster_bits & 63)
    }

    /// Number of clusters for `len` bytes, rounded up.
    #[inline]
    pub fn clusters_for(self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// The numbers of the host clusters of an L1 table of `entries` entries at `offset`.
    pub fn l1_clusters(self, offset: u64, entries: u64) -> std::ops::Range<u64> {
        let end = offset.saturating_add(entries.saturating_mul(8));
        self.cluster_index(offset)..self.clusters_for(end)
    }

    /// `offset` rounded up to the start of a cluster. Guest offsets are at most 2^63, so the result does not overflow.
    #[inline]
    pub fn cluster_end(self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.cluster_size()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_computed_from_the_cluster_size() {
        let geometry =
            Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };
        assert_eq!(geometry.cluster_size(), 65_536);
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_bits(), 13);
        assert_eq!(geometry.refcounts_per_block(), 32_768);
        assert_eq!(geometry.l1_entries_for(0), Some(0));
        assert_eq!(geometry.l1_entries_for(512 << 20), Some(1));
        assert_eq!(geometry.l1_entries_for((512 << 20) + 1), Some(2));
        assert_eq!(geometry.clusters_for(65_537), 2);
        assert_eq!(geometry.clusters_for(u64::MAX), 1 << 48);
    }

    #[test]
    fn extended_entries_are_twice_as_wide() {
        let geometry =
            Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true, data_file: false };
        assert_eq!((geometry.l2_entries(), geometry.l2_bits()), (4096, 12));
        assert_eq!((geometry.l2_entry_words(), geometry.l2_entry_size()), (2, 16));
        assert_eq!(geometry.subcluster_size(), 2048);
        assert_eq!(geometry.l1_entries_for((256 << 20) + 1), Some(2));
    }

    #[test]
    fn a_size_with_more_l1_entries_than_i32_max_is_refused() {
        let geometry =
            Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false, data_file: false };
        assert_eq!(geometry.l1_entries_for(1 << 62), None);
        assert_eq!(geometry.l1_entries_for(0x7fff_ffff << 15), Some(0x7fff_ffff));
        assert_eq!(geometry.l1_entries_for((0x7fff_ffff << 15) + 1), None);
    }
}
