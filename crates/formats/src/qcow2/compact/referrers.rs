//! Finding the L1 and L2 entries that refer to the clusters of a window. The entries are those of the active L1 table, of the
//! L1 tables of the snapshots, and of all L2 tables to which these L1 tables refer.
//!
//! A window is a list of clusters, last first. The number of clusters is bounded, but each cluster may have very many
//! references. If more than [`MAX_ENTRIES`] L2 entries are collected, the window becomes shorter.

use std::collections::{BTreeMap, HashMap};

use futures_util::stream::StreamExt as _;
use oxblk_core::{ChildIdx, Error, Result};
use oxblk_ring::IoBufMut;

use super::super::layout::{ExtendedEntry, Geometry, L1Entry, L2Entry, L2Kind, l2_table};
use super::super::refscan::read_tables;
use super::Compaction;
use super::packed::{Piece, Pieces};

/// Maximum number of collected L2 entries.
const MAX_ENTRIES: usize = 1 << 19;

/// An L2 entry that refers to a cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct EntryAt {
    /// Byte offset of the L2 table in the file.
    pub(super) table: u64,
    /// Index of the entry in its L2 table.
    pub(super) index: u64,
    /// The guest offset that the entry maps, according to the first L1 entry that refers to the table.
    pub(super) guest: u64,
    pub(super) entry: L2Entry,
    /// Number of L1 entries that refer to the table.
    pub(super) times: u64,
}

/// An L1 entry that refers to an L2 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableAt {
    /// Byte offset of the L1 table of a snapshot; `None` for the active L1 table.
    pub(super) l1: Option<u64>,
    /// Index of the entry in its L1 table.
    pub(super) index: u64,
    pub(super) entry: L1Entry,
}

/// Sum of the references of these entries. Each entry counts once for each L1 entry that refers to its L2 table.
pub(super) fn references(entries: &[EntryAt]) -> u64 {
    entries.iter().fold(0, |sum, at| sum.saturating_add(at.times))
}

/// The L1 and L2 entries that refer to the clusters of a window.
#[derive(Default)]
pub(super) struct Referrers {
    /// The clusters of the window, last first. If there are too many references, these are fewer clusters than requested, or
    /// none.
    pub(super) window: Vec<u64>,
    /// L2 entries of uncompressed data and of preallocated zero clusters, by host cluster.
    pub(super) entries: HashMap<u64, Vec<EntryAt>>,
    /// L1 entries, by the cluster of the L2 table to which they refer.
    pub(super) tables: HashMap<u64, Vec<TableAt>>,
    /// Compressed data that touches clusters of the window. The data may also touch other clusters.
    pub(super) pieces: Pieces,
    /// Number of references from compressed data, by cluster.
    pub(super) shared: HashMap<u64, u64>,
    /// Number of L2 entries in `entries` and `pieces`.
    entry_count: usize,
}

impl Referrers {
    fn has(&self, cluster: u64) -> bool {
        self.window.binary_search_by(|one| cluster.cmp(one)).is_ok()
    }

    /// Adds an L2 entry if it refers to a cluster of the window.
    fn add_entry(&mut self, at: EntryAt, kind: L2Kind, geometry: Geometry) {
        let known = match kind {
            L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                let cluster = geometry.cluster_index(host);
                if self.has(cluster) {
                    self.entries.entry(cluster).or_default().push(at);
                    true
                } else {
                    false
                }
            }
            L2Kind::Compressed { host, len } => {
                let piece = Piece { host, len };
                let touched: Vec<u64> =
                    piece.clusters(geometry).filter(|cluster| self.has(*cluster)).collect();
                for cluster in &touched {
                    let count = self.shared.entry(*cluster).or_default();
                    *count = count.saturating_add(at.times);
                }
                if !touched.is_empty() {
                    self.pieces.entry(piece).or_default().push(at);
                }
                !touched.is_empty()
            }
            _ => false,
        };
        self.entry_count = self.entry_count.saturating_add(usize::from(known));
        while self.entry_count > MAX_ENTRIES {
            self.halve_window(geometry);
        }
    }

    /// Keeps the upper half of the window, rounded down. A window of one cluster becomes empty.
    fn halve_window(&mut self, geometry: Geometry) {
        self.window.truncate(self.window.len() / 2);
        let lowest = self.window.last().copied().unwrap_or(u64::MAX);
        self.entries.retain(|cluster, _| *cluster >= lowest);
        self.pieces.retain(|piece, _| piece.clusters(geometry).end > lowest);
        self.shared.retain(|cluster, _| *cluster >= lowest);
        let all = self.entries.values().chain(self.pieces.values());
        self.entry_count = all.fold(0, |sum, entries| sum.saturating_add(entries.len()));
    }
}

