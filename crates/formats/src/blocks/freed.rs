//! Freed blocks to which entries on disk may still refer.
//!
//! A block is freed in three steps. First, the entry that refers to the block is changed in memory, and the block is added
//! to the list. Second, a write-back writes and flushes the new entry. Third, the block is returned to the allocator, and
//! quarantined there.

use std::sync::Mutex;

use super::{Allocator, lock};

/// Blocks whose entries have changed in memory, but not yet on disk.
#[derive(Debug, Default)]
pub(crate) struct FreedBlocks(Mutex<Vec<u32>>);

/// The blocks that a write-back frees. If the write-back fails or is cancelled, the blocks wait for the next write-back.
#[derive(Debug)]
pub(crate) struct Freeing<'a> {
    list: &'a FreedBlocks,
    pub(crate) blocks: Vec<u32>,
}

impl FreedBlocks {
    /// Adds blocks. Their entries have been changed and marked as dirty.
    pub(crate) fn add(&self, blocks: impl IntoIterator<Item = u32>) {
        lock(&self.0).extend(blocks);
    }

    /// Number of blocks that wait for a write-back.
    pub(crate) fn len(&self) -> usize {
        lock(&self.0).len()
    }

    /// Removes all blocks and returns them for a write-back. The write-back copies the dirty entries after this call.
    pub(crate) fn take(&self) -> Freeing<'_> {
        Freeing { list: self, blocks: std::mem::take(&mut *lock(&self.0)) }
    }
}

impl Freeing<'_> {
    /// Ends the write-back: the new entries were written and flushed.
    pub(crate) fn free(mut self, allocator: &Allocator) {
        allocator.free(std::mem::take(&mut self.blocks));
    }
}

impl Drop for Freeing<'_> {
    fn drop(&mut self) {
        if !self.blocks.is_empty() {
            lock(&self.list.0).append(&mut self.blocks);
        }
    }
}
