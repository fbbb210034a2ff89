//! Moving refcount blocks, and removing refcount blocks whose refcounts are all 0.
//!
//! A copy of a block is durable and counted before the refcount table refers to it. The refcount of the old cluster is lowered
//! after the table has changed durably. So a crash leaks clusters at worst.
//!
//! Core has drained the node, and no refcount slice is dirty.

use std::sync::atomic::{AtomicBool, Ordering::Release};

use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::allocator::Quarantined;
use super::dropped::ReleaseReason;
use super::facts::header::stop_unless_known;
use super::layout::refcount_get;
use super::refcounts::Refcounts;

impl Refcounts {
    /// The number of the refcount block that lies in a cluster.
    pub(super) fn block_at(&self, cluster: u64) -> Option<u64> {
        let offset = cluster << self.geometry.cluster_bits;
        self.blocks().into_iter().find(|block| self.block_offset(*block) == offset)
    }

    /// Moves a block from `cluster` to a free cluster in front of it. Removes the block instead if all its refcounts are 0,
    /// apart from the one of its own cluster. Returns the number of freed clusters. They are quarantined until `epoch` has
    /// passed.
    ///
    /// # Errors
    /// As the file reports. Sets `stop` if the table entry is in an unknown state afterwards: refcounts that are in only one of
    /// the two blocks would be lost if the entry names the other.
    pub(super) async fn move_block(
        &self,
        block: u64,
        cluster: u64,
        epoch: u64,
        stop: &AtomicBool,
    ) -> Result<u64> {
        let bytes = self.read_block(cluster).await?;
        if self.counts_only(&bytes, block, cluster) {
            return self.give_up_block(block, cluster, epoch, stop).await;
        }
        self.allocator.rewind();
        let mut run = self.reserve(1).await?;
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
        let named = async {
            self.publish_block(block, new).await?;
            file.flush().await
        };
        stop_unless_known(named, stop).await?;
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

    /// Whether all refcounts of a block are 0, apart from the refcount of its own cluster, which is 1.
    fn counts_only(&self, bytes: &[u8], block: u64, cluster: u64) -> bool {
        let per_block = self.geometry.refcounts_per_block();
        let own = (cluster / per_block == block).then_some(cluster % per_block);
        (0..per_block).all(|at| {
            let expected = u64::from(own == Some(at));
            refcount_get(bytes, at, self.geometry.refcount_order) == Some(expected)
        })
    }

    /// Removes a block from the table. If another block holds the refcount of its cluster, that refcount is lowered afterwards.
    async fn give_up_block(
        &self,
        block: u64,
        cluster: u64,
        epoch: u64,
        stop: &AtomicBool,
    ) -> Result<u64> {
        if !self.cache().clear() {
            return Err(
                Error::new(oxblk_core::ErrorKind::Busy, "refcounts are in use").errno(Errno::BUSY)
            );
        }
        let turn = self.allocator.scanning.lock().await;
        let file = self.file()?;
        let named = async {
            self.write_table_entry(block, 0).await?;
            file.flush().await
        };
        stop_unless_known(named, stop).await?;
        self.table.get_or_make(block).store(0, Release);
        let bits = self.geometry.cluster_bits;
        self.allocator.forget_metadata(cluster << bits, self.geometry.cluster_size());
        let run = Quarantined { epoch, cluster, count: 1, discard: true };
        if cluster / self.geometry.refcounts_per_block() == block {
            self.allocator.rest(run);
        } else {
            drop(turn);
            self.free_metadata(run).await?;
        }
        Ok(1)
    }
}
