//! Growing the refcount table, and freeing old metadata.
//!
//! A new table and its refcounts are written and flushed before the header refers to the table.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{DebugEvent, Errno, Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Clusters;
use super::allocator::{Quarantined, Reserved};
use super::counted::Counted;
use super::dropped::ReleaseReason;
use crate::qcow2::image_state::header::exchange;
use crate::qcow2::layout::{Geometry, MAX_REFCOUNT_TABLE_BYTES, field_offsets};

impl Clusters {
    /// Replaces the refcount table with a larger table that has an entry for `block`. The block will lie in `cluster`.
    ///
    /// The new table lies in the range of a refcount block that does not exist yet, as in images that QEMU writes.
    pub(super) async fn grow_table(&self, block: u64, cluster: u64) -> Result<()> {
        self.image_state.event(DebugEvent::ReftableGrow).await;
        let per_block = self.geometry.refcounts_per_block();
        let mut area = block.saturating_add(1).max(cluster.div_ceil(per_block));
        loop {
            let start = area.saturating_mul(per_block);
            if self.write_table(start, (0, 0), Growth::Spare).await?.is_some() {
                return Ok(());
            }
            area = area.saturating_add(1);
        }
    }

    /// Writes missing refcount blocks to the clusters from `start` on, and a new refcount table behind these blocks. `start`
    /// lies behind all clusters in use. After this, refcount blocks exist for all clusters from `start` to the end of the new
    /// table, and for the `clusters` clusters behind the table. The table gets no spare entries. Reserves and returns the
    /// `reserved` clusters directly behind the table. Returns `None`, and writes nothing, if the clusters from `start` on are
    /// not free.
    pub(in crate::qcow2) async fn make_room(
        &self,
        start: u64,
        clusters: u64,
        reserved: u64,
    ) -> Result<Option<Reserved<'_>>> {
        let _guard = self.growing.lock().await;
        self.write_table(start, (clusters, reserved), Growth::Exact).await
    }

    /// Writes missing refcount blocks to the clusters from `start` on, and a new table behind these blocks. After this,
    /// refcount blocks exist for all clusters from `start` to the end of the table, and for the `clusters` clusters behind the
    /// table. Reserves and returns the `reserved` clusters directly behind the table. Returns `None`, and writes nothing, if
    /// the clusters from `start` on are not free.
    ///
    /// The new table and the new blocks are written to one run of clusters and flushed. After that, the header is changed to
    /// refer to the table.
    async fn write_table(
        &self,
        start: u64,
        (clusters, reserved): (u64, u64),
        growth: Growth,
    ) -> Result<Option<Reserved<'_>>> {
        let per_block = self.geometry.refcounts_per_block();
        let cluster_size = self.geometry.cluster_size();
        let old_entries = self.table_entries.load(Acquire);
        let old_offset = self.table_offset.load(Acquire);
        // The new table also keeps the entries of all existing refcount blocks, even for clusters behind the new table.
        let least = self.blocks().last().map_or(0, |last| last.saturating_add(1));
        let blocks_end = blocks_for(self.geometry, start.saturating_add(clusters), least, growth);
        let wanted = match growth {
            Growth::Exact => blocks_end.max(least),
            Growth::Spare => blocks_end.saturating_add(blocks_end.div_ceil(2)).max(least),
        };
        let table_clusters = wanted.saturating_mul(8).div_ceil(cluster_size);
        if table_clusters.saturating_mul(cluster_size) > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::from_errno(Errno::FBIG).prefix("The refcount table cannot grow"));
        }
        let entries = table_clusters.saturating_mul(cluster_size) / 8;
        // The missing blocks are the first clusters of the run. The table follows these blocks.
        let missing: Vec<u64> = (start / per_block..blocks_end)
            .filter(|block| self.block_offset(*block) == 0)
            .collect();
        let blocks = u64::try_from(missing.len()).unwrap_or(u64::MAX);
        let table_start = start.saturating_add(blocks);
        let used_end = table_start.saturating_add(table_clusters);
        let end = used_end.saturating_add(reserved);
        self.scan_up_to(end).await?;
        let Some(mut behind) = self.allocator.take_at(start, end.saturating_sub(start))? else {
            return Ok(None);
        };
        let mut run = behind.split_first(used_end.saturating_sub(start));
        run.begin_write();
        self.image_state.event(DebugEvent::RefblockAllocWriteBlocks).await;
        self.write_missing_blocks(&missing, start, used_end).await?;
        let table = self.encode_table(entries, &missing, start)?;
        let file = self.file()?;
        self.image_state.event(DebugEvent::RefblockAllocWriteTable).await;
        file.write(self.host(table_start), table, WriteFlags::empty()).await?;
        let before = table_fields(old_offset, old_entries.saturating_mul(8) / cluster_size)?;
        let after = table_fields(self.host(table_start), table_clusters)?;
        // The new blocks already contain the refcounts of the clusters that they cover. The refcounts of the other clusters of
        // the run are raised in existing blocks.
        let (mut new, mut counted) = (Vec::new(), Vec::new());
        while run.count() > 0 {
            let at = run.start();
            let part = run.split_first(per_block.saturating_sub(at % per_block).max(1));
            match missing.contains(&(at / per_block)) {
                true => new.push(part),
                false => counted.push(self.count_in_place(part, ReleaseReason::Table).await?),
            }
        }
        self.write_back().await?;
        file.flush().await?;
        self.image_state.event(DebugEvent::RefblockAllocSwitchTable).await;
        let place = field_offsets::REFCOUNT_TABLE_OFFSET;
        exchange(&file, place, &before, &after, self.image_state.disabled()).await?;
        new.into_iter().for_each(Reserved::keep);
        counted.into_iter().for_each(Counted::keep);
        self.adopt_table(&missing, start, table_start, entries);
        self.free_table(old_offset, old_entries.saturating_mul(8)).await?;
        Ok(Some(behind))
    }

    async fn write_missing_blocks(&self, missing: &[u64], start: u64, used_end: u64) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let file = self.file()?;
        for (block, place) in missing.iter().zip(start..) {
            let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
            let mut bytes = IoBufMut::zeroed(size);
            let first = block.saturating_mul(per_block);
            for cluster in start.max(first)..used_end.min(first.saturating_add(per_block)) {
                self.set_in(&mut bytes, cluster - first, 1)?;
            }
            file.write(self.host(place), bytes.freeze(), WriteFlags::empty()).await?;
        }
        Ok(())
    }

    pub(super) fn encode_table(&self, entries: u64, missing: &[u64], start: u64) -> Result<IoBuf> {
        let len = usize::try_from(entries.saturating_mul(8))
            .map_err(|_| Error::from_errno(Errno::FBIG))?;
        let mut bytes = IoBufMut::zeroed(len);
        let added: std::collections::HashMap<u64, u64> =
            missing.iter().copied().zip(start..).collect();
        for (index, word) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
            let entry = match added.get(&index) {
                Some(cluster) => self.host(*cluster),
                None => self.table.get(index).map_or(0, |entry| entry.load(Acquire)),
            };
            word.copy_from_slice(&entry.to_be_bytes());
        }
        Ok(bytes.freeze())
    }

    pub(super) fn adopt_table(&self, missing: &[u64], start: u64, table_start: u64, entries: u64) {
        let cluster_size = self.geometry.cluster_size();
        for (block, cluster) in missing.iter().zip(start..) {
            self.table.get_or_make(*block).store(self.host(cluster), Release);
            self.allocator.note_metadata(self.host(cluster), cluster_size);
        }
        self.table_offset.store(self.host(table_start), Release);
        self.table_entries.store(entries, Release);
        self.allocator.note_metadata(self.host(table_start), entries.saturating_mul(8));
    }

    /// Frees the clusters of an old table. Nothing on disk refers to the table any more, and no request reads the table.
    ///
    /// # Errors
    /// `Corrupt` if the refcount of a cluster is already 0, or its refcount block does not exist. A refcount that cannot be
    /// read is not an error: a later write-back cycle lowers the refcount.
    pub(in crate::qcow2) async fn free_table(&self, offset: u64, bytes: u64) -> Result<()> {
        self.allocator.forget_metadata(offset, bytes);
        let first = offset >> self.geometry.cluster_bits;
        let mut outcome = Ok(());
        for cluster in first..first.saturating_add(bytes.div_ceil(self.geometry.cluster_size())) {
            let epoch = self.allocator.epochs.current();
            let run = Quarantined { epoch, cluster, count: 1, discard: false };
            outcome = outcome.and(self.free_metadata(run).await);
        }
        outcome
    }

    /// Lowers the refcount of a metadata cluster that is no longer used. If the refcount becomes 0, the cluster is quarantined.
    ///
    /// # Errors
    /// The same errors as [`Self::free_table`].
    pub(super) async fn free_metadata(&self, run: Quarantined) -> Result<()> {
        let _guard = self.allocator.scanning.lock().await;
        match self.drop_one(run.cluster).await {
            Ok(0) => self.allocator.quarantine(run),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
            Err(error) => {
                tracing::warn!(
                    "qcow2: a refcount could not be lowered yet; the next write-back tries again: {error}"
                );
                self.dropped.push(run.cluster, 1, 1, ReleaseReason::Table);
            }
        }
        Ok(())
    }
}

