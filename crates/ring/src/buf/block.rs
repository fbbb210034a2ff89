//! The refcounted memory behind the buffer views.
//!
//! A [`Block`] is a header that describes one run of bytes: the address of the bytes, the number of views that share
//! them, and the place to which the memory returns when the last view is dropped. Headers are kept for reuse together
//! with their memory, so a reused block needs no allocation. All bytes that a view contains are initialised.

use std::ptr::NonNull;
use std::sync::atomic::AtomicPtr;

use super::free::FreeBlock;
use super::pool::{self, Arena};
use super::references::References;
use super::returned::Linked;

/// The place to which the memory of a block returns when the last reference is dropped.
#[derive(Clone, Copy)]
pub(crate) enum Home {
    /// A piece of a registered arena. The pointer is valid while the block is in use, because a block in use keeps
    /// the arena alive.
    Arena(NonNull<Arena>),
    /// A size class of the per-thread cache.
    Small(usize),
    /// Mapped pages, which return to the bounded process-wide cache.
    Mapped,
    /// The memory of a `Vec<u8>` with the capacity of the block.
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

/// A reference to a [`Block`]. It is included in the reference count of the block.
pub(crate) struct BlockRef(NonNull<Block>);

// SAFETY: the count is atomic, and the views govern access to the bytes (disjoint unique ranges or shared read-only
// ones), so a reference may move to any thread and be used there.
unsafe impl Send for BlockRef {}
// SAFETY: as above; `&BlockRef` only offers the atomic count and plain reads of fields that never change while shared.
unsafe impl Sync for BlockRef {}

impl BlockRef {
    /// Makes the first reference to a new or recycled block, and sets the reference count to 1.
    ///
    /// # Safety
    /// `block` is valid, and no reference to it exists.
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
