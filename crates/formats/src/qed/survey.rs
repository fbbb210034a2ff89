//! The survey of an image: it reads all tables, and collects the clusters in use and the faults.
//!
//! Tables are read from the file, so all changes must have been written back. No request is in flight, or the image is
//! read-only. An L2 table that overlaps an earlier table is reported as a fault and is not read. So a survey reads no table
//! twice.

use std::ops::ControlFlow;

use oxblk_core::Result;
use oxblk_ring::IoBufMut;
use roaring::RoaringBitmap;

use super::Qed;
use super::header::{ENTRY_BYTES, Entry, data_entry, table_entry};

/// Tables are read in steps of this size in bytes.
const STEP: u64 = 1 << 20;

/// A fault of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The L1 entry at this index is invalid, for example because the table does not lie inside the file.
    BadTable { index: u64, entry: u64 },
    /// `clusters` clusters of the table of this L1 entry also belong to the L1 table or to L2 tables of earlier L1 entries.
    SharedTable { index: u64, entry: u64, clusters: u64 },
    /// The L2 entry of this disk offset is invalid, for example because the cluster does not lie inside the file.
    BadData { guest: u64, entry: u64 },
    /// The L2 entry of this disk offset refers to a cluster of a table, or to the cluster of an earlier L2 entry.
    SharedData { guest: u64, entry: u64 },
}

/// The result of a survey.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Clusters of the file that are in use.
    pub(super) used: RoaringBitmap,
    /// Number of L2 entries that are neither unallocated nor zero clusters, including invalid entries.
    pub(super) allocated: u64,
    /// Number of allocated L2 entries whose cluster does not follow the cluster of the previous allocated entry of the table.
    pub(super) fragmented: u64,
}

/// The owner of clusters of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The L1 table.
    L1,
    /// The L2 table of this L1 entry.
    Table(u64),
    /// The cluster of the disk at this offset.
    Data(u64),
}

impl Qed {
    /// Reads all tables, and reports faults: first those of L1 entries, then those of L2 entries in the order of the disk.
    ///
    /// # Errors
    /// The errors of requests to the image file.
    pub(super) async fn survey(&self, mut found: impl FnMut(Fault)) -> Result<Survey> {
        let mut survey = Survey::default();
        let (first, end) = (self.cluster_at(self.first_cluster), self.entry_end());
        survey.used.insert_range(0..first);
        let l1 = self.cluster_at(self.header().header.l1_offset);
        survey.used.insert_range(l1..l1.saturating_add(self.geometry.table_clusters));
        let mut tables = Vec::new();
        for index in 0..self.geometry.l1_entries() {
            let entry = self.l1_entry(index);
            match table_entry(self.geometry, self.first_cluster, entry, end) {
                Entry::Unallocated => {}
                Entry::At(offset) => {
                    let start = self.cluster_at(offset);
                    let range = start..start.saturating_add(self.geometry.table_clusters);
                    let own = survey.used.insert_range(range);
                    match u64::from(self.geometry.table_clusters).saturating_sub(own) {
                        0 => tables.push((index, offset)),
                        clusters => found(Fault::SharedTable { index, entry, clusters }),
                    }
                }
                Entry::Zero | Entry::Bad => found(Fault::BadTable { index, entry }),
            }
        }
        for (index, offset) in tables {
            // Offset of the end of the previous data cluster.
            let mut previous = None;
            let examine = |guest, entry| {
                let meaning = data_entry(self.geometry, self.first_cluster, entry, end);
                if matches!(meaning, Entry::Unallocated | Entry::Zero) {
                    return ControlFlow::Continue(());
                }
                survey.allocated = survey.allocated.saturating_add(1);
                if previous.is_some_and(|end| end != entry) {
                    survey.fragmented = survey.fragmented.saturating_add(1);
                }
                previous = Some(entry.saturating_add(self.geometry.cluster()));
                match meaning {
                    Entry::At(host) if survey.used.insert(self.cluster_at(host)) => {}
                    Entry::At(_) => found(Fault::SharedData { guest, entry }),
                    _ => found(Fault::BadData { guest, entry }),
                }
                ControlFlow::Continue(())
            };
            self.each_entry(index, offset, examine).await?;
        }
        Ok(survey)
    }

    /// Calls `each` with the disk offset and the value of each entry that is not 0 of the L2 table at `offset`.
    async fn each_entry(
        &self,
        index: u64,
        offset: u64,
        mut each: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<()> {
        let file = self.file()?;
        let len = self.geometry.table_bytes();
        let mut guest = index.saturating_mul(self.geometry.table_reach());
        let mut at = 0_u64;
        while at < len {
            let step = STEP.min(len - at);
            let buf = IoBufMut::new(usize::try_from(step).unwrap_or(0));
            let bytes = file.read(offset.saturating_add(at), buf).await?;
            let width = usize::try_from(ENTRY_BYTES).unwrap_or(8);
            for word in bytes.chunks_exact(width) {
                let entry = word.try_into().map_or(0, u64::from_le_bytes);
                if entry != 0 && each(guest, entry).is_break() {
                    return Ok(());
                }
                guest = guest.saturating_add(self.geometry.cluster());
            }
            at = at.saturating_add(step);
        }
        Ok(())
    }

    /// Finds the owners of the clusters of the file for which `wanted` is true, in the order of the file. A table is listed
    /// once, with its first cluster. Invalid entries are ignored.
    pub(super) async fn owners(&self, wanted: impl Fn(u32) -> bool) -> Result<Vec<(u32, Owner)>> {
        let mut owners = Vec::new();
        let clusters = self.geometry.table_clusters;
        let add_table = |offset: u64, owner, owners: &mut Vec<_>| {
            let start = self.cluster_at(offset);
            if (start..start.saturating_add(clusters)).any(&wanted) {
                owners.push((start, owner));
            }
        };
        let l1 = self.header().header.l1_offset;
        add_table(l1, Owner::L1, &mut owners);
        for index in 0..self.geometry.l1_entries() {
            let Ok(Some(offset)) = self.table_offset(index) else { continue };
            add_table(offset, Owner::Table(index), &mut owners);
            let collect = |guest, entry| {
                let end = self.entry_end();
                if let Entry::At(host) = data_entry(self.geometry, self.first_cluster, entry, end) {
                    let cluster = self.cluster_at(host);
                    if wanted(cluster) {
                        owners.push((cluster, Owner::Data(guest)));
                    }
                }
                ControlFlow::Continue(())
            };
            self.each_entry(index, offset, collect).await?;
        }
        owners.sort_unstable_by_key(|(cluster, _)| *cluster);
        Ok(owners)
    }
}
