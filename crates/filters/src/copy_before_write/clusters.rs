//! The state of the clusters of a snapshot. All lookups and changes are lock-free.
//!
//! Memory grows with the number of clusters that were copied, discarded, or selected by a bitmap, not with the size of the disk.

use std::ops::Range;

use oxblk_core::Result;
use oxblk_core::bitmap::{DirtyBitmap, RangeMap};

/// The state of all clusters. Only [`Clusters::restart`] clears a state.
#[derive(Debug)]
pub(super) struct Clusters {
    /// The size of the snapshot in bytes.
    size: u64,
    /// Bytes per cluster.
    cluster: u64,
    /// The clusters that belong to the snapshot. `None`: all of them.
    selected: Option<RangeMap>,
    /// The target has the data of the cluster.
    copied: RangeMap,
    /// The cluster can change: the snapshot does not read it from the disk any more.
    ready: RangeMap,
    /// The user of the snapshot has discarded the cluster.
    discarded: RangeMap,
}

impl Clusters {
    /// The clusters of a disk of `size` bytes. With `bitmap`, only the clusters with dirty areas belong to the snapshot.
    ///
    /// # Errors
    /// When the disk has too many clusters, or when the bitmap has another size.
    pub(super) fn new(size: u64, cluster: u64, bitmap: Option<&DirtyBitmap>) -> Result<Self> {
        let map = || RangeMap::new(size, cluster);
        let selected = match bitmap {
            None => None,
            Some(bitmap) => {
                let selected = map()?;
                selected.merge(&*bitmap.everything()?)?;
                Some(selected)
            }
        };
        Ok(Self { size, cluster, selected, copied: map()?, ready: map()?, discarded: map()? })
    }

    /// The size of the snapshot in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The first clusters that a change of `range` touches and that must be copied before. At most `most` bytes, but at least one
    /// cluster.
    pub(super) fn next_uncopied(&self, range: &Range<u64>, most: u64) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
        let mut at = range.start;
        loop {
            let start = self.ready.next_zero(at, end.checked_sub(at)?)?;
            let start = start - start % self.cluster;
            let Some(selected) = &self.selected else {
                return Some(start..self.stop(start, end, most, |_| true));
            };
            let found = selected.next_dirty(start.max(at), end.checked_sub(start.max(at))?)?;
            let found = found - found % self.cluster;
            if found == start {
                return Some(start..self.stop(start, end, most, |at| selected.get(at)));
            }
            at = found;
        }
    }

    /// The end of the area of clusters from `start` on that are not ready.
    fn stop(&self, start: u64, end: u64, most: u64, selected: impl Fn(u64) -> bool) -> u64 {
        let end = end.min(start.saturating_add(most.max(1)));
        let mut at = start;
        loop {
            at = at.saturating_add(self.cluster);
            if at >= end || self.ready.get(at) || !selected(at) {
                return at.min(self.size);
            }
        }
    }

    /// The clusters that lie completely in a range. The last cluster ends at the end of the snapshot.
    pub(super) fn whole(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len);
        let end = if end >= self.size { self.size } else { end - end % self.cluster };
        offset.checked_next_multiple_of(self.cluster).unwrap_or(u64::MAX).min(end)..end
    }

    /// The number of bytes from `offset` on, at most `len`, that are accessible.
    pub(super) fn accessible(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len).min(self.size);
        let Some(len) = end.checked_sub(offset) else { return 0 };
        let end = self.discarded.next_dirty(offset, len).unwrap_or(end);
        let unselected = match &self.selected {
            None => None,
            Some(selected) => selected.next_zero(offset, end.saturating_sub(offset)),
        };
        unselected.unwrap_or(end).saturating_sub(offset)
    }

    /// Whether the data of `offset` is in the target, and the number of bytes from there on, at most `len`, for which this is the
    /// same.
    pub(super) fn copied(&self, offset: u64, len: u64) -> (bool, u64) {
        let is_copied = self.copied.get(offset);
        let next = match is_copied {
            true => self.copied.next_zero(offset, len),
            false => self.copied.next_dirty(offset, len),
        };
        (is_copied, next.map_or(len, |next| next.saturating_sub(offset)))
    }

    /// Forgets which clusters were copied or discarded.
    pub(super) fn restart(&self) {
        for map in [&self.copied, &self.ready, &self.discarded] {
            map.reset(0, self.size);
        }
    }

    pub(super) fn set_copied(&self, clusters: &Range<u64>) {
        set(&self.copied, clusters);
    }

    pub(super) fn set_ready(&self, clusters: &Range<u64>) {
        set(&self.ready, clusters);
    }

    pub(super) fn set_discarded(&self, clusters: &Range<u64>) {
        set(&self.discarded, clusters);
    }
}

