//! Replacing the zero clusters of snapshots, before an image is downgraded to version 2.
//!
//! A snapshot with zero clusters gets a new L1 table, and new L2 tables instead of those with zero clusters. Then a new
//! snapshot table replaces the old one, as in any change of snapshots. The new snapshot table refers to the new L1 table.
//! If several snapshots share an L2 table, they share its replacement.

use std::collections::BTreeMap;

use futures_util::stream::StreamExt as _;
use oxblk_core::{Error, Result, WriteFlags, ZeroFlags};

use super::super::clusters::ReleaseReason;
use super::super::clusters::Reserved;
use super::super::layout::{CryptMethod, L1Entry, L2Entry, L2Kind, Snapshot};
use super::ImageSnapshots;
use super::references::CountPurpose;

/// The L2 tables that have been read, by offset.
type Tables = BTreeMap<u64, Table>;

/// An L2 table of a snapshot.
#[derive(Debug, Clone, Copy)]
enum Table {
    /// The table has no zero clusters.
    Fine,
    /// The table has zero clusters.
    HasZeroes,
    /// The table was replaced by a new table at this offset.
    Replaced(u64),
}

impl ImageSnapshots {
    /// Whether version 2 can describe all snapshots of an image with a disk of `size` bytes.
    pub(in crate::qcow2) async fn snapshots_fit_version_2(&self, size: u64) -> Result<bool> {
        let list = self.metadata.snapshot_list().await?;
        Ok(list.iter().all(|snapshot| {
            snapshot.size.is_none_or(|own| own == size)
                && u32::try_from(snapshot.vm_state_size).is_ok()
        }))
    }

    /// Removes the zero clusters of all snapshots. If the image has a backing file, a zero cluster becomes a data cluster
    /// full of zeroes. Otherwise it becomes unallocated.
    pub(in crate::qcow2) async fn expand_snapshots(&self, over_backing: bool) -> Result<()> {
        let mut list = self.metadata.snapshot_list().await?;
        self.metadata.check_l1_tables(&list)?;
        let (mut to_do, mut known) = (Vec::new(), Tables::new());
        for (index, snapshot) in list.iter().enumerate() {
            let l1 =
                self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
            if self.has_zero_clusters(&l1, &mut known).await? {
                to_do.push((index, l1));
            }
        }
        if to_do.is_empty() {
            return Ok(());
        }
        if over_backing && self.image_state.header().crypt_method != CryptMethod::None {
            return Err(Error::unsupported(
                "Cannot downgrade an encrypted image with zero clusters in its snapshots",
            ));
        }
        for (index, l1) in to_do {
            self.expand_snapshot(&mut list, index, &l1, over_backing, &mut known).await?;
        }
        Ok(())
    }

    /// Whether an L2 table of this L1 table has zero clusters. Reads the L2 tables that are not in `known` yet.
    async fn has_zero_clusters(&self, l1: &[L1Entry], known: &mut Tables) -> Result<bool> {
        let all: Vec<u64> =
            self.distinct_tables(l1)?.into_iter().map(|(offset, _)| offset).collect();
        let new = all.iter().copied().filter(|offset| !known.contains_key(offset)).collect();
        {
            let mut tables = Box::pin(self.l2_tables(new));
            while let Some(table) = tables.next().await {
                let (offset, entries) = table?;
                let any = entries.iter().any(|entry| self.is_zero_cluster(*entry));
                known.insert(offset, if any { Table::HasZeroes } else { Table::Fine });
            }
        }
        Ok(all.iter().any(|offset| matches!(known.get(offset), Some(Table::HasZeroes))))
    }

    fn is_zero_cluster(&self, entry: L2Entry) -> bool {
        matches!(entry.kind(self.geometry, self.image_state.version()), Ok(L2Kind::Zero { .. }))
    }

