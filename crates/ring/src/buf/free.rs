//! Blocks that nobody refers to.

use std::ptr::NonNull;

use super::block::{Block, BlockRef};

/// A block without references, which its holder alone may use: hand it out, keep it for reuse, or free it.
///
/// Invariant: the header is valid and leaked from a `Box`, and no reference or other `FreeBlock` of it exists. The memory of
/// a piece of an arena is valid only while the arena is; whoever keeps pieces keeps the arena as well.
pub(super) struct FreeBlock(NonNull<Block>);

// SAFETY: the header and the memory belong to the holder alone (invariant), and neither is tied to a thread.
unsafe impl Send for FreeBlock {}

impl FreeBlock {
    /// # Safety
    /// The block is as the invariant says.
    pub(super) unsafe fn new(block: NonNull<Block>) -> FreeBlock {
        FreeBlock(block)
    }

    pub(super) fn header(&self) -> &Block {
        // SAFETY: valid, and nobody else has it (invariant).
        unsafe { self.0.as_ref() }
    }

    pub(super) fn capacity(&self) -> usize {
        self.header().capacity
    }

    /// The first reference to the block.
    pub(super) fn hand_out(self) -> BlockRef {
        // SAFETY: valid, and nobody else has it (invariant), now that this value is gone.
        unsafe { BlockRef::adopt(self.0) }
    }

    /// The header, to be freed. What happens to the memory is up to the caller.
    pub(super) fn into_header(self) -> Box<Block> {
        // SAFETY: leaked from a `Box`, and nobody else has it (invariant).
        unsafe { Box::from_raw(self.0.as_ptr()) }
    }

    pub(super) fn into_raw(self) -> NonNull<Block> {
        self.0
    }
}
