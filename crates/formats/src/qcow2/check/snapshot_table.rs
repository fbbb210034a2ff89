//! Putting a repaired snapshot table in the place of a broken one.
//!
//! The new table is written into clusters that nothing refers to and counted like everything else; the header names it
//! once the refcounts are repaired, in one write, and only then the clusters of the old one count for nothing.

use oxblk_core::{Errno, Error, Result, WriteFlags};

use super::Checker;
use super::snapshots::Snapshots;
use crate::qcow2::layout::{MAX_SNAPSHOT_TABLE_BYTES, encode_snapshot, field_offsets};
use crate::qcow2::refscan::Claim;

/// A snapshot table that is to replace the one of the image.
pub(super) struct RepairedTable {
    table: Vec<u8>,
    count: u32,
    /// What is wrong with the old one.
    faults: u64,
    /// Clusters of the old one: the first, and how many.
    old: (u64, u64),
    /// Byte offset of the new one, once it is written.
    place: Option<u64>,
    /// Clusters that it takes.
    clusters: u64,
}

impl RepairedTable {
    /// The table that the snapshots make.
    pub(super) fn new(snapshots: &Snapshots, old: (u64, u64)) -> Self {
        Self {
            table: snapshots.list.iter().flat_map(encode_snapshot).collect(),
            count: u32::try_from(snapshots.list.len()).unwrap_or(u32::MAX),
            faults: snapshots.faults,
            old,
            place: None,
            clusters: 0,
        }
    }
}

impl Checker<'_> {
    /// Writes the new table and refers to its clusters; says so and gives it up if that fails.
    pub(super) async fn place_snapshots(&mut self) -> Result<()> {
        let Some(mut repaired) = self.repaired_table.take() else { return Ok(()) };
        let written = self.write_snapshots(&mut repaired).await;
        match written {
            Ok(()) => {
                self.repaired_table = Some(repaired);
                Ok(())
            }
            Err(error) => {
                self.snapshots_not_repaired(&repaired, &error);
                Ok(())
            }
        }
    }

    async fn write_snapshots(&mut self, repaired: &mut RepairedTable) -> Result<()> {
        let len = u64::try_from(repaired.table.len()).unwrap_or(u64::MAX);
        if len > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::from_errno(Errno::FBIG));
        }
        if len == 0 {
            repaired.place = Some(0);
            return Ok(());
        }
        let count = self.geometry.clusters_for(len);
        let first = self.free_clusters(count).await;
        let offset = first << self.geometry.cluster_bits;
        let mut table = std::mem::take(&mut repaired.table);
        table.resize(usize::try_from(count << self.geometry.cluster_bits).unwrap_or(0), 0);
        self.file.write(offset, table.into(), WriteFlags::empty()).await?;
        self.file.flush().await?;
        (repaired.place, repaired.clusters) = (Some(offset), count);
        self.clusters = self.geometry.clusters_for(self.file.size());
        for cluster in first..first.saturating_add(count) {
            self.references.add(cluster, 1, Claim::None);
            // A leaking cluster is told of as one whose refcount is lowered first.
            let leaked = self.refcount_of(cluster, &mut None).await.is_some_and(|count| count > 0);
            let told = if leaked { &mut self.reused } else { &mut self.untold };
            told.insert(cluster);
            self.rebuild |= !self.has_block(cluster);
        }
        Ok(())
    }

    /// Clusters that lie together and that nothing refers to; rather one that is free than one that leaks.
    async fn free_clusters(&self, count: u64) -> u64 {
        // One past the end may be referred to.
        let behind = self.clusters_counted();
        if count > 1 || !self.complete {
            return behind;
        }
        let (mut block, mut leaking) = (None, None);
        for cluster in (1..self.clusters).filter(|at| self.references.get(*at).count() == 0) {
            if self.refcount_of(cluster, &mut block).await == Some(0) {
                return cluster;
            }
            leaking = leaking.or(Some(cluster));
        }
        leaking.unwrap_or(behind)
    }

    /// Has the header name the new table. The clusters of the old one have a reference less from here on.
    pub(super) async fn name_snapshots(&mut self) -> Result<()> {
        let Some(repaired) = self.repaired_table.take() else { return Ok(()) };
        let Some(offset) = repaired.place else { return Ok(()) };
        let (first, mut block) = (self.geometry.cluster_index(offset), None);
        for cluster in first..first.saturating_add(repaired.clusters) {
            if self.refcount_of(cluster, &mut block).await.is_none_or(|count| count == 0) {
                self.snapshots_not_repaired(&repaired, &Error::from_errno(Errno::NOSPC));
                return Ok(());
            }
        }
        let fields = [&repaired.count.to_be_bytes()[..], &offset.to_be_bytes()[..]].concat();
        let place = field_offsets::SNAPSHOT_COUNT;
        let named = match self.file.write(place, fields.into(), WriteFlags::empty()).await {
            Ok(()) => self.file.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = named {
            self.snapshots_not_repaired(&repaired, &error);
            return Ok(());
        }
        self.report.corruptions_fixed =
            self.report.corruptions_fixed.saturating_add(repaired.faults);
        let (first, count) = repaired.old;
        for cluster in first..first.saturating_add(count).min(self.clusters) {
            self.references.remove(cluster);
            self.untold.insert(cluster);
        }
        Ok(())
    }

    fn snapshots_not_repaired(&mut self, repaired: &RepairedTable, error: &Error) {
        self.failed(&format!("ERROR failed to update snapshot table: {error}"));
        self.report.corruptions = self.report.corruptions.saturating_add(repaired.faults);
    }
}
