//! Counting the references that the tables of an image contain.
//!
//! The walk covers the header, the L1 and L2 tables of the active disk state and of the snapshots, the snapshot table, the
//! LUKS header, the bitmaps, and the refcount structures. An L2 table with several references is read once, and so are
//! overlapping L1 tables of snapshots. Only active tables count for the statistics and for the copied flags.

use std::collections::BTreeMap;
use std::ops::Range;

use futures_util::stream::{Stream, StreamExt as _};
use oxblk_core::Result;
use oxblk_core::check::Fix;

use super::Checker;
use super::planned::{EntryFault, Patch};
use super::snapshot_table::RepairedTable;
use super::snapshots::Snapshots;
use crate::qcow2::layout::{
    ExtendedEntry, L1Entry, L2Entry, MAX_SNAPSHOT_TABLE_BYTES, RefcountTableEntry, Snapshot,
};
use crate::qcow2::refscan::{CopiedFlag, EntryGroup, disjoint_ranges, group_entries, read_tables};

/// An L1 table: its byte offset in the file, and the number of its entries.
type L1Location = (u64, u64);

/// A table with at least this many faults, and with fewer valid entries than faults, does not count as an L2 table.
const MIN_FAULTS_OF_NO_TABLE: u64 = 8;

/// Number of references to the same object.
type Times = u32;

impl<'a> Checker<'a> {
    /// Counts the references in the image. Reports references that cannot be counted.
    pub(super) async fn count_references(&mut self) -> Result<()> {
        self.count_range(0, self.geometry.cluster_size(), 1, CopiedFlag::None);
        let snapshots = match self.read_snapshots().await {
            Ok(snapshots) => snapshots,
            // A repair continues without the snapshots. Because of the check error, no clusters are freed.
            Err(_) if self.may_lose_data() => {
                self.report.check_errors = self.report.check_errors.saturating_add(1);
                Snapshots::default()
            }
            Err(error) => return Err(error),
        };
        self.walk_l1_tables(&snapshots.list).await?;
        self.count_range(self.header.snapshots_offset, snapshots.table_bytes, 1, CopiedFlag::None);
        if let Some(crypto) = self.header.extensions.crypto {
            self.count_range(crypto.offset, crypto.length, 1, CopiedFlag::None);
        }
        self.check_header_pointers(&snapshots).await;
        if snapshots.faults > 0 {
            let first = self.geometry.cluster_index(self.header.snapshots_offset);
            let old = (first, self.geometry.clusters_for(snapshots.table_bytes));
            self.repaired_table = Some(RepairedTable::new(&snapshots, old));
        }
        self.count_bitmaps().await;
        self.count_refcount_structures().await
    }

    /// Counts `times` references to every cluster of a range of the file. A range that exceeds the end of the file by a cluster
    /// or more is reported, and not counted.
    pub(super) fn count_range(&mut self, offset: u64, bytes: u64, times: Times, claim: CopiedFlag) {
        if bytes == 0 {
            return;
        }
        let size = self.geometry.cluster_size();
        let end = offset.saturating_add(bytes);
        // The file may end inside its last cluster.
        if end >= self.file.size().saturating_add(size) {
            if self.fix != Fix::Nothing {
                // Only the length of the LUKS header has no limit. A longer header is no header.
                let end = end.min(offset.saturating_add(MAX_SNAPSHOT_TABLE_BYTES));
                let end = self.geometry.clusters_for(end);
                self.lost_clusters.insert(self.geometry.cluster_index(offset)..end);
            }
            self.report_corruption(&format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster \
                 or more: offset {offset:#x} size {bytes:#x}"
            ));
            return;
        }
        let first = self.geometry.cluster_index(offset);
        self.count_run(first, self.geometry.clusters_for(end).saturating_sub(first), times, claim);
    }