    async fn expand_snapshot(
        &self,
        list: &mut [Snapshot],
        index: usize,
        old: &[L1Entry],
        over_backing: bool,
        known: &mut Tables,
    ) -> Result<()> {
        let (l1, held) = self.without_zero_clusters(old, over_backing, known).await?;
        let mut new = Vec::new();
        for run in held {
            // Adding references ensures that refcount blocks exist. These references are dropped below.
            new.push(self.clusters.count(run, ReleaseReason::Data).await?);
        }
        self.metadata.write_back(true).await?;
        let (reachable, left) = (
            self.count_reachable(&l1, CountPurpose::Raise).await?,
            self.count_reachable(old, CountPurpose::Drop).await?,
        );
        self.image_state.file()?.flush().await?;
        self.raise_reachable(&reachable).await?;
        drop(new);
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let offset = match self.metadata.store_table(bytes).await {
            Ok(offset) => offset,
            Err(error) => return Err(self.undo_raise(&reachable, error).await),
        };
        let Some(snapshot) = list.get_mut(index) else { return Ok(()) };
        let old_offset = std::mem::replace(&mut snapshot.l1_offset, offset);
        if let Err(error) = self.metadata.store_snapshots(list).await {
            self.clusters.drop_l1_clusters(l1.len(), offset);
            return Err(self.undo_raise(&reachable, error).await);
        }
        self.lower_reachable(&left).await?;
        self.clusters.drop_l1_clusters(old.len(), old_offset);
        // The first write-back cycle lowers refcounts in memory, and the second one writes them.
        self.metadata.write_back(true).await?;
        self.metadata.write_back(true).await
    }

    /// Returns an L1 table that maps the same contents without zero clusters. Also returns the new clusters: they are
    /// written, but have no refcounts yet.
    async fn without_zero_clusters<'a>(
        &'a self,
        old: &[L1Entry],
        over_backing: bool,
        known: &mut Tables,
    ) -> Result<(Vec<L1Entry>, Vec<Reserved<'a>>)> {
        let bits = self.geometry.cluster_bits;
        let file = self.image_state.file()?;
        let mut held = Vec::new();
        let all = self.distinct_tables(old)?.into_iter().map(|(offset, _)| offset);
        let with_zeroes =
            all.filter(|at| matches!(known.get(at), Some(Table::HasZeroes))).collect();
        {
            let mut tables = Box::pin(self.l2_tables(with_zeroes));
            while let Some(table) = tables.next().await {
                let (offset, mut entries) = table?;
                for entry in &mut entries {
                    if self.is_zero_cluster(*entry) {
                        *entry = L2Entry::EMPTY;
                        if over_backing {
                            let data = self.zero_data_cluster(&mut held).await?;
                            *entry = L2Entry::data(data << bits).with_copied(false);
                        }
                    }
                }
                let mut run = self.clusters.reserve_contiguous(1).await?;
                run.begin_write();
                let place = run.start() << bits;
                held.push(run);
                let bytes: Vec<u8> =
                    entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
                file.write(place, bytes.into(), WriteFlags::empty()).await?;
                known.insert(offset, Table::Replaced(place));
            }
        }
        let mut l1: Vec<L1Entry> = old.to_vec();
        for (index, offset) in self.mapping.table_places(old)? {
            let entry = usize::try_from(index).ok().and_then(|at| l1.get_mut(at));
            if let (Some(entry), Some(Table::Replaced(place))) = (entry, known.get(&offset)) {
                *entry = L1Entry(*place);
            }
        }
        Ok((l1, held))
    }

    async fn zero_data_cluster<'a>(&'a self, held: &mut Vec<Reserved<'a>>) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let mut run = self.clusters.reserve_contiguous(1).await?;
        run.begin_write();
        let cluster = run.start();
        let file = self.image_state.file()?;
        file.write_zeroes(cluster << self.geometry.cluster_bits, size, ZeroFlags::empty()).await?;
        held.push(run);
        Ok(cluster)
    }
}
