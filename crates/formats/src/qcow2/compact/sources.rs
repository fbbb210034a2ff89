//! What refers to the clusters of a window: entries of L2 tables, and of L1 tables, of the active state and of snapshots.

use std::collections::{BTreeMap, HashMap};

use futures_util::stream::StreamExt as _;
use oxblk_core::{ChildIdx, Error, Result};
use oxblk_ring::IoBufMut;

use super::super::Qcow2;
use super::super::layout::{ExtendedEntry, L1Entry, L2Entry, L2Kind, l2_table};
use super::super::reach::read_tables;

/// An L2 entry that refers to a cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct EntryAt {
    /// Byte offset of its table in the file.
    pub(super) table: u64,
    /// Its index there.
    pub(super) index: u64,
    /// The guest offset that it is for.
    pub(super) guest: u64,
    pub(super) entry: L2Entry,
    /// How many L1 tables lead to it.
    pub(super) times: u64,
}

/// An L1 entry that refers to an L2 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableAt {
    /// Byte offset of the L1 table of a snapshot; `None` for the active one.
    pub(super) l1: Option<u64>,
    /// Its index there.
    pub(super) index: u64,
    pub(super) entry: L1Entry,
}

/// What refers to clusters, by cluster.
pub(super) struct Sources {
    pub(super) entries: HashMap<u64, Vec<EntryAt>>,
    pub(super) tables: HashMap<u64, Vec<TableAt>>,
}

impl Qcow2 {
    /// Finds what refers to the clusters of a window. No slice may be dirty.
    pub(super) async fn sources_of(&self, window: &[u64]) -> Result<Sources> {
        let tables = self.all_tables().await?;
        let entries = self.entries_of(window, &tables).await?;
        let wanted = |cluster: &u64| window.binary_search_by(|one| cluster.cmp(one)).is_ok();
        let cluster = |offset: u64| self.geometry.cluster_index(offset);
        let tables = tables
            .into_iter()
            .map(|(offset, places)| (cluster(offset), places))
            .filter(|(cluster, _)| wanted(cluster))
            .collect();
        Ok(Sources { entries, tables })
    }

    /// All L2 tables by their offset, and what refers to them.
    async fn all_tables(&self) -> Result<BTreeMap<u64, Vec<TableAt>>> {
        let mut l1s = vec![(None, self.active_l1())];
        for snapshot in self.snapshot_list().await? {
            snapshot.check_l1(self.geometry)?;
            let l1 = self.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
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
    ) -> Result<HashMap<u64, Vec<EntryAt>>> {
        let mut found: HashMap<u64, Vec<EntryAt>> = HashMap::new();
        let Some(lowest) = window.last().copied() else { return Ok(found) };
        if self.data_child() != ChildIdx::FILE {
            // No guest data lies in this file.
            return Ok(found);
        }
        let file = self.children.require(ChildIdx::FILE)?;
        let (geometry, version) = (self.geometry, self.version);
        let look = move |_: &u64, table: IoBufMut| -> Vec<(u64, u64, L2Entry)> {
            let entries = (0_u64..).zip(l2_table(&table, geometry));
            let hit = |(index, both): (u64, ExtendedEntry)| {
                let entry = both.entry;
                let Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) =
                    entry.kind(geometry, version)
                else {
                    return None;
                };
                let cluster = geometry.cluster_index(host);
                (cluster >= lowest).then_some((index, cluster, entry))
            };
            entries.filter_map(hit).collect()
        };
        let places = tables.keys().map(|offset| (*offset, *offset)).collect();
        let mut read = std::pin::pin!(read_tables(&file, geometry.cluster_size(), places, look));
        while let Some((table, hits)) = read.next().await {
            let leading = tables.get(&table).map_or(&[][..], Vec::as_slice);
            let first = leading.first().map_or(0, |at| at.index) << geometry.l2_bits();
            let times = u64::try_from(leading.len()).unwrap_or(u64::MAX);
            for (index, cluster, entry) in hits? {
                if window.binary_search_by(|one| cluster.cmp(one)).is_err() {
                    continue;
                }
                let guest = first.saturating_add(index) << geometry.cluster_bits;
                let at = EntryAt { table, index, guest, entry, times };
                found.entry(cluster).or_default().push(at);
            }
        }
        Ok(found)
    }
}