/// How many entries a new table gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Growth {
    /// The entries that are needed.
    Exact,
    /// More entries than needed, so that the table does not have to grow again soon.
    Spare,
}

/// The number of refcount blocks that are needed for the refcounts of `clusters` clusters, of the blocks themselves, and of the
/// refcount table. The table has an entry for each block, and at least `least` entries. With [`Growth::Spare`], the blocks
/// suffice for a table that is 50 % larger.
fn blocks_for(geometry: Geometry, clusters: u64, least: u64, growth: Growth) -> u64 {
    let counted = |clusters: u64| {
        let (mut blocks, mut table) = (0_u64, 0_u64);
        loop {
            let all = clusters.saturating_add(blocks).saturating_add(table);
            let needed = all.div_ceil(geometry.refcounts_per_block());
            let entries = geometry.clusters_for(needed.max(least).saturating_mul(8));
            if (needed, entries) == (blocks, table) {
                return (blocks, table);
            }
            (blocks, table) = (needed, entries);
        }
    };
    let (blocks, table) = counted(clusters);
    match growth {
        Growth::Exact => blocks,
        Growth::Spare => counted(clusters.saturating_add(table.div_ceil(2))).0,
    }
}

/// The fields of the header that describe the refcount table: offset, then length in clusters.
fn table_fields(offset: u64, clusters: u64) -> Result<Vec<u8>> {
    let clusters = u32::try_from(clusters).map_err(|_| Error::from_errno(Errno::FBIG))?;
    Ok([&offset.to_be_bytes()[..], &clusters.to_be_bytes()[..]].concat())
}