impl Compaction<'_> {
    /// Finds the references to the clusters of a window. The caller ensures that no cached L2 slice is dirty.
    pub(super) async fn find_referrers(&self, window: &[u64]) -> Result<Referrers> {
        let tables = self.all_tables().await?;
        let mut referrers = self.entries_of(window, &tables).await?;
        let cluster = |offset: u64| self.geometry.cluster_index(offset);
        referrers.tables = tables
            .into_iter()
            .map(|(offset, places)| (cluster(offset), places))
            .filter(|(cluster, _)| referrers.has(*cluster))
            .collect();
        Ok(referrers)
    }

    /// The L1 entries that refer to each L2 table, by the offset of the table.
    async fn all_tables(&self) -> Result<BTreeMap<u64, Vec<TableAt>>> {
        let mut l1s = vec![(None, self.mapping.active_l1())];
        let snapshots = self.metadata.snapshot_list().await?;
        self.metadata.check_l1_tables(&snapshots)?;
        for snapshot in snapshots {
            let l1 =
                self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
            l1s.push((Some(snapshot.l1_offset), l1));
        }
        let mut tables: BTreeMap<u64, Vec<TableAt>> = BTreeMap::new();
        for (l1, entries) in l1s {
            for (index, entry) in (0_u64..).zip(entries) {
                match entry.l2_offset(self.geometry) {
                    Ok(None) => {}
                    Ok(Some(offset)) => {
                        tables.entry(offset).or_default().push(TableAt { l1, index, entry });
                    }
                    Err(_) => return Err(Error::corrupt("L2 table offset unaligned").at(entry.0)),
                }
            }
        }
        Ok(tables)
    }

    async fn entries_of(
        &self,
        window: &[u64],
        tables: &BTreeMap<u64, Vec<TableAt>>,
    ) -> Result<Referrers> {
        let mut found = Referrers { window: window.to_vec(), ..Referrers::default() };
        let Some(lowest) = window.last().copied() else { return Ok(found) };
        if self.image_state.data_child() != ChildIdx::FILE {
            // A separate data file contains the guest data, so no L2 entry refers to a cluster of the image file.
            return Ok(found);
        }
        let file = self.image_state.file()?;
        let (geometry, version) = (self.geometry, self.image_state.version());
        let parse = move |_: &u64, table: IoBufMut| -> Vec<(u64, L2Entry, L2Kind)> {
            let entries = (0_u64..).zip(l2_table(&table, geometry));
            let hit = |(index, l2_entry): (u64, ExtendedEntry)| {
                let kind = l2_entry.entry.kind(geometry, version).ok()?;
                let end = match kind {
                    L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                        geometry.cluster_index(host).saturating_add(1)
                    }
                    L2Kind::Compressed { host, len } => {
                        geometry.clusters_for(host.saturating_add(len))
                    }
                    _ => 0,
                };
                (end > lowest).then_some((index, l2_entry.entry, kind))
            };
            entries.filter_map(hit).collect()
        };
        let places = tables.keys().map(|offset| (*offset, *offset)).collect();
        let mut read = std::pin::pin!(read_tables(&file, geometry.cluster_size(), places, parse));
        while let Some((table, hits)) = read.next().await {
            let leading = tables.get(&table).map_or(&[][..], Vec::as_slice);
            let first = leading.first().map_or(0, |at| at.index) << geometry.l2_bits();
            let times = u64::try_from(leading.len()).unwrap_or(u64::MAX);
            for (index, entry, kind) in hits? {
                let guest = first.saturating_add(index) << geometry.cluster_bits;
                found.add_entry(EntryAt { table, index, guest, entry, times }, kind, geometry);
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { cluster_bits: 12, refcount_order: 4, extended_l2: false, data_file: false };

    fn add_entry(referrers: &mut Referrers, entry: L2Entry) {
        let at = EntryAt { table: 0x1000, index: 0, guest: 0, entry, times: 2 };
        referrers.add_entry(at, entry.kind(GEOMETRY, 3).unwrap(), GEOMETRY);
    }

    #[test]
    fn each_cluster_of_the_window_counts_the_compressed_data_that_touches_it() {
        let mut referrers = Referrers { window: vec![9, 8, 5], ..Referrers::default() };
        add_entry(&mut referrers, L2Entry::compressed(GEOMETRY, 0x7e00, 0x700).unwrap());
        add_entry(&mut referrers, L2Entry::compressed(GEOMETRY, 0x8600, 0x100).unwrap());
        add_entry(&mut referrers, L2Entry::compressed(GEOMETRY, 0x6600, 0x100).unwrap());
        add_entry(&mut referrers, L2Entry::data(0x9000));
        add_entry(&mut referrers, L2Entry::data(0x7000));
        assert_eq!(referrers.shared, HashMap::from([(8, 4)]));
        assert_eq!(
            (referrers.pieces.len(), referrers.entries.len(), referrers.entry_count),
            (2, 1, 3)
        );
        referrers.halve_window(GEOMETRY);
        assert_eq!((referrers.window.as_slice(), referrers.entry_count), (&[9][..], 1));
        referrers.halve_window(GEOMETRY);
        assert_eq!((referrers.window.len(), referrers.entry_count), (0, 0));
    }
}
