//! Rebuilding all refcounts, for an image whose refcount table or blocks cannot be repaired in place.
//!
//! The new table and blocks are written to clusters without references, inside the file or behind its end, and never over
//! the old table and blocks. So the image does not change until one write makes the header refer to the new table. After
//! this write, the old structures have no references.
//!
//! If some references may be unknown, no cluster inside the file counts as free. Each cluster then gets the higher
//! value of its old refcount and its counted references. An old refcount that is unknown counts as 1.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Checker;
use crate::qcow2::image_state::header::exchange;
use crate::qcow2::layout::{
    MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, field_offsets, refcount_get, refcount_set,
};
use crate::qcow2::refscan::CopiedFlag;

/// Location of the new structures, in clusters.
struct Layout {
    /// Cluster of each refcount block, by refcount table index.
    blocks: BTreeMap<u64, u64>,
    table: u64,
    table_clusters: u64,
}

impl Layout {
    fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.values().copied().chain(self.table_range())
    }

    fn table_range(&self) -> Range<u64> {
        self.table..self.table.saturating_add(self.table_clusters)
    }
}

/// Refuses a refcount table that is too large.
fn check_table_entries(entries: u64) -> Result<()> {
    if entries.saturating_mul(8) > MAX_REFCOUNT_TABLE_BYTES {
        return Err(Error::from_errno(Errno::FBIG).prefix("The refcount table would be too large"));
    }
    Ok(())
}

/// Cursors for finding free clusters.
struct FreeClusterCursor {
    /// The next cluster inside the file to examine.
    inside: u64,
    /// The next cluster behind the end of the file to examine.
    end: u64,
}

