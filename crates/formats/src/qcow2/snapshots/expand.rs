//! Replacing the zero clusters of snapshots, before an image is downgraded to version 2.
//!
//! A snapshot gets a new L1 table, and new L2 tables instead of those with zero clusters. Then a new snapshot table
//! replaces the old one, as in any change of snapshots. The new snapshot table refers to the new L1 table. If several
//! snapshots share an L2 table, they share its replacement.

use std::collections::BTreeMap;

use futures_util::stream::StreamExt as _;
use oxblk_core::{Error, Result, WriteFlags, ZeroFlags};

use super::super::clusters::ReleaseReason;
use super::super::clusters::Reserved;
use super::super::layout::{CryptMethod, L1Entry, L2Entry, L2Kind, Snapshot};
use super::ImageSnapshots;
use super::references::Pass;

/// Replaced L2 tables: a map from the old offset to the new offset.
type Replaced = BTreeMap<u64, u64>;

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
        let mut to_do = Vec::new();
        for (index, snapshot) in list.iter().enumerate() {
            snapshot.check_l1(self.geometry)?;
            let l1 =
                self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
            if self.has_zero_clusters(&l1).await? {
                to_do.push((index, l1));
            }
        }
        if to_do.is_empty() {
            return Ok(());
        }
        if over_backing && self.facts.header().crypt_method != CryptMethod::None {
            return Err(Error::unsupported(
                "Cannot downgrade an encrypted image with zero clusters in its snapshots",
            ));
        }
        let mut replaced = Replaced::new();
        for (index, l1) in to_do {
            self.expand_snapshot(&mut list, index, &l1, over_backing, &mut replaced).await?;
        }
        Ok(())
    }

    async fn has_zero_clusters(&self, l1: &[L1Entry]) -> Result<bool> {
        let mut tables = Box::pin(self.l2_tables(l1));
        while let Some(table) = tables.next().await {
            let (_, _, entries) = table?;
            if entries.iter().any(|entry| self.is_zero_cluster(*entry)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_zero_cluster(&self, entry: L2Entry) -> bool {
        matches!(entry.kind(self.geometry, self.facts.version()), Ok(L2Kind::Zero { .. }))
    }

    async fn expand_snapshot(
        &self,
        list: &mut [Snapshot],
        index: usize,
        old: &[L1Entry],
        over_backing: bool,
        replaced: &mut Replaced,
    ) -> Result<()> {
        let (l1, held) = self.without_zero_clusters(old, over_backing, replaced).await?;
        let mut new = Vec::new();
        for run in held {
            // Adding references ensures that refcount blocks exist. These references are dropped below.
            new.push(self.clusters.count(run, ReleaseReason::Data).await?);
        }
        self.metadata.write_back(true).await?;
        let (reach, left) =
            (self.reach(&l1, Pass::Share).await?, self.reach(old, Pass::Leave).await?);
        self.facts.file()?.flush().await?;
        self.raise_reach(&reach).await?;
        drop(new);
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let offset = match self.metadata.store_table(bytes).await {
            Ok(offset) => offset,
            Err(error) => return Err(self.undo_raise(&reach, error).await),
        };
        let Some(snapshot) = list.get_mut(index) else { return Ok(()) };
        let old_offset = std::mem::replace(&mut snapshot.l1_offset, offset);
        if let Err(error) = self.metadata.store_snapshots(list).await {
            self.clusters.drop_l1_clusters(l1.len(), offset);
            return Err(self.undo_raise(&reach, error).await);
        }
        self.lower_reach(&left).await?;
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
        replaced: &mut Replaced,
    ) -> Result<(Vec<L1Entry>, Vec<Reserved<'a>>)> {
        let bits = self.geometry.cluster_bits;
        let file = self.facts.file()?;
        let mut held = Vec::new();
        let mut l1: Vec<L1Entry> = old.to_vec();
        let mut tables = Box::pin(self.l2_tables(old));
        while let Some(table) = tables.next().await {
            let (index, offset, mut entries) = table?;
            let Some(entry) = usize::try_from(index).ok().and_then(|at| l1.get_mut(at)) else {
                continue;
            };
            let place = match replaced.get(&offset) {
                Some(place) => *place,
                None if !entries.iter().any(|entry| self.is_zero_cluster(*entry)) => continue,
                None => {
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
                    replaced.insert(offset, place);
                    place
                }
            };
            *entry = L1Entry(place);
        }
        Ok((l1, held))
    }

    async fn zero_data_cluster<'a>(&'a self, held: &mut Vec<Reserved<'a>>) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let mut run = self.clusters.reserve_contiguous(1).await?;
        run.begin_write();
        let cluster = run.start();
        let file = self.facts.file()?;
        file.write_zeroes(cluster << self.geometry.cluster_bits, size, ZeroFlags::empty()).await?;
        held.push(run);
        Ok(cluster)
    }
}