    /// Like [`Self::count_range`], but does not compare the clusters with the end of the file.
    fn count_run(&mut self, first: u64, count: u64, times: Times, claim: CopiedFlag) {
        let end = first.saturating_add(count);
        let mut cluster = first;
        while cluster < end {
            cluster = cluster.saturating_add(self.references.add_run(
                cluster,
                end - cluster,
                times,
                claim,
            ));
            if cluster == end {
                return;
            }
            if self.references.add(cluster, times, claim).overflow {
                let at = cluster << self.geometry.cluster_bits;
                self.report_corruption(&format!(
                    "ERROR: overflow cluster offset=0x{at:x}\nUse qemu-img amend to increase the \
                     refcount entry width or qemu-img convert to create a clean copy if the image \
                     cannot be opened for writing"
                ));
            }
            cluster = cluster.saturating_add(1);
        }
    }

    /// Walks the active L1 table and the L1 tables of the snapshots.
    async fn walk_l1_tables(&mut self, snapshots: &[Snapshot]) -> Result<()> {
        let active = (self.header.l1_offset, u64::from(self.header.l1_entries));
        self.count_range(active.0, active.1.saturating_mul(8), 1, CopiedFlag::None);
        let tables = self.count_snapshot_l1_tables(snapshots);
        // The L2 tables of snapshots: the offset, and the number of references to the table.
        let mut inactive: BTreeMap<u64, Times> = BTreeMap::new();
        for (range, times) in tables {
            for entry in self.read_l1((range.start, (range.end - range.start) / 8)).await {
                let offset = L1Entry(entry).raw_offset();
                if offset != 0 {
                    let count = inactive.entry(offset).or_default();
                    *count = count.saturating_add(times);
                }
            }
        }
        self.walk_active(active, &mut inactive).await?;
        for (offset, times) in &inactive {
            self.count_l2_table(*offset, *times, CopiedFlag::None);
        }
        let places = inactive
            .into_iter()
            .filter(|(offset, _)| self.may_read_table(*offset))
            .map(|(offset, times)| ((offset, times), offset))
            .collect();
        let mut tables = std::pin::pin!(self.read_l2_tables(places));
        while let Some(((offset, times), table)) = tables.next().await {
            let Some(table) = self.skip_unreadable_table(table)? else { continue };
            self.walk_l2(offset, &table, times, None);
        }
        Ok(())
    }

    /// Counts the references to the L1 tables of snapshots. Returns the ranges of the file in which these tables lie,
    /// each with the number of tables that share it.
    fn count_snapshot_l1_tables(&mut self, snapshots: &[Snapshot]) -> Vec<(Range<u64>, Times)> {
        let (size, end_of_file) = (self.geometry.cluster_size(), self.file.size());
        let (mut tables, mut clusters) = (Vec::new(), Vec::new());
        for snapshot in snapshots {
            if !self.check_l1_location(snapshot) {
                continue;
            }
            let (offset, bytes) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
            let end = offset.saturating_add(bytes);
            if end < end_of_file.saturating_add(size) {
                clusters.push(self.geometry.cluster_index(offset)..self.geometry.clusters_for(end));
            } else {
                // This reports that the table ends past the end of the file.
                self.count_range(offset, bytes, 1, CopiedFlag::None);
            }
            // The part past the end of the file reads as zeroes.
            tables.push(offset..end.min(end_of_file.next_multiple_of(8)));
        }
        for (run, times) in disjoint_ranges(clusters) {
            self.count_run(run.start, run.end - run.start, times, CopiedFlag::None);
        }
        disjoint_ranges(tables)
    }

