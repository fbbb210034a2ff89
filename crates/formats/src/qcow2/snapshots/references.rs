//! Counting the references of an L1 table: to its L2 tables, and to the clusters that the L2 entries refer to.
//!
//! The refcount of a cluster counts every L1 table from which the cluster is reachable, even if the L1 tables share an L2
//! table. So creating a snapshot raises the refcounts of all clusters that its L1 table reaches, and deleting the snapshot
//! lowers these refcounts. An L2 table with several references is read once. All references are counted first
//! ([`ImageSnapshots::count_reachable`]), and then the refcounts are changed block by block (see `refcounts`).

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::stream::{self, FuturesUnordered, Stream, StreamExt as _, TryStreamExt as _};
use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};
use roaring::RoaringTreemap;

use super::super::layout::{Geometry, L1Entry, L2Entry, L2Kind, l2_table};
use super::super::refscan::{CopiedFlag, EntryGroup, References, group_entries, read_tables};
use super::ImageSnapshots;

/// Approximate number of bytes of L2 tables that are read concurrently.
const READ_AHEAD: u64 = 4 << 20;
/// Number of tables that are written concurrently.
const WRITES: usize = 8;
/// The copied flag in the first byte of an entry.
const COPIED: u8 = 1 << 7;
/// The compressed flag in the first byte of an entry. Such an entry has no copied flag.
const COMPRESSED: u8 = 1 << 6;

/// The purpose of counting the tables below an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum CountPurpose {
    /// The refcounts will be raised. Copied flags are cleared, and an invalid L2 entry is an error.
    Raise,
    /// The references will be dropped. Invalid L2 entries are skipped, except entries with a valid offset of a cluster
    /// inside the file.
    Drop,
}

/// The clusters that an L1 table reaches: its L2 tables, and the clusters to which their entries refer.
pub(in crate::qcow2) struct Reachable {
    /// Number of references of each cluster.
    pub(super) counted: Arc<References>,
    /// The clusters of the L2 tables, in ascending order.
    pub(super) tables: Vec<u64>,
}

/// Result of a worker thread for one table: its references, and the new table if it changes.
type ParsedTable = (Vec<EntryGroup>, Option<IoBuf>);

fn parse_table(
    table: IoBufMut,
    purpose: CountPurpose,
    geometry: Geometry,
    version: u32,
    clusters: u64,
) -> ParsedTable {
    let found = group_entries(&table, geometry, version, clusters);
    let has_copied = |group: &EntryGroup| match group {
        EntryGroup::Run { copied, .. } => *copied,
        EntryGroup::Unusual { l2_entry, .. } => {
            l2_entry.entry.copied() && !l2_entry.entry.is_compressed()
        }
    };
    let changes = purpose == CountPurpose::Raise && found.iter().any(has_copied);
    (found, changes.then(|| without_copied_flags(table, geometry)))
}

/// The table with all copied flags cleared.
fn without_copied_flags(mut table: IoBufMut, geometry: Geometry) -> IoBuf {
    let size = usize::try_from(geometry.l2_entry_size()).unwrap_or(8);
    for entry in table.chunks_exact_mut(size) {
        if let Some(first) = entry.first_mut()
            && *first & COMPRESSED == 0
        {
            *first &= !COPIED;
        }
    }
    table.freeze()
}

impl ImageSnapshots {
    /// The offsets of the L2 tables to which an L1 table refers, in the order of the L1 entries. Each offset occurs once, with
    /// the number of L1 entries that refer to the table.
    pub(super) fn distinct_tables(&self, l1: &[L1Entry]) -> Result<Vec<(u64, u32)>> {
        let places = self.mapping.table_places(l1)?;
        let mut times: HashMap<u64, u32> = HashMap::with_capacity(places.len());
        for (_, offset) in &places {
            let times = times.entry(*offset).or_default();
            *times = times.saturating_add(1);
        }
        let first = |(_, offset)| times.remove(&offset).map(|times| (offset, times));
        Ok(places.into_iter().filter_map(first).collect())
    }

    /// Reads the L2 tables at these offsets, in order: offset in the file, entries.
    pub(super) fn l2_tables(
        &self,
        offsets: Vec<u64>,
    ) -> impl Stream<Item = Result<(u64, Vec<L2Entry>)>> {
        let size = self.geometry.cluster_size();
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let at_once = usize::try_from(READ_AHEAD / size).unwrap_or(1).clamp(2, 64);
        stream::iter(offsets)
            .map(move |offset| async move {
                let file = self.image_state.file()?;
                let table = file.read(offset, IoBufMut::new(len)).await?;
                let entries =
                    l2_table(&table, self.geometry).map(|l2_entry| l2_entry.entry).collect();
                Ok((offset, entries))
            })
            .buffered(at_once)
    }

