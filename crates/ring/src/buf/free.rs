//! Blocks without references.

use std::ptr::NonNull;

use super::block::{Block, BlockRef};

/// A block without references. Only the owner of this value may use the block: the owner makes a reference to it,
/// keeps it for reuse, or frees it.
///
/// Invariant: the header is valid and leaked from a `Box`, and neither a reference to the block nor another
/// `FreeBlock` of it exists. A piece of an arena is valid only while the arena exists, so a cache of pieces also
/// keeps the arena.
pub(super) struct FreeBlock(NonNull<Block>);

// SAFETY: only the owner of this value uses the header and the memory (invariant), and both may be used on any
// thread.
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
    pub(super) fn into_ref(self) -> BlockRef {
        // SAFETY: the header is valid and nobody else uses it (invariant), and this call consumes the value.
        unsafe { BlockRef::adopt(self.0) }
    }

    /// Returns the header, which is freed when it is dropped. The caller reuses or frees the memory.
    pub(super) fn into_header(self) -> Box<Block> {
        // SAFETY: the header was leaked from a `Box`, and nobody else uses it (invariant).
        unsafe { Box::from_raw(self.0.as_ptr()) }
    }

    pub(super) fn into_raw(self) -> NonNull<Block> {
        self.0
    }
}
