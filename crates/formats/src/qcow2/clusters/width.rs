//! Writing refcounts of another width.
//!
//! A new refcount table and new refcount blocks are written to free clusters. The old structures do not change. One write to
//! the header then replaces the old table with the new table. The new refcounts include the clusters of the new structures, but
//! not the clusters of the old structures. So a power cut leaves the old or the new refcounts, without a leak.
//!
//! Only one new refcount block is in memory at a time. Memory use is proportional to the number of refcount blocks.

use std::collections::{BTreeMap, BTreeSet};

use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Clusters;
use super::allocator::Reserved;
use crate::qcow2::layout::{MAX_REFCOUNT_TABLE_BYTES, refcount_max, refcount_set};

/// New refcounts that are written and flushed, but to which the header does not refer yet.
pub(in crate::qcow2) struct NewRefcounts<'a> {
    /// Binary logarithm of the refcount width in bits.
    pub(in crate::qcow2) order: u32,
    /// Byte offset of the new refcount table.
    pub(in crate::qcow2) table_offset: u64,
    /// Number of clusters of the new refcount table.
    pub(in crate::qcow2) table_clusters: u32,
    held: Vec<Reserved<'a>>,
}

impl NewRefcounts<'_> {
    /// Call this when the header refers to the new refcounts. The clusters of the new structures then stay in use.
    pub(in crate::qcow2) fn keep(self) {
        self.held.into_iter().for_each(Reserved::keep);
    }
}

/// The places of the new refcount structures.
#[derive(Default)]
struct Layout<'a> {
    /// The cluster of each new block, by refcount table index.
    blocks: BTreeMap<u64, u64>,
    table: u64,
    table_clusters: u64,
    /// All clusters of the new structures.
    own: BTreeSet<u64>,
    held: Vec<Reserved<'a>>,
}

