//! Parsing an L2 table into runs of host clusters.
//!
//! An entry that does not simply refer to a cluster inside the file is returned unchanged, because the caller must examine
//! or report it. This module does no I/O.

use super::super::layout::{ExtendedEntry, Geometry, l2_table};

/// Some of the references of a table. Groups have the order of the table entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum EntryGroup {
    /// Contiguous clusters, one for each entry.
    Run {
        /// The first host cluster.
        cluster: u64,
        /// Number of clusters.
        count: u32,
        /// Whether the copied flag of the entries is set.
        copied: bool,
    },
    /// An entry that the caller must examine: it is compressed or invalid, it refers to a cluster behind the end of the
    /// file, or the image has a data file.
    Unusual {
        /// Index of the entry in the table.
        index: u32,
        /// The unchanged entry.
        l2_entry: ExtendedEntry,
    },
}

/// The references of the entries of a table, in a file of `clusters` clusters. Valid entries without a host cluster are
/// left out, unless the image has a data file.
pub(in super::super) fn group_entries(
    table: &[u8],
    geometry: Geometry,
    version: u32,
    clusters: u64,
) -> Vec<EntryGroup> {
    let mut groups = Vec::new();
    let mut last: Option<(u64, u32, bool)> = None;
    for (index, l2_entry) in (0_u32..).zip(l2_table(table, geometry)) {
        if l2_entry == ExtendedEntry::EMPTY {
            continue;
        }
        let entry = l2_entry.entry;
        let host = entry.raw_offset();
        let cluster = host >> geometry.cluster_bits;
        // Offsets in a data file are not clusters of this file.
        let unusual = geometry.data_file
            || entry.is_compressed()
            || entry.reserved() != 0
            || !geometry.is_aligned(host)
            || cluster >= clusters
            || (version < 3 && entry.has_zero_flag())
            || (host == 0 && l2_entry.bitmap.allocated() != 0)
            || l2_entry.bitmap.is_contradictory();
        if unusual {
            groups.extend(last.take().map(run));
            groups.push(EntryGroup::Unusual { index, l2_entry });
            continue;
        }
        if host == 0 {
            continue;
        }
        let copied = entry.copied();
        match &mut last {
            Some((first, count, same))
                if *same == copied && first.saturating_add(u64::from(*count)) == cluster =>
            {
                *count = count.saturating_add(1);
            }
            _ => groups.extend(last.replace((cluster, 1, copied)).map(run)),
        }
    }
    groups.extend(last.map(run));
    groups
}

fn run((cluster, count, copied): (u64, u32, bool)) -> EntryGroup {
    EntryGroup::Run { cluster, count, copied }
}

#[cfg(test)]
mod tests {
    use super::super::super::layout::L2Entry;
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { cluster_bits: 12, refcount_order: 4, extended_l2: false, data_file: false };

    fn of(entries: &[u64]) -> Vec<EntryGroup> {
        let table: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        group_entries(&table, GEOMETRY, 3, 100)
    }

    #[test]
    fn contiguous_clusters_with_the_same_copied_flag_are_one_run() {
        let entries = [
            L2Entry::data(0x5000).0,
            L2Entry::data(0x6000).0,
            0,
            L2Entry::zero_plain().0,
            L2Entry::zero_allocated(0x7000).0,
            0x8000,
            0x5000,
        ];
        let expected = [
            EntryGroup::Run { cluster: 5, count: 3, copied: true },
            EntryGroup::Run { cluster: 8, count: 1, copied: false },
            EntryGroup::Run { cluster: 5, count: 1, copied: false },
        ];
        assert_eq!(of(&entries), expected);
    }

    #[test]
    fn unusual_entries_are_returned_between_the_runs_in_table_order() {
        let packed = L2Entry::compressed(GEOMETRY, 0x7000, 700).unwrap().0;
        let entries = [0x5000, packed, 0x6000 | 1 << 57, 0x6200, 100 << 12, 0x6000];
        let unusual = |index: u32| {
            let entry = L2Entry(entries[usize::try_from(index).unwrap()]);
            EntryGroup::Unusual { index, l2_entry: ExtendedEntry { entry, ..ExtendedEntry::EMPTY } }
        };
        let run = |cluster| EntryGroup::Run { cluster, count: 1, copied: false };
        assert_eq!(of(&entries), [run(5), unusual(1), unusual(2), unusual(3), unusual(4), run(6)]);
    }
}
