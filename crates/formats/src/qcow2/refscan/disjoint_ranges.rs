//! Cuts ranges of the file that may overlap into ranges that do not overlap.
//!
//! The L1 tables of a hostile image's snapshots may all occupy the same bytes. Reading each of these tables could take much
//! longer than reading the file. The disjoint ranges together are no longer than the file.

use std::collections::BTreeMap;
use std::ops::Range;

/// Cuts ranges at each start and each end of a range. Returns the parts in order, each with the number of ranges that
/// it belongs to.
pub(in super::super) fn disjoint_ranges(
    ranges: impl IntoIterator<Item = Range<u64>>,
) -> Vec<(Range<u64>, u32)> {
    // How many ranges start at an offset, and how many end there.
    let mut bounds: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        let starts = &mut bounds.entry(range.start).or_default().0;
        *starts = starts.saturating_add(1);
        let ends = &mut bounds.entry(range.end).or_default().1;
        *ends = ends.saturating_add(1);
    }
    let (mut parts, mut depth, mut from) = (Vec::new(), 0_u32, 0);
    for (at, (starts, ends)) in bounds {
        if depth > 0 {
            parts.push((from..at, depth));
        }
        depth = depth.saturating_add(starts).saturating_sub(ends);
        from = at;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_count_their_ranges() {
        assert_eq!(disjoint_ranges([]), []);
        assert_eq!(disjoint_ranges([8..8, 16..24]), [(16..24, 1)]);
        let adjacent = [(0..8, 1), (8..16, 1), (32..40, 1)];
        assert_eq!(disjoint_ranges([32..40, 0..8, 8..16]), adjacent);
        let stacked = [(0..8, 1), (8..16, 3), (16..24, 2), (24..32, 1)];
        assert_eq!(disjoint_ranges([0..24, 8..16, 8..32]), stacked);
        assert_eq!(disjoint_ranges([0..8, 0..8]), [(0..8, 2)]);
    }
}
