//! Replacing a broken snapshot table with a repaired table.
//!
//! With this order of writes, the header refers to the old table or to the complete new table at any moment:
//!
//! 1. The new table is written to clusters without references, and references to these clusters are counted.
//! 2. The refcounts are repaired.
//! 3. One write makes the header refer to the new table.
//! 4. The references to the clusters of the old table are removed, so that the repair frees these clusters.

use std::sync::atomic::AtomicBool;

use oxblk_core::{Errno, Error, Result, WriteFlags};

use super::Checker;
use super::snapshots::Snapshots;
use crate::qcow2::image_state::header::exchange;
use crate::qcow2::layout::{MAX_SNAPSHOT_TABLE_BYTES, encode_snapshot, field_offsets};
use crate::qcow2::refscan::CopiedFlag;

/// A snapshot table that replaces the table of the image.
pub(super) struct RepairedTable {
    table: Vec<u8>,
    count: u32,
    /// Number of faults in the old table.
    faults: u64,
    /// Clusters of the old table: the first cluster, and their number.
    old: (u64, u64),
    /// Byte offset of the new table, once it is written.
    place: Option<u64>,
    /// Number of clusters of the new table.
    clusters: u64,
}

impl RepairedTable {
    /// Encodes the table of these snapshots.
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
    /// Writes the new table and counts references to its clusters. A failed write is reported, and the old table is then not
    /// replaced.
    pub(super) async fn write_snapshot_table(&mut self) -> Result<()> {
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
        let offset = self.offset_behind_end(first)?;
        let mut table = std::mem::take(&mut repaired.table);
        table.resize(usize::try_from(count << self.geometry.cluster_bits).unwrap_or(0), 0);
        self.file.write(offset, table.into(), WriteFlags::empty()).await?;
        self.file.flush().await?;
        (repaired.place, repaired.clusters) = (Some(offset), count);
        self.clusters = self.geometry.clusters_for(self.file.size());
        for cluster in first..first.saturating_add(count) {
            self.references.add(cluster, 1, CopiedFlag::None);
            // If the cluster was leaked, the repair of leaks reports the cluster as repaired.
            let leaked = self.refcount_of(cluster, &mut None).await.is_some_and(|count| count > 0);
            let clusters = if leaked { &mut self.reused } else { &mut self.unreported };
            clusters.insert(cluster);
            self.rebuild |= !self.has_block(cluster);
        }
        Ok(())
    }

    /// Chooses `count` contiguous clusters without references, and returns the first of them. A cluster inside the file is used
    /// only if `count` is 1 and all references are known. A free cluster is preferred to a leaked cluster. Clusters behind the
    /// end to which metadata refers are not used.
    async fn free_clusters(&self, count: u64) -> u64 {
        // The cluster behind the end of the file may have a reference.
        let behind = self.lost_clusters.first_gap(self.clusters_counted(), count);
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

    /// Makes the header refer to the new table, and removes the references to the clusters of the old table. If a cluster of
    /// the new table has refcount 0 or an unknown refcount, the table is not replaced. The fields for the number of entries and
    /// the offset are adjacent and lie within one sector, so one write changes both.
    ///
    /// # Errors
    /// When the header could not be written, and may refer to the old or to the new table.
    pub(super) async fn activate_snapshot_table(&mut self) -> Result<()> {
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
        let old = [
            &self.header.snapshot_count.to_be_bytes()[..],
            &self.header.snapshots_offset.to_be_bytes()[..],
        ];
        let place = field_offsets::SNAPSHOT_COUNT;
        let stop = AtomicBool::new(false);
        let written = exchange(self.file, place, &old.concat(), &fields, &stop).await;
        self.table_unknown = stop.into_inner();
        if let Err(error) = written {
            self.snapshots_not_repaired(&repaired, &error);
            return if self.table_unknown { Err(error) } else { Ok(()) };
        }
        self.report.corruptions_fixed =
            self.report.corruptions_fixed.saturating_add(repaired.faults);
        let (first, count) = repaired.old;
        for cluster in first..first.saturating_add(count).min(self.clusters) {
            self.references.remove(cluster);
            self.unreported.insert(cluster);
        }
        Ok(())
    }

    /// Reports that the table is not replaced. If the header does not refer to the new table, the references to its clusters
    /// are removed.
    fn snapshots_not_repaired(&mut self, repaired: &RepairedTable, error: &Error) {
        self.report_failure(&format!("ERROR failed to update snapshot table: {error}"));
        self.report.corruptions = self.report.corruptions.saturating_add(repaired.faults);
        if self.table_unknown {
            return;
        }
        let first = self.geometry.cluster_index(repaired.place.unwrap_or(0));
        for cluster in first..first.saturating_add(repaired.clusters) {
            self.references.remove(cluster);
            // A cluster that was leaked before the repair is reported as a leak again, like all other leaked clusters.
            self.reused.remove(&cluster);
        }
    }
}