    /// Reads and parses L2 tables, in the order of `places`.
    fn read_l2_tables<T: Send + 'static>(
        &self,
        places: Vec<(T, u64)>,
    ) -> impl Stream<Item = (T, Result<Vec<EntryGroup>>)> + use<'a, T> {
        let (geometry, version, clusters) = (self.geometry, self.header.version, self.clusters);
        read_tables(self.file, geometry.cluster_size(), places, move |_, table| {
            group_entries(&table, geometry, version, clusters)
        })
    }

    /// The entries of an L1 table. If the table cannot be read, this is reported and the result is empty. The result is also
    /// empty if the table lies behind the end of the file. The caller reports a table that ends a cluster or
    /// more behind the end of the file.
    async fn read_l1(&mut self, (offset, entries): L1Location) -> Vec<u64> {
        if offset >= self.file.size() {
            return Vec::new();
        }
        match self.read_table(offset, entries).await {
            Ok(entries) => entries,
            Err(error) => {
                self.report_failure(&format!("ERROR: I/O error in check_refcounts_l1: {error}"));
                Vec::new()
            }
        }
    }

    /// Walks the active tables. L2 tables that snapshots share with the active L1 table are removed from `inactive` and
    /// counted here.
    async fn walk_active(
        &mut self,
        active: L1Location,
        inactive: &mut BTreeMap<u64, Times>,
    ) -> Result<()> {
        let l1 = self.read_l1(active).await;
        self.find_flags_without_offset(active.0, &l1);
        let mut places = Vec::new();
        let mut times_of: BTreeMap<u64, Times> = BTreeMap::new();
        for entry in l1.iter().copied().map(L1Entry).filter(|entry| entry.raw_offset() != 0) {
            if entry.reserved() != 0 {
                self.l1_faults = self.l1_faults.saturating_add(1);
                self.report_corruption(&format!(
                    "ERROR found L1 entry with reserved bits set: {:x}",
                    entry.0
                ));
            }
            let offset = entry.raw_offset();
            let first = !times_of.contains_key(&offset);
            let shared = if first { inactive.remove(&offset).unwrap_or(0) } else { 0 };
            let times = shared.saturating_add(1);
            self.count_l2_table(offset, times, CopiedFlag::Copied(entry.copied()));
            let all = times_of.entry(offset).or_default();
            *all = all.saturating_add(times);
            // A table past the end of the file is already reported, and contains nothing to count.
            if first && offset < self.file.size() && self.may_read_table(offset) {
                places.push((offset, offset));
            }
        }
        let mut tables = std::pin::pin!(self.read_l2_tables(places));
        while let Some((offset, table)) = tables.next().await {
            let times = times_of.get(&offset).copied().unwrap_or(1);
            let mut usage = Usage::default();
            let Some(table) = self.skip_unreadable_table(table)? else { continue };
            self.walk_l2(offset, &table, times, Some(&mut usage));
            self.report.allocated_clusters =
                self.report.allocated_clusters.saturating_add(usage.allocated);
            self.report.compressed_clusters =
                self.report.compressed_clusters.saturating_add(usage.compressed);
            self.report.fragmented_clusters =
                self.report.fragmented_clusters.saturating_add(usage.fragmented);
        }
        Ok(())
    }

    /// Finds L1 entries with flags but without an offset. This driver treats such an entry as unallocated, but QEMU uses the
    /// header cluster as the L2 table of the entry.
    fn find_flags_without_offset(&mut self, l1_offset: u64, l1: &[u64]) {
        for (index, entry) in (0_u64..).zip(l1) {
            if *entry == 0 || L1Entry(*entry).raw_offset() != 0 {
                continue;
            }
            self.l1_flags_without_offset = true;
            let fault = EntryFault::FlagsWithoutOffset { index, entry: *entry };
            let offset = l1_offset.saturating_add(index.saturating_mul(8));
            self.plan_patch(Patch { offset, value: 0, fault });
        }
    }

    fn count_l2_table(&mut self, offset: u64, times: Times, claim: CopiedFlag) {
        self.count_range(offset, self.geometry.cluster_size(), times, claim);
        if !self.geometry.is_aligned(offset) || offset >= self.file.size() {
            self.l1_faults = self.l1_faults.saturating_add(1);
        }
        if !self.geometry.is_aligned(offset) {
            self.report_corruption(&format!(
                "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
        }
    }

    /// Whether the L2 table at `offset` is read. Tables that are not aligned may overlap, so all of them together
    /// are read only up to the size of the file. The first table that is not read is reported as a failure.
    fn may_read_table(&mut self, offset: u64) -> bool {
        if self.geometry.is_aligned(offset) {
            return true;
        }
        let room = self.unaligned_bytes_left.checked_sub(self.geometry.cluster_size());
        if room.is_none() && self.unread_tables.is_empty() {
            self.report_failure(
                "ERROR too many L2 tables are not cluster aligned: some were not checked",
            );
        }
        if room.is_none() {
            self.unread_tables.insert(offset);
        }
        self.unaligned_bytes_left = room.unwrap_or(self.unaligned_bytes_left);
        room.is_some()
    }

    /// Returns the L2 table if it could be read. A read error ends a check without repair. A repair reports the error and
    /// continues without the table.
    fn skip_unreadable_table(
        &mut self,
        table: Result<Vec<EntryGroup>>,
    ) -> Result<Option<Vec<EntryGroup>>> {
        match table {
            Ok(table) => Ok(Some(table)),
            Err(error) if self.fix != Fix::Nothing => {
                self.report_failure(&format!("ERROR: I/O error in check_refcounts_l2: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Counts the references of the L2 table at `table_offset`. The table itself has `times` references. `usage` is present
    /// only for active tables.
    fn walk_l2(
        &mut self,
        table_offset: u64,
        table: &[EntryGroup],
        times: Times,
        mut usage: Option<&mut Usage>,
    ) {
        let (before, mut valid) = (self.reported_faults(), 0_u64);
        for group in table {
            match *group {
                EntryGroup::Run { cluster, count, copied } => {
                    let claim =
                        if usage.is_some() { CopiedFlag::Copied(copied) } else { CopiedFlag::None };
                    if let Some(usage) = &mut usage {
                        let host = cluster << self.geometry.cluster_bits;
                        usage.count(host, count.into(), self.geometry.cluster_size());
                    }
                    valid = valid.saturating_add(count.into());
                    self.count_run(cluster, count.into(), times, claim);
                }
                EntryGroup::Unusual { index, l2_entry } => {
                    self.walk_unusual_entry(
                        table_offset,
                        index.into(),
                        l2_entry,
                        times,
                        usage.as_deref_mut(),
                    );
                }
            }
        }
        let wrong = self.reported_faults().saturating_sub(before);
        self.no_l2_table |= wrong >= MIN_FAULTS_OF_NO_TABLE && wrong > valid;
    }

    /// Number of reported corruptions, plus the number of table entries that the repair replaces.
    fn reported_faults(&self) -> u64 {
        let repaired = u64::try_from(self.patches.len()).unwrap_or(u64::MAX);
        self.report.corruptions.saturating_add(repaired)
    }

    /// Counts the references of one unusual entry of the L2 table at `table_offset`, for example a compressed or a faulty one.
    fn walk_unusual_entry(
        &mut self,
        table_offset: u64,
        index: u64,
        l2_entry: ExtendedEntry,
        times: Times,
        usage: Option<&mut Usage>,
    ) {
        let entry = l2_entry.entry;
        let at = table_offset.saturating_add(index.saturating_mul(self.geometry.l2_entry_size()));
        if self.geometry.data_file {
            return self.count_data_file_entry(index, at, l2_entry, usage);
        }
        if entry.is_compressed() {
            if self.has_stray_bitmap(index, at, l2_entry) {
                return;
            }
            self.count_compressed_cluster(entry, times);
            if let Some(usage) = usage {
                usage.count_compressed();
            }
            return;
        }
        if entry.reserved() != 0 {
            self.report_corruption(&format!(
                "ERROR found l2 entry with reserved bits set: {:x}",
                entry.0
            ));
        }
        let offset = entry.raw_offset();
        self.check_bitmap(l2_entry);
        if offset == 0 {
            return;
        }
        if !self.geometry.is_aligned(offset) && self.unaligned_cluster(at, l2_entry) {
            return;
        }
        let claim =
            if usage.is_some() { CopiedFlag::Copied(entry.copied()) } else { CopiedFlag::None };
        if let Some(usage) = usage {
            usage.count(offset, 1, self.geometry.cluster_size());
        }
        self.count_range(offset, self.geometry.cluster_size(), times, claim);
    }

    fn count_compressed_cluster(&mut self, entry: L2Entry, times: Times) {
        let (host, len) = entry.compressed_extent(self.geometry);
        if entry.copied() {
            self.report_corruption(&format!(
                "ERROR: coffset={host:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        self.count_range(host, len, times, CopiedFlag::None);
    }

    /// Counts the references to a part of the refcount structures. A rebuild also repairs faults of these references.
    fn count_refcount_structure(&mut self, offset: u64, bytes: u64) {
        let before = self.report.corruptions;
        self.count_range(offset, bytes, 1, CopiedFlag::None);
        let wrong = self.report.corruptions.saturating_sub(before);
        self.broken_structure = self.broken_structure.saturating_add(wrong);
        self.rebuild |= wrong > 0;
        self.note_structure(offset, bytes);
    }

    /// Counts the references to the refcount table, and to the refcount blocks in its entries.
    async fn count_refcount_structures(&mut self) -> Result<()> {
        let size = self.geometry.cluster_size();
        let bytes = u64::from(self.header.refcount_table_clusters).saturating_mul(size);
        self.count_refcount_structure(self.header.refcount_table_offset, bytes);
        self.refcount_table =
            match self.read_table(self.header.refcount_table_offset, bytes / 8).await {
                Ok(table) => table,
                Err(error) if self.fix == Fix::All && self.report.check_errors == 0 => {
                    self.report_rebuild_needed(&format!(
                        "ERROR could not read the refcount table: {error}"
                    ));
                    Vec::new()
                }
                Err(error) => return Err(error.prefix("Could not read the refcount table")),
            };
        let file_end = self.clusters.saturating_mul(size);
        let blocks: Vec<(u64, u64)> = (0_u64..)
            .zip(self.refcount_table.iter().copied())
            .filter(|(_, entry)| *entry != 0)
            .collect();
        for (index, entry) in blocks {
            let entry = RefcountTableEntry(entry);
            let offset = entry.raw_offset();
            if entry.reserved() != 0 {
                let finding = format!("ERROR refcount table entry {index} has reserved bits set");
                self.report_unwritable_block(index, &finding);
                continue;
            }
            if !self.geometry.is_aligned(offset) {
                let finding = format!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                );
                self.report_unwritable_block(index, &finding);
                self.broken_blocks.insert(index);
                continue;
            }
            if offset >= file_end {
                let finding = format!("ERROR refcount block {index} is outside image");
                self.report_unwritable_block(index, &finding);
                continue;
            }
            let cluster = self.geometry.cluster_index(offset);
            self.count_refcount_structure(offset, size);
            let count = self.references.get(cluster).count();
            if count != 1 {
                let finding = format!("ERROR refcount block {index} refcount={count}");
                self.report_unwritable_block(index, &finding);
            }
        }
        Ok(())
    }
}

/// Statistics about the clusters of one active L2 table.
#[derive(Default)]
pub(super) struct Usage {
    allocated: u64,
    compressed: u64,
    fragmented: u64,
    /// Host offset of the next cluster if the clusters are contiguous; 0 before the first cluster.
    next: u64,
}

impl Usage {
    /// Counts `count` clusters of `size` bytes, from the host offset `host` on.
    pub(super) fn count(&mut self, host: u64, count: u64, size: u64) {
        self.allocated = self.allocated.saturating_add(count);
        if self.next != 0 && host != self.next {
            self.fragmented += 1;
        }
        self.next = host.saturating_add(count.saturating_mul(size));
    }

    /// Counts a compressed cluster. A compressed cluster always counts as fragmented.
    fn count_compressed(&mut self) {
        self.allocated += 1;
        self.compressed += 1;
        self.fragmented += 1;
    }
}