    /// Counts the references to all clusters that an L1 table reaches. With [`CountPurpose::Raise`], clears copied flags: the
    /// changed tables are written, but not flushed.
    ///
    /// # Errors Fails if a table cannot be read or written, or if an L1 entry is invalid. With [`CountPurpose::Raise`], also
    /// fails if an L2 entry is invalid. Some copied flags may already be cleared. The caller then writes to the same tables, so
    /// no write is in flight when this function returns an error.
    pub(super) async fn count_reachable(
        &self,
        l1: &[L1Entry],
        purpose: CountPurpose,
    ) -> Result<Reachable> {
        let counted = self.count_tables(l1, purpose).await;
        if counted.is_err() {
            oxblk_ring::settled().await;
        }
        counted
    }

    async fn count_tables(&self, l1: &[L1Entry], purpose: CountPurpose) -> Result<Reachable> {
        let file = self.image_state.file()?;
        let (geometry, version) = (self.geometry, self.image_state.version());
        let clusters = geometry.clusters_for(file.size());
        let places: Vec<((u64, u32), u64)> =
            self.distinct_tables(l1)?.into_iter().map(|table| (table, table.0)).collect();
        let mut tables: Vec<u64> =
            places.iter().map(|(_, offset)| geometry.cluster_index(*offset)).collect();
        let mut counted = References::new(u64::MAX);
        let parsed = read_tables(&file, geometry.cluster_size(), places, move |_, table| {
            parse_table(table, purpose, geometry, version, clusters)
        });
        let mut parsed = std::pin::pin!(parsed);
        let mut writes = FuturesUnordered::new();
        while let Some(((offset, times), parsed)) = parsed.next().await {
            let (groups, changed) = parsed?;
            for group in groups {
                self.count_group(&mut counted, (group, times), purpose, file.size())?;
            }
            count(&mut counted, (geometry.cluster_index(offset), 1), times)?;
            if let Some(table) = changed {
                writes.push(file.write(offset, table, WriteFlags::empty()));
            }
            if writes.len() >= WRITES {
                writes.try_next().await?;
            }
        }
        while writes.try_next().await?.is_some() {}
        drop(writes);
        tables.sort_unstable();
        Ok(Reachable { counted: Arc::new(counted), tables })
    }

    fn count_group(
        &self,
        counted: &mut References,
        (group, times): (EntryGroup, u32),
        purpose: CountPurpose,
        file_end: u64,
    ) -> Result<()> {
        let entry = match group {
            EntryGroup::Run { cluster, count: len, .. } => {
                return count(counted, (cluster, len.into()), times);
            }
            // Clusters of a data file have no refcounts.
            EntryGroup::Unusual { .. } if self.geometry.data_file => return Ok(()),
            EntryGroup::Unusual { l2_entry, .. } => l2_entry.entry,
        };
        match entry.kind(self.geometry, self.image_state.version()) {
            Ok(L2Kind::Compressed { host, len }) => {
                let first = self.geometry.cluster_index(host);
                let end = self.geometry.clusters_for(host.saturating_add(len));
                count(counted, (first, end.saturating_sub(first)), times)
            }
            // The entry is invalid, for example because of a contradictory bitmap, but its cluster lies inside the file.
            Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) })
                if purpose == CountPurpose::Drop && host < file_end =>
            {
                count(counted, (self.geometry.cluster_index(host), 1), times)
            }
            _ if purpose == CountPurpose::Raise => {
                Err(Error::corrupt("L2 entry is invalid").at(entry.0))
            }
            _ => Ok(()),
        }
    }

    /// Drops the references to all clusters that an L1 table reaches, and to the clusters of the L1 table itself at
    /// `offset`. Returns the clusters that the L1 table reaches and whose refcount has become one.
    pub(super) async fn drop_l1(&self, l1: &[L1Entry], offset: u64) -> Result<RoaringTreemap> {
        let reachable = self.count_reachable(l1, CountPurpose::Drop).await?;
        let unshared = self.lower_reachable(&reachable).await?;
        self.clusters.drop_l1_clusters(l1.len(), offset);
        Ok(unshared)
    }
}

/// Counts `times` references to each cluster of a run.
///
/// # Errors
/// `EINVAL` when a cluster has more references than can be counted.
fn count(counted: &mut References, (first, len): (u64, u64), times: u32) -> Result<()> {
    let end = first.saturating_add(len);
    let mut at = first;
    while at < end {
        at = at.saturating_add(counted.add_run(at, end - at, times, CopiedFlag::None));
        if at < end {
            if counted.add(at, times, CopiedFlag::None).overflow {
                return Err(Error::from_errno(Errno::INVAL));
            }
            at = at.saturating_add(1);
        }
    }
    Ok(())
}