impl Checker<'_> {
    /// Writes new refcount structures and makes the header refer to them.
    pub(super) async fn rebuild_refcounts(&mut self) -> Result<()> {
        let layout = self.choose_layout()?;
        // From here on, the old structures have no references. The old structures are not overwritten, because the new clusters
        // were chosen before.
        let structures = std::mem::take(&mut self.refcount_structures);
        for cluster in &structures {
            self.references.remove(*cluster);
        }
        if let Err(error) = self.write_structures(&layout).await {
            // Count the references to the old structures again, and not the references to the new structures.
            layout.clusters().for_each(|cluster| self.references.remove(cluster));
            for cluster in &structures {
                self.references.add(*cluster, 1, CopiedFlag::None);
            }
            self.refcount_structures = structures;
            return Err(error);
        }
        self.report_rebuild(&layout);
        Ok(())
    }

    async fn write_structures(&mut self, layout: &Layout) -> Result<()> {
        self.write_blocks(layout).await?;
        self.write_table(layout).await?;
        self.file.flush().await?;
        self.activate_table(layout).await
    }

    /// The refcount table indices of all clusters with references. If some references may be unknown, the indices of all
    /// clusters of the file.
    ///
    /// # Errors
    /// When a table with these indices would be too large. In that case, no block has been placed.
    fn indices(&self) -> Result<Vec<u64>> {
        let per_block = self.geometry.refcounts_per_block();
        let indices = if self.complete {
            self.references.blocks(per_block)
        } else {
            let blocks = self.clusters.div_ceil(per_block);
            check_table_entries(blocks)?;
            (0..blocks).collect()
        };
        check_table_entries(indices.last().map_or(0, |last| last.saturating_add(1)))?;
        Ok(indices)
    }

    /// Chooses the clusters of the new structures, and counts a reference to each. After an error, no reference is counted.
    fn choose_layout(&mut self) -> Result<Layout> {
        let mut layout = Layout { blocks: BTreeMap::new(), table: 0, table_clusters: 0 };
        let placed = self.place_structures(&mut layout).and_then(|()| {
            let last = layout.clusters().max().unwrap_or(0);
            self.offset_behind_end(last).map(drop)
        });
        if placed.is_err() {
            layout.clusters().for_each(|cluster| self.references.remove(cluster));
        }
        placed.map(|()| layout)
    }

    fn place_structures(&mut self, layout: &mut Layout) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut cursor = FreeClusterCursor {
            inside: if self.complete { 1 } else { self.clusters },
            end: self.clusters.saturating_add(1),
        };
        let indices = self.indices()?;
        self.place_blocks(&mut layout.blocks, indices, &mut cursor);
        loop {
            let entries =
                layout.blocks.last_key_value().map_or(1, |(last, _)| last.saturating_add(1));
            check_table_entries(entries)?;
            layout.table_clusters = entries.saturating_mul(8).div_ceil(size);
            layout.table = self.take_clusters(layout.table_clusters, &mut cursor);
            let per_block = self.geometry.refcounts_per_block();
            let own = layout.table_range().map(|at| at / per_block).collect();
            self.place_blocks(&mut layout.blocks, own, &mut cursor);
            let last = layout.blocks.last_key_value().map_or(0, |(last, _)| *last);
            if last < layout.table_clusters.saturating_mul(size / 8) {
                return Ok(());
            }
            layout.table_range().for_each(|cluster| self.references.remove(cluster));
            layout.table_clusters = 0;
        }
    }

    /// Chooses a cluster for each refcount block in `indices` that is not in `blocks` yet. A new block may need a further
    /// block for the refcount of its own cluster.
    fn place_blocks(
        &mut self,
        blocks: &mut BTreeMap<u64, u64>,
        mut indices: Vec<u64>,
        cursor: &mut FreeClusterCursor,
    ) {
        let per_block = self.geometry.refcounts_per_block();
        while let Some(index) = indices.pop() {
            if blocks.contains_key(&index) {
                continue;
            }
            let cluster = self.take_clusters(1, cursor);
            blocks.insert(index, cluster);
            indices.push(cluster / per_block);
        }
    }

    /// Takes `count` contiguous clusters without references, and counts a reference to each. Returns the first cluster.
    fn take_clusters(&mut self, count: u64, cursor: &mut FreeClusterCursor) -> u64 {
        let mut start = None;
        if count == 1 {
            while cursor.inside < self.clusters && start.is_none() {
                if self.references.get(cursor.inside).count() == 0 {
                    start = Some(cursor.inside);
                }
                cursor.inside = cursor.inside.saturating_add(1);
            }
        }
        let start = start.unwrap_or_else(|| {
            let start = self.lost_clusters.first_gap(cursor.end, count);
            cursor.end = start.saturating_add(count);
            start
        });
        for cluster in start..start.saturating_add(count) {
            self.references.add(cluster, 1, CopiedFlag::None);
        }
        start
    }

    /// The byte offset of a cluster that a repair chose, possibly far behind the end of the file.
    pub(super) fn offset_behind_end(&self, cluster: u64) -> Result<u64> {
        let offset = cluster.checked_mul(self.geometry.cluster_size());
        offset.ok_or_else(|| Error::from_errno(Errno::FBIG))
    }

    async fn write_blocks(&mut self, layout: &Layout) -> Result<()> {
        let (per_block, order) =
            (self.geometry.refcounts_per_block(), self.geometry.refcount_order);
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        for (index, cluster) in &layout.blocks {
            let start = index.saturating_mul(per_block);
            let mut block = IoBufMut::zeroed(len);
            if !self.complete {
                self.copy_old_refcounts(*index, &mut block).await;
            }
            for (cluster, referred) in
                self.references.in_range(start..start.saturating_add(per_block))
            {
                let at = cluster - start;
                let count = referred.count().max(refcount_get(&block, at, order).unwrap_or(0));
                refcount_set(&mut block, at, order, count)
                    .map_err(|error| Error::invalid(error.to_string()))?;
            }
            let offset = cluster << self.geometry.cluster_bits;
            self.file.write(offset, block.into(), WriteFlags::empty()).await?;
        }
        Ok(())
    }

    /// Fills a new block with the refcounts of the old block. If there is no readable old block, all clusters of the file that
    /// the block covers get refcount 1.
    async fn copy_old_refcounts(&self, index: u64, block: &mut IoBufMut) {
        let per_block = self.geometry.refcounts_per_block();
        let known =
            !self.broken_blocks.contains(&index) && !self.unreadable_blocks.contains(&index);
        let table = &self.refcount_table;
        let entry = usize::try_from(index).ok().and_then(|index| table.get(index)).copied();
        let offset = entry.map_or(0, |entry| RefcountTableEntry(entry).raw_offset());
        if known
            && offset != 0
            && offset < self.file.size()
            && let Ok(old) = self.read_block(offset).await
        {
            block.copy_from_slice(&old);
            return;
        }
        let start = index.saturating_mul(per_block);
        let end = start.saturating_add(per_block).min(self.clusters);
        for at in 0..end.saturating_sub(start) {
            // Ignoring the error is safe: 1 fits every width, and every index lies in the block.
            let _ = refcount_set(block, at, self.geometry.refcount_order, 1);
        }
    }

    async fn write_table(&self, layout: &Layout) -> Result<()> {
        let bytes = layout.table_clusters << self.geometry.cluster_bits;
        let mut table = IoBufMut::zeroed(usize::try_from(bytes).unwrap_or(0));
        for (index, cluster) in &layout.blocks {
            let offset = cluster << self.geometry.cluster_bits;
            let at = usize::try_from(index.saturating_mul(8)).unwrap_or(usize::MAX);
            if let Some(entry) = table.get_mut(at..at.saturating_add(8)) {
                entry.copy_from_slice(&offset.to_be_bytes());
            }
        }
        let offset = layout.table << self.geometry.cluster_bits;
        self.file.write(offset, table.into(), WriteFlags::empty()).await
    }

    /// Makes the header refer to the new table. The fields for offset and length are adjacent and lie within one sector, so
    /// one write changes both, and a power cut cannot separate them. After an error, the header refers to the old table, or
    /// `table_unknown` is set.
    async fn activate_table(&mut self, layout: &Layout) -> Result<()> {
        let offset = layout.table << self.geometry.cluster_bits;
        let clusters = u32::try_from(layout.table_clusters).unwrap_or(u32::MAX);
        let fields = [&offset.to_be_bytes()[..], &clusters.to_be_bytes()[..]].concat();
        let old = [
            &self.header.refcount_table_offset.to_be_bytes()[..],
            &self.header.refcount_table_clusters.to_be_bytes()[..],
        ];
        let place = field_offsets::REFCOUNT_TABLE_OFFSET;
        let stop = AtomicBool::new(false);
        let written = exchange(self.file, place, &old.concat(), &fields, &stop).await;
        self.table_unknown = stop.into_inner();
        written
    }

    /// Updates the report after the rebuild: refcounts that were too low or unknown are repaired. Leaks are repaired only if
    /// all references are known.
    fn report_rebuild(&mut self, layout: &Layout) {
        let last = layout.blocks.last_key_value().map_or(0, |(last, _)| *last);
        let offset = |index| {
            let cluster = layout.blocks.get(&index).copied().unwrap_or(0);
            cluster << self.geometry.cluster_bits
        };
        self.refcount_table = (0..=last).map(offset).collect();
        self.broken_blocks.clear();
        self.unreadable_blocks.clear();
        self.unwritable_blocks.clear();
        let repaired = self.too_low.saturating_add(self.broken_structure);
        (self.too_low, self.broken_structure) = (0, 0);
        self.count_repaired(repaired);
        self.report.check_errors = self.report.check_errors.saturating_sub(self.unknown);
        self.unknown = 0;
        if self.complete {
            self.report.leaks_fixed = self.report.leaks_fixed.saturating_add(self.report.leaks);
            self.report.leaks = 0;
        }
        self.copied_suspect = true;
        let end = layout.blocks.values().copied().max().unwrap_or(0).max(layout.table);
        let end = end.saturating_add(layout.table_clusters) << self.geometry.cluster_bits;
        self.report.image_end_offset = self.report.image_end_offset.max(end);
    }
}