impl Clusters {
    /// Writes a second copy of all refcounts, with a width of 2^`order` bits. The caller ensures that the node is drained and
    /// that no metadata is dirty.
    ///
    /// # Errors
    /// When a refcount does not fit into the width, when the new refcount table would be too large, and the errors of requests
    /// to the image file.
    pub(in crate::qcow2) async fn write_refcounts(
        &self,
        order: u32,
        progress: &dyn Fn(u64, u64),
    ) -> Result<NewRefcounts<'_>> {
        let per_block = (self.geometry.cluster_size() << 3) >> order;
        let old = self.refcount_structures();
        let indices = self.blocks_needed(order, per_block, &old).await?;
        let mut layout = self.lay_out(indices, per_block).await?;
        for run in &mut layout.held {
            run.begin_write();
        }
        let total = u64::try_from(layout.blocks.len()).unwrap_or(u64::MAX);
        for (done, (index, cluster)) in (0..).zip(&layout.blocks) {
            progress(done, total);
            self.write_block(*index, *cluster, order, per_block, &old, &layout).await?;
        }
        self.write_new_table(&layout).await?;
        self.file()?.flush().await?;
        progress(total, total);
        Ok(NewRefcounts {
            order,
            table_offset: layout.table << self.geometry.cluster_bits,
            table_clusters: u32::try_from(layout.table_clusters).unwrap_or(u32::MAX),
            held: layout.held,
        })
    }

    /// Fails if a refcount does not fit into 2^`order` bits. The caller ensures that no metadata is dirty.
    pub(in crate::qcow2) async fn check_refcounts_fit(&self, order: u32) -> Result<()> {
        let per_block = (self.geometry.cluster_size() << 3) >> order;
        let old = self.refcount_structures();
        self.blocks_needed(order, per_block, &old).await.map(drop)
    }

    /// Refcount table indices of the new blocks that contain a refcount other than 0, before the new structures are counted.
    /// Fails if a refcount does not fit into 2^`order` bits.
    async fn blocks_needed(
        &self,
        order: u32,
        per_block: u64,
        old: &BTreeSet<u64>,
    ) -> Result<Vec<u64>> {
        let max = refcount_max(order);
        let mut indices: Vec<u64> = Vec::new();
        let note = |cluster: u64, count: u64| {
            let count = count.saturating_sub(u64::from(old.contains(&cluster)));
            if count > max {
                let bits = 1_u64 << order;
                let offset = cluster << self.geometry.cluster_bits;
                return Err(Error::invalid(format!(
                    "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset:#x} \
                     has a refcount of {count}"
                )));
            }
            if count > 0 && indices.last() != Some(&(cluster / per_block)) {
                indices.push(cluster / per_block);
            }
            Ok(())
        };
        self.visit_in_use(0..u64::MAX, note).await?;
        Ok(indices)
    }

    async fn lay_out(&self, indices: Vec<u64>, per_block: u64) -> Result<Layout<'_>> {
        let size = self.geometry.cluster_size();
        let mut layout = Layout::default();
        self.place_blocks(&mut layout, indices, per_block).await?;
        loop {
            let entries = layout.blocks.last_key_value().map_or(1, |(last, _)| last + 1);
            let bytes = entries.saturating_mul(8);
            if bytes > MAX_REFCOUNT_TABLE_BYTES {
                return Err(
                    Error::from_errno(Errno::FBIG).prefix("The refcount table would be too large")
                );
            }
            let clusters = bytes.div_ceil(size);
            let run = self.reserve_contiguous(clusters).await?;
            let table = run.start()..run.start().saturating_add(clusters);
            self.place_blocks(&mut layout, table.clone().map(|at| at / per_block), per_block)
                .await?;
            let last = layout.blocks.last_key_value().map_or(0, |(last, _)| *last);
            if last < clusters.saturating_mul(size / 8) {
                layout.own.extend(table.clone());
                (layout.table, layout.table_clusters) = (table.start, clusters);
                layout.held.push(run);
                return Ok(layout);
            }
        }
    }

    /// Reserves a cluster for each refcount block in `indices` that is not in `layout` yet. The cluster of a new block may need
    /// a further block for its own refcount.
    async fn place_blocks<'a>(
        &'a self,
        layout: &mut Layout<'a>,
        indices: impl IntoIterator<Item = u64>,
        per_block: u64,
    ) -> Result<()> {
        for index in indices {
            let mut index = index;
            while !layout.blocks.contains_key(&index) {
                let run = self.reserve_any(1).await?;
                let cluster = run.start();
                layout.held.push(run);
                layout.own.insert(cluster);
                layout.blocks.insert(index, cluster);
                index = cluster / per_block;
            }
        }
        Ok(())
    }

    async fn write_block(
        &self,
        index: u64,
        cluster: u64,
        order: u32,
        per_block: u64,
        old: &BTreeSet<u64>,
        layout: &Layout<'_>,
    ) -> Result<()> {
        let start = index.saturating_mul(per_block);
        let range = start..start.saturating_add(per_block);
        let mut block = self.zeroed(1)?;
        let mut set = |at: u64, count: u64| {
            refcount_set(&mut block, at.saturating_sub(start), order, count)
                .map_err(|_| Error::corrupt("refcount out of bounds"))
        };
        let copy =
            |at: u64, count: u64| set(at, count.saturating_sub(u64::from(old.contains(&at))));
        self.visit_in_use(range.clone(), copy).await?;
        for at in layout.own.range(range) {
            set(*at, 1)?;
        }
        let file = self.file()?;
        let offset = cluster << self.geometry.cluster_bits;
        file.write(offset, block.freeze(), WriteFlags::empty()).await
    }

    async fn write_new_table(&self, layout: &Layout<'_>) -> Result<()> {
        let mut table = self.zeroed(layout.table_clusters)?;
        for (index, word) in (0_u64..).zip(table.chunks_exact_mut(8)) {
            let block = layout.blocks.get(&index).copied().unwrap_or(0);
            word.copy_from_slice(&(block << self.geometry.cluster_bits).to_be_bytes());
        }
        let file = self.file()?;
        let offset = layout.table << self.geometry.cluster_bits;
        file.write(offset, table.freeze(), WriteFlags::empty()).await
    }

    fn zeroed(&self, clusters: u64) -> Result<IoBufMut> {
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        let len = usize::try_from(bytes).map_err(|_| Error::from_errno(Errno::FBIG))?;
        Ok(IoBufMut::zeroed(len))
    }
}
