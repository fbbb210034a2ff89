//! The clusters behind the end of the file to which metadata refers: a truncated file has lost them.
//!
//! The clusters are stored as ranges, because one reference can name many clusters. So memory and work depend only on the
//! number of references.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of clusters, as ranges. Ranges neither overlap nor touch.
#[derive(Default)]
pub(super) struct LostClusters {
    /// The end of each range, by its start.
    ends: BTreeMap<u64, u64>,
}

impl LostClusters {
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((first, last)) = self.last_before(end.saturating_add(1))
            && last >= start
        {
            self.ends.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        self.ends.insert(start, end);
    }

    /// Whether the set contains a cluster before `end`.
    pub(super) fn has_cluster_before(&self, end: u64) -> bool {
        self.ends.first_key_value().is_some_and(|(first, _)| *first < end)
    }

    /// The start of the first `count` contiguous clusters from `start` on that are not in the set.
    pub(super) fn first_gap(&self, mut start: u64, count: u64) -> u64 {
        while let Some((_, last)) = self.last_before(start.saturating_add(count))
            && last > start
        {
            start = last;
        }
        start
    }

    /// The last range that starts before `end`.
    fn last_before(&self, end: u64) -> Option<(u64, u64)> {
        self.ends.range(..end).next_back().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_huge_range_is_one_step() {
        let mut lost = LostClusters::default();
        lost.insert(10..1 << 55);
        lost.insert(5..6);
        assert!(lost.has_cluster_before(6) && !lost.has_cluster_before(5));
        assert_eq!((lost.first_gap(0, 5), lost.first_gap(0, 6)), (0, 1 << 55));
        assert_eq!((lost.first_gap(5, 4), lost.first_gap(5, 5)), (6, 1 << 55));
    }

    proptest! {
        #[test]
        fn the_set_is_the_union_of_its_ranges(
            ranges in prop::collection::vec((0_u64..60, 0_u64..8), 0..20)
        ) {
            let mut lost = LostClusters::default();
            let mut clusters = std::collections::BTreeSet::new();
            for (start, len) in ranges {
                lost.insert(start..start + len);
                clusters.extend(start..start + len);
            }
            for end in 0..70 {
                prop_assert_eq!(lost.has_cluster_before(end), clusters.range(..end).next().is_some());
            }
            for (start, count) in (0..70).flat_map(|start| (1..6).map(move |count| (start, count))) {
                let is_free = |at: &u64| clusters.range(*at..*at + count).next().is_none();
                prop_assert_eq!(Some(lost.first_gap(start, count)), (start..).find(is_free));
            }
        }
    }
}