fn set(map: &RangeMap, clusters: &Range<u64>) {
    map.set(clusters.start, clusters.end.saturating_sub(clusters.start));
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    /// The starts and ends of all areas that a change of `range` copies.
    fn all(range: Range<u64>, clusters: &Clusters) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let mut at = range.start;
        while let Some(area) = clusters.next_uncopied(&(at..range.end), u64::MAX) {
            at = area.end;
            found.push((area.start, area.end));
        }
        found
    }

    #[test]
    fn a_change_touches_whole_clusters_that_are_not_ready() {
        let clusters = Clusters::new(100 * KIB, 16 * KIB, None).unwrap();
        assert_eq!(all(1..2, &clusters), [(0, 16 * KIB)]);
        assert_eq!(all(15 * KIB..17 * KIB, &clusters), [(0, 32 * KIB)]);
        assert_eq!(all(99 * KIB..200 * KIB, &clusters), [(96 * KIB, 100 * KIB)]);
        assert_eq!(all(100 * KIB..200 * KIB, &clusters), []);
        assert_eq!(all(5..5, &clusters), []);
        clusters.set_ready(&(16 * KIB..48 * KIB));
        assert_eq!(all(0..u64::MAX, &clusters), [(0, 16 * KIB), (48 * KIB, 100 * KIB)]);
        assert_eq!(all(17 * KIB..47 * KIB, &clusters), []);
        assert_eq!(clusters.next_uncopied(&(50 * KIB..90 * KIB), 1), Some(48 * KIB..64 * KIB));
    }

    #[test]
    fn a_bitmap_selects_clusters() {
        let bitmap = DirtyBitmap::new("b", 100 * KIB, 4 * KIB).unwrap();
        bitmap.mark(20 * KIB, 1);
        bitmap.mark(60 * KIB, 8 * KIB);
        let clusters = Clusters::new(100 * KIB, 16 * KIB, Some(&bitmap)).unwrap();
        let selected = [(16 * KIB, 32 * KIB), (48 * KIB, 80 * KIB)];
        assert_eq!(all(0..100 * KIB, &clusters), selected);
        assert_eq!(all(33 * KIB..34 * KIB, &clusters), []);
        assert_eq!(clusters.accessible(0, 100 * KIB), 0);
        assert_eq!(clusters.accessible(17 * KIB, 100 * KIB), 15 * KIB);
        clusters.set_ready(&(16 * KIB..64 * KIB));
        assert_eq!(all(0..100 * KIB, &clusters), [(64 * KIB, 80 * KIB)]);
        let longer = Clusters::new(200 * KIB, 16 * KIB, Some(&bitmap)).unwrap_err();
        assert!(longer.to_string().contains("different sizes"), "{longer}");
    }

    #[test]
    fn whole_clusters_of_a_discard_are_not_accessible() {
        let clusters = Clusters::new(100 * KIB, 16 * KIB, None).unwrap();
        assert_eq!(clusters.whole(1, 40 * KIB), 16 * KIB..32 * KIB);
        assert_eq!(clusters.whole(70 * KIB, 30 * KIB), 80 * KIB..100 * KIB);
        assert!(clusters.whole(1, 20 * KIB).is_empty());
        clusters.set_discarded(&(16 * KIB..32 * KIB));
        assert_eq!(clusters.accessible(0, 100 * KIB), 16 * KIB);
        assert_eq!(clusters.accessible(20 * KIB, KIB), 0);
        assert_eq!(clusters.accessible(32 * KIB, 100 * KIB), 68 * KIB);
    }

    #[test]
    fn a_huge_disk_needs_memory_only_for_clusters_in_use() {
        let clusters = Clusters::new(1 << 50, 64 * KIB, None).unwrap();
        clusters.set_copied(&(0..64 * KIB));
        clusters.set_ready(&((1 << 49)..(1 << 49) + 64 * KIB));
        let maps = [&clusters.copied, &clusters.ready, &clusters.discarded];
        assert!(maps.iter().map(|map| map.memory()).sum::<usize>() < 1 << 20);
        assert!(Clusters::new(u64::MAX >> 1, 512, None).is_err());
    }
}
