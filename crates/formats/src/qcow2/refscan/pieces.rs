//! The entries of an L2 table, joined to runs of host clusters.
//!
//! Most tables of most images are one run. What is not a whole cluster at its place within the file, and so wants a
//! closer look or a finding, is handed on as it stands. Pure: bytes in, pieces out.

use super::super::layout::{ExtendedEntry, Geometry, l2_table};

/// A part of what a table refers to. Pieces come in the order of the table's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Piece {
    /// Whole clusters that lie together, one for each entry.
    Run {
        /// The first host cluster.
        cluster: u64,
        /// How many.
        count: u32,
        /// Whether the entries claim that their clusters' refcounts are exactly one.
        copied: bool,
    },
    /// An entry to be looked at: compressed, broken, or past the end of the file.
    Odd {
        /// Its index in the table.
        index: u32,
        /// As it stands.
        both: ExtendedEntry,
    },
}

/// What the entries of a table refer to, in a file of `clusters` clusters. Entries that refer to nothing are left out.
pub(in super::super) fn pieces(
    table: &[u8],
    geometry: Geometry,
    version: u32,
    clusters: u64,
) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut last: Option<(u64, u32, bool)> = None;
    for (index, both) in (0_u32..).zip(l2_table(table, geometry)) {
        if both == ExtendedEntry::EMPTY {
            continue;
        }
        let entry = both.entry;
        let host = entry.raw_offset();
        let cluster = host >> geometry.cluster_bits;
        // What lies in a data file is none of the file's.
        let odd = geometry.data_file
            || entry.is_compressed()
            || entry.reserved() != 0
            || !geometry.is_aligned(host)
            || cluster >= clusters
            || (version < 3 && entry.has_zero_flag())
            || (host == 0 && both.bitmap.allocated() != 0)
            || both.bitmap.is_contradictory();
        if odd {
            pieces.extend(last.take().map(run));
            pieces.push(Piece::Odd { index, both });
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
            _ => pieces.extend(last.replace((cluster, 1, copied)).map(run)),
        }
    }
    pieces.extend(last.map(run));
    pieces
}

fn run((cluster, count, copied): (u64, u32, bool)) -> Piece {
    Piece::Run { cluster, count, copied }
}

#[cfg(test)]
mod tests {
    use super::super::super::layout::L2Entry;
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { cluster_bits: 12, refcount_order: 4, extended_l2: false, data_file: false };

    fn of(entries: &[u64]) -> Vec<Piece> {
        let table: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        pieces(&table, GEOMETRY, 3, 100)
    }

    #[test]
    fn clusters_that_lie_together_and_claim_the_same_are_one_run() {
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
            Piece::Run { cluster: 5, count: 3, copied: true },
            Piece::Run { cluster: 8, count: 1, copied: false },
            Piece::Run { cluster: 5, count: 1, copied: false },
        ];
        assert_eq!(of(&entries), expected);
    }

    #[test]
    fn what_wants_a_closer_look_stands_between_the_runs_in_its_place() {
        let packed = L2Entry::compressed(GEOMETRY, 0x7000, 700).unwrap().0;
        let entries = [0x5000, packed, 0x6000 | 1 << 57, 0x6200, 100 << 12, 0x6000];
        let odd = |index: u32| {
            let entry = L2Entry(entries[usize::try_from(index).unwrap()]);
            Piece::Odd { index, both: ExtendedEntry { entry, ..ExtendedEntry::EMPTY } }
        };
        let run = |cluster| Piece::Run { cluster, count: 1, copied: false };
        assert_eq!(of(&entries), [run(5), odd(1), odd(2), odd(3), odd(4), run(6)]);
    }
}
