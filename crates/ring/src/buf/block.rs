//! The refcounted memory behind the buffer views.
//!
//! A [`Block`] is a header that describes one run of bytes: where the bytes lie, how many views share them and where
//! the memory goes when the last view is dropped. Headers are recycled together with their memory, so that taking a
//! buffer from a pool allocates nothing. All bytes of a block are initialised from the moment the block is made.

use std::ptr::NonNull;
use std::sync::atomic::AtomicPtr;

use super::free::FreeBlock;
use super::pool::{self, Arena};
use super::references::References;
use super::returned::Linked;

/// Where the memory of a block goes when its last reference is dropped.
#[derive(Clone, Copy)]
pub(crate) enum Home {
    /// A piece of a registered arena. The pointer is valid while the block is in use, because the block then counts
    /// as a reference to the arena.
    Arena(NonNull<Arena>),
    /// A size class of the per-thread cache.
    Small(usize),
    /// Page-mapped memory, kept by the bounded process-wide cache.
    Mapped,
    /// Taken over from a `Vec<u8>` of the block's capacity.
    Vec,
    /// Memory that is never freed and never unique.
    Static,
}

/// Header of one refcounted run of bytes.
pub(crate) struct Block {
    refs: References,
    pub(super) ptr: NonNull<u8>,
    pub(super) capacity: usize,
    pub(super) home: Home,
    /// Link in the arena's stack of blocks that other threads returned.
    next: AtomicPtr<Block>,
}

impl Linked for Block {
    fn link(&self) -> &AtomicPtr<Block> {
        &self.next
    }
}

impl Block {
    pub(super) fn new(ptr: NonNull<u8>, capacity: usize, home: Home) -> Block {
        Block {
            refs: References::one(),
            ptr,
            capacity,
            home,
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

/// One counted reference to a [`Block`].
pub(crate) struct BlockRef(NonNull<Block>);

// SAFETY: the count is atomic, and the views govern access to the bytes (disjoint unique ranges or shared read-only
// ones), so a reference may move to any thread and be used there.
unsafe impl Send for BlockRef {}
// SAFETY: as above; `&BlockRef` only offers the atomic count and plain reads of fields that never change while shared.
unsafe impl Sync for BlockRef {}

impl BlockRef {
    /// Takes over the one reference that the count of a fresh or recycled header stands for.
    ///
    /// # Safety
    /// `block` is valid, nobody else uses it, and its count is meant to become one.
    pub(super) unsafe fn adopt(block: NonNull<Block>) -> BlockRef {
        // SAFETY: valid by the caller's promise.
        unsafe { block.as_ref() }.refs.restart();
        BlockRef(block)
    }

    fn block(&self) -> &Block {
        // SAFETY: the header lives at least as long as any counted reference to it.
        unsafe { self.0.as_ref() }
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.block().ptr
    }

    pub(super) fn capacity(&self) -> usize {
        self.block().capacity
    }

    pub(super) fn same(&self, other: &BlockRef) -> bool {
        self.0 == other.0
    }

    /// Whether the memory is part of `arena`.
    pub(super) fn is_in(&self, arena: Option<&Arena>) -> bool {
        match (self.block().home, arena) {
            (Home::Arena(mine), Some(arena)) => std::ptr::eq(mine.as_ptr(), arena),
            _ => false,
        }
    }

    /// Whether this is the only reference, so that its holder has exclusive use of the bytes.
    pub(super) fn is_unique(&self) -> bool {
        !matches!(self.block().home, Home::Static) && self.block().refs.is_one()
    }
}

impl Clone for BlockRef {
    fn clone(&self) -> BlockRef {
        self.block().refs.add();
        BlockRef(self.0)
    }
}

impl Drop for BlockRef {
    fn drop(&mut self) {
        if !self.block().refs.release() {
            return;
        }
        // SAFETY: this was the last reference, so nobody else uses the header or the memory.
        pool::recycle(unsafe { FreeBlock::new(self.0) });
    }
}
