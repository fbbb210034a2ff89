//! Creating refcount blocks.
//!
//! A new block is written and flushed before the refcount table refers to the block. The refcount of the block's own cluster
//! lies in the new block, or in a block that exists already.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{DebugEvent, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Clusters;
use super::allocator::Reserved;
use super::dropped::ReleaseReason;
use crate::qcow2::image_state::header::exchange;

impl Clusters {
    /// Creates the missing refcount blocks for `count` host clusters from `cluster` on. Returns whether the refcount table has
    /// moved. The move frees the clusters of the old table.
    pub(super) async fn ensure_blocks(&self, cluster: u64, count: u64) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let last = cluster.saturating_add(count).saturating_sub(1);
        let mut moved = false;
        for block in cluster / per_block..=last / per_block {
            if self.block_offset(block) == 0 {
                moved |= self.make_block(block).await?;
            }
        }
        Ok(moved)
    }

    /// Creates refcount block `block` if it does not exist. Returns whether the refcount table has moved.
    pub(super) async fn make_block(&self, block: u64) -> Result<bool> {
        let _guard = self.growing.lock().await;
        let mut moved = false;
        let mut wanted = block;
        // Blocks whose own cluster lies in the range of another missing block. That other block is created first, in a later
        // cluster.
        let mut waiting: Vec<(u64, Reserved<'_>)> = Vec::new();
        while self.block_offset(block) == 0 {
            let reserved = self.reserve_any(1).await?;
            let own = reserved.start() / self.geometry.refcounts_per_block();
            if own != wanted && self.block_offset(own) == 0 {
                waiting.push((wanted, reserved));
                wanted = own;
                continue;
            }
            moved |= self.place_block(wanted, reserved).await?;
            while let Some((wanted, reserved)) = waiting.pop() {
                if self.block_offset(wanted) == 0 {
                    moved |= self.place_block(wanted, reserved).await?;
                }
            }
            wanted = block;
        }
        Ok(moved)
    }

    /// Creates a block in a reserved cluster. The refcount of that cluster lies in the new block, or in another block that
    /// exists already. Returns whether the refcount table has moved.
    async fn place_block(&self, block: u64, mut reserved: Reserved<'_>) -> Result<bool> {
        let cluster = reserved.start();
        let own = cluster / self.geometry.refcounts_per_block();
        let moves = block >= self.table_entries.load(Acquire);
        if moves {
            self.grow_table(block, cluster).await?;
        }
        reserved.begin_write();
        self.write_new_block(cluster, own == block).await?;
        if own == block {
            self.link_new_block(block, cluster).await?;
            reserved.keep();
        } else {
            // The refcount of the cluster lies in another, existing block.
            let counted = self.count_in_place(reserved, ReleaseReason::Table).await?;
            self.write_back().await?;
            self.file()?.flush().await?;
            self.link_new_block(block, cluster).await?;
            counted.keep();
        }
        Ok(moves)
    }

    /// Writes the refcount table entry of a new block. The block is on disk already, and the entry was 0 before.
    async fn link_new_block(&self, block: u64, cluster: u64) -> Result<()> {
        let offset = self.host(cluster);
        let place = self.table_entry_place(block)?;
        let (before, after) = (0_u64.to_be_bytes(), offset.to_be_bytes());
        self.image_state.event(DebugEvent::RefblockAllocHookup).await;
        exchange(&*self.file()?, place, &before, &after, self.image_state.disabled()).await?;
        self.adopt_block(block, offset);
        Ok(())
    }

    async fn write_new_block(&self, cluster: u64, counts_itself: bool) -> Result<()> {
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut bytes = IoBufMut::zeroed(size);
        if counts_itself {
            let index = cluster % self.geometry.refcounts_per_block();
            self.set_in(&mut bytes, index, 1)?;
        }
        let file = self.file()?;
        self.image_state.event(DebugEvent::RefblockAllocWrite).await;
        file.write(self.host(cluster), bytes.freeze(), WriteFlags::empty()).await?;
        file.flush().await
    }
}
