//! [`RangeMap`]: the dirty ranges of a disk in bytes, stored in a bit tree.
//!
//! A *granule* is the range of the disk that one bit covers. Setting rounds outwards: every granule that a write
//! touches becomes dirty. Resetting rounds inwards: a granule becomes clean only if the reset range contains the
//! complete granule. So rounding never loses a change. The last granule may extend past the end of the disk; a reset
//! that reaches the end of the disk also resets this granule.

use std::ops::Range;

use super::BitmapError;
use super::tree::BitTree;

/// Minimum granularity in bytes.
pub const MIN_GRANULARITY: u64 = 512;
/// Maximum granularity in bytes.
pub const MAX_GRANULARITY: u64 = 1 << 31;
/// Maximum number of granules in one bitmap. The root table of a bitmap of this size takes 2 MiB.
pub const MAX_GRANULES: u64 = 1 << 41;

/// The default granularity of a bitmap: the image's cluster size, but at least 4 KiB and at most 64 KiB. Without
/// clusters (`cluster_size` is 0), the default is 64 KiB.
pub fn default_granularity(cluster_size: u64) -> u64 {
    if cluster_size == 0 { 65536 } else { cluster_size.clamp(4096, 65536) }
}

/// The dirty ranges of a disk of a fixed size.
pub struct RangeMap {
    tree: BitTree,
    size: u64,
    shift: u32,
}

impl RangeMap {
    /// A clean map for a disk of `size` bytes.
    ///
    /// # Errors
    /// When `granularity` is not a power of two within the limits, or a disk of `size` bytes has too many granules.
    pub fn new(size: u64, granularity: u64) -> Result<Self, BitmapError> {
        if !granularity.is_power_of_two()
            || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity)
        {
            return Err(BitmapError::Granularity);
        }
        let granules = size.div_ceil(granularity);
        if granules > MAX_GRANULES {
            return Err(BitmapError::TooBig);
        }
        Ok(Self { tree: BitTree::new(granules), size, shift: granularity.trailing_zeros() })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Number of bits.
    pub fn granules(&self) -> u64 {
        self.tree.bits()
    }

    /// Number of dirty bits.
    pub fn dirty_granules(&self) -> u64 {
        self.tree.count()
    }

    /// Dirty bytes in whole granules, as `query-block` counts them.
    pub fn count(&self) -> u64 {
        self.tree.count().saturating_mul(self.granularity())
    }

    /// Whether no bit is dirty.
    pub fn is_clean(&self) -> bool {
        self.tree.count() == 0
    }

    /// Bytes of memory in use, for accounting.
    pub fn memory(&self) -> usize {
        self.tree.memory()
    }

    /// Makes every granule that the range touches dirty.
    pub fn set(&self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|rest| offset.saturating_add(rest)) else { return };
        self.tree.set(offset >> self.shift, last >> self.shift);
    }

    /// Makes every granule that lies completely in the range clean. If the range reaches the end of the disk, the last
    /// granule becomes clean too.
    pub fn reset(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let first = offset.div_ceil(self.granularity());
        let past = if end >= self.size { self.tree.bits() } else { end >> self.shift };
        if let Some(last) = past.checked_sub(1) {
            self.tree.clear(first, last);
        }
    }

    /// Whether the granule that contains `offset` is dirty.
    pub fn get(&self, offset: u64) -> bool {
        let bit = offset >> self.shift;
        offset < self.size && self.tree.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// The first dirty byte in the range.
    pub fn next_dirty(&self, offset: u64, len: u64) -> Option<u64> {
        self.next(offset, len, BitTree::next_set)
    }

    /// The first byte in the range that is not dirty.
    pub fn next_zero(&self, offset: u64, len: u64) -> Option<u64> {
        self.next(offset, len, BitTree::next_clear)
    }

    fn next(
        &self,
        offset: u64,
        len: u64,
        find: impl Fn(&BitTree, u64, u64) -> Option<u64>,
    ) -> Option<u64> {
        let last = offset.saturating_add(len).min(self.size).checked_sub(1)?;
        if len == 0 || offset > last {
            return None;
        }
        let bit = find(&self.tree, offset >> self.shift, last >> self.shift)?;
        Some((bit << self.shift).max(offset))
    }

    /// The first dirty area in `range`. The area ends at most `max_len` bytes after its start, rounded up to the end of
    /// a granule.
    pub fn next_dirty_area(&self, range: Range<u64>, max_len: u64) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
        let start = self.next_dirty(range.start, end.checked_sub(range.start)?)?;
        let limit = match start.checked_add(max_len.max(1)) {
            Some(limit) => limit.checked_next_multiple_of(self.granularity()).unwrap_or(end),
            None => end,
        };
        let limit = limit.min(end);
        let stop = self.next_zero(start, limit - start).unwrap_or(limit);
        Some(start..stop)
    }

    /// The dirty areas in order. The iterator searches for one area at a time.
    pub fn areas(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let area = self.next_dirty_area(at..self.size, u64::MAX)?;
            at = area.end;
            Some(area)
        })
    }

    /// Adds every dirty area of `source` to this map. The granularities may differ.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn merge(&self, source: &Self) -> Result<(), BitmapError> {
        if self.size != source.size {
            return Err(BitmapError::SizesDiffer { destination: self.size, source: source.size });
        }
        self.absorb(source);
        Ok(())
    }

    /// Adds the dirty areas of `source`, as far as these areas lie inside this disk.
    pub(super) fn absorb(&self, source: &Self) {
        for area in source.areas() {
            if area.start >= self.size {
                break;
            }
            self.set(area.start, area.end.min(self.size) - area.start);
        }
    }

    pub(super) fn tree(&self) -> &BitTree {
        &self.tree
    }

    pub(super) fn shift(&self) -> u32 {
        self.shift
    }
}

impl std::fmt::Debug for RangeMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RangeMap")
            .field("size", &self.size)
            .field("granularity", &self.granularity())
            .field("dirty", &self.tree.count())
            .finish_non_exhaustive()
    }
}
