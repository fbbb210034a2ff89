//! Moving refcount blocks and the refcount table, and removing refcount blocks whose refcounts are all 0.
//!
//! A copy of a block and the refcount of the copy's cluster are written and flushed before the refcount table refers to the
//! copy. The refcount of the old cluster is lowered after the changed table entry is flushed. So a crash leaks clusters at
//! worst.
//!
//! The callers ensure that the node is drained and that no refcount slice is dirty.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{Errno, Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Clusters;
use super::allocator::Quarantined;
use super::dropped::ReleaseReason;
use crate::qcow2::layout::{field_offsets, refcount_get};

impl Clusters {
    /// The number of the refcount block that lies in a cluster, if there is one.
    pub(in crate::qcow2) fn block_at(&self, cluster: u64) -> Option<u64> {
        let offset = cluster << self.geometry.cluster_bits;
        self.blocks().into_iter().find(|block| self.block_offset(*block) == offset)
    }

    /// Moves a block from `cluster` to a free cluster in front of `cluster`. If all refcounts of the block are 0, apart from
    /// the refcount of its own cluster, the block is removed instead. Returns the number of freed clusters: 0 if there is no
    /// free cluster in front of `cluster`, and 1 otherwise. The freed cluster is quarantined until the current requests have
    /// ended.
    ///
    /// # Errors
    /// The errors of requests to the image file. `Busy` if the block must be removed while cached refcounts are in use. If the
    /// value of the table entry on disk is unknown after the error, the image accepts no further requests: a refcount that is
    /// in only one of the two blocks would be lost if the entry refers to the other block.
    pub(in crate::qcow2) async fn move_block(&self, block: u64, cluster: u64) -> Result<u64> {
        let epoch = self.image_state.epochs().current();
        let bytes = self.read_block(cluster).await?;
        if self.is_block_unused(&bytes, block, cluster) {
            return self.remove_block(block, cluster, epoch).await;
        }
        self.allocator.rewind();
        let mut run = self.reserve_any(1).await?;
        let new = run.start();
        if new >= cluster {
            run.give_back();
            return Ok(0);
        }
        run.begin_write();
        let counted = self.count(run, ReleaseReason::Table).await?;
        // The new reference may have changed a refcount in this block.
        self.write_back().await?;
        let file = self.file()?;
        let bytes = self.read_block(cluster).await?;
        let bits = self.geometry.cluster_bits;
        file.write(new << bits, bytes.freeze(), WriteFlags::empty()).await?;
        file.flush().await?;
        let written = async {
            self.publish_block(block, new).await?;
            file.flush().await
        };
        self.image_state.stop_on_failure(written).await?;
        counted.keep();
        let size = self.geometry.cluster_size();
        self.allocator.forget_metadata(cluster << bits, size);
        self.free_metadata(Quarantined { epoch, cluster, count: 1, discard: true }).await?;
        Ok(1)
    }

    async fn read_block(&self, cluster: u64) -> Result<IoBufMut> {
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        self.file()?.read(cluster << self.geometry.cluster_bits, IoBufMut::new(len)).await
    }

    /// Whether a block contains no refcounts other than 0, apart from the refcount 1 of its own cluster.
    fn is_block_unused(&self, bytes: &[u8], block: u64, cluster: u64) -> bool {
        let per_block = self.geometry.refcounts_per_block();
        let own = (cluster / per_block == block).then_some(cluster % per_block);
        (0..per_block).all(|at| {
            let expected = u64::from(own == Some(at));
            refcount_get(bytes, at, self.geometry.refcount_order) == Some(expected)
        })
    }

    /// Removes a block from the table and frees the cluster of the block. Returns 1. If another block contains the refcount of
    /// this cluster, the refcount is lowered.
    async fn remove_block(&self, block: u64, cluster: u64, epoch: u64) -> Result<u64> {
        if !self.cache().clear() {
            return Err(Error::new(ErrorKind::Busy, "refcounts are in use").errno(Errno::BUSY));
        }
        let guard = self.allocator.scanning.lock().await;
        let file = self.file()?;
        let written = async {
            self.write_table_entry(block, 0).await?;
            file.flush().await
        };
        self.image_state.stop_on_failure(written).await?;
        self.table.get_or_make(block).store(0, Release);
        let bits = self.geometry.cluster_bits;
        self.allocator.forget_metadata(cluster << bits, self.geometry.cluster_size());
        let run = Quarantined { epoch, cluster, count: 1, discard: true };
        if cluster / self.geometry.refcounts_per_block() == block {
            self.allocator.quarantine(run);
        } else {
            drop(guard);
            self.free_metadata(run).await?;
        }
        Ok(1)
    }

    /// Moves the table to free clusters in front of the table. Returns the number of freed clusters. The number is 0 if no free
    /// run in front of the table is long enough.
    ///
    /// The new table and its refcounts are written and flushed before the header refers to the table.
    ///
    /// # Errors
    /// The errors of requests to the image file. `Busy` if the table was moved by another task or had to grow. If it is unknown
    /// after the error to which of the two tables the header refers, the image accepts no further requests: an entry that is in
    /// only one table would be lost if the header refers to the other table.
    pub(in crate::qcow2) async fn move_table(&self) -> Result<u64> {
        let old = self.table_place();
        self.allocator.rewind();
        let mut run = self.reserve_contiguous(old.clusters).await?;
        let start = run.start();
        if start.saturating_add(old.clusters) > self.geometry.cluster_index(old.offset) {
            run.give_back();
            return Ok(0);
        }
        run.begin_write();
        // The new references may require a new refcount block. A new block adds an entry to the table.
        let counted = self.count(run, ReleaseReason::Table).await?;
        self.write_back().await?;
        let growing = self.growing.lock().await;
        if self.table_place().offset != old.offset {
            return Err(
                Error::new(ErrorKind::Busy, "the refcount table has moved").errno(Errno::BUSY)
            );
        }
        let entries = self.table_entries.load(Acquire);
        let table = self.encode_table(entries, &[], 0)?;
        let file = self.file()?;
        file.write(self.host(start), table, WriteFlags::empty()).await?;
        file.flush().await?;
        let written = async {
            let place = IoBuf::from(self.host(start).to_be_bytes().to_vec());
            file.write(field_offsets::REFCOUNT_TABLE_OFFSET, place, WriteFlags::empty()).await?;
            file.flush().await
        };
        self.image_state.stop_on_failure(written).await?;
        counted.keep();
        self.adopt_table(&[], start, start, entries);
        drop(growing);
        self.free_table(old.offset, entries.saturating_mul(8)).await?;
        Ok(old.clusters)
    }

    /// Whether a cluster is part of the table.
    pub(in crate::qcow2) fn is_in_table(&self, cluster: u64) -> bool {
        let place = self.table_place();
        let first = self.geometry.cluster_index(place.offset);
        (first..first.saturating_add(place.clusters)).contains(&cluster)
    }
}
