//! Blocks without references.

use std::ptr::NonNull;

use super::block::{Block, BlockRef};

/// A block without references, which only its holder may use: the holder hands it out, keeps it for reuse, or frees
/// it.
///
/// Invariant: the header is valid and leaked from a `Box`, and no reference or other `FreeBlock` of it exists. The
/// memory of a piece of an arena is valid only while the arena exists; a cache that keeps pieces keeps the arena as
/// well.
pub(super) struct FreeBlock(NonNull<Block>);

// SAFETY: nobody but the holder uses the header and the memory (invariant), and neither is tied to a thread.
unsafe impl Send for FreeBlock {}

impl FreeBlock {
    /// # Safety
    /// The block satisfies the invariant of [`FreeBlock`].
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

    /// Returns the first reference to the block.
    pub(super) fn hand_out(self) -> BlockRef {
        // SAFETY: valid, and nobody else has it (invariant), now that this value is gone.
        unsafe { BlockRef::adopt(self.0) }
    }

    /// Returns the header, to be freed. The caller decides what happens to the memory.
    pub(super) fn into_header(self) -> Box<Block> {
        // SAFETY: leaked from a `Box`, and nobody else has it (invariant).
        unsafe { Box::from_raw(self.0.as_ptr()) }
    }

    pub(super) fn into_raw(self) -> NonNull<Block> {
        self.0
    }
}
