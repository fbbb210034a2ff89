//! The allocator of buffer memory: arenas, and caches of free blocks.
//!
//! * The **arena** of an I/O thread is one mapping that is registered with the ring of the thread. It is cut into
//!   pieces of 4, 16 and 64 KiB for buffers of 512 bytes to 64 KiB. Another thread that frees a piece pushes the piece
//!   to a lock-free stack of the arena.
//! * Other buffers of up to 16 KiB are **small blocks** of the global allocator. Each thread caches a few free small
//!   blocks.
//! * All other buffers are **big blocks**: page mappings of their own, because the global allocator could keep freed
//!   memory of this length instead of returning it to the system. Each thread caches a few of the big blocks that the
//!   thread freed last, because their contents are likely to be in the processor's caches. All threads share a second
//!   cache of at most [`BIG_CACHE`] bytes.
//!
//! All caches are bounded: a block that does not fit into a cache is freed. When an I/O thread becomes idle, it frees
//! the blocks in its cache ([`trim_thread`]). When all I/O threads are idle, the blocks in the shared cache are freed
//! ([`trim_shared`]). Arenas are kept. Memory that the pool allocates is zeroed, so all of its bytes are initialised.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::block::{Block, BlockRef, Home};
use super::free::FreeBlock;
use super::returned::Returned;

/// Alignment of every buffer of 512 bytes or more that comes from the pool.
pub(super) const PAGE: usize = 4096;
/// Lengths of small blocks, in bytes: one for each class.
const SMALL: [usize; 3] = [512, 4096, 16 << 10];
/// Maximum number of free blocks of each class that a thread keeps.
const SMALL_KEEP: [usize; 3] = [64, 32, 8];
/// Lengths of the pieces of an arena, in bytes: one for each class.
const ARENA_CLASSES: [usize; 3] = [4096, 16 << 10, 64 << 10];
/// Maximum length of a buffer in an arena, in bytes.
const LARGEST_PIECE: usize = 64 << 10;
/// Maximum total length of the big blocks in the shared cache, in bytes.
const BIG_CACHE: usize = 12 << 20;
/// Maximum length of one block in the shared cache, in bytes.
const LARGEST_CACHED: usize = 4 << 20;

/// Maximum number of free big blocks that a thread keeps.
const BIG_KEEP: usize = 4;
/// Maximum total length of these blocks, in bytes.
const BIG_KEEP_BYTES: usize = 1 << 20;
/// Maximum length of one of these blocks, in bytes.
const LARGEST_KEPT: usize = 512 << 10;

/// Free pieces of each class of an arena.
type Pieces = [Vec<FreeBlock>; 3];

/// The memory that an I/O thread has registered with its ring, cut into pieces of three sizes.
pub(crate) struct Arena {
    base: NonNull<u8>,
    len: usize,
    /// One header for each piece. Blocks refer to the headers by raw pointers. The headers are freed together with the
    /// arena.
    headers: OnceLock<Vec<NonNull<Block>>>,
    /// Pieces that other threads have freed.
    returned: Returned<Block>,
}

// SAFETY: the memory and headers are reached only through counted blocks or, for free pieces, by the owning thread
// and the atomic stack.
unsafe impl Send for Arena {}
// SAFETY: as above; shared access is `base`, `len` (constant) and the atomic stack.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps about `bytes` bytes and cuts them: a quarter into pieces of 4 KiB, a quarter into 16 KiB, half into 64 KiB.
    fn new(bytes: usize) -> io::Result<(Arc<Arena>, Pieces)> {
        let counts = [
            bytes / 4 / ARENA_CLASSES[0],
            bytes / 4 / ARENA_CLASSES[1],
            bytes / 2 / ARENA_CLASSES[2],
        ];
        let len = counts.iter().zip(ARENA_CLASSES).map(|(n, size)| n * size).sum();
        let base = map_pages(len)?;
        let arena =
            Arc::new(Arena { base, len, headers: OnceLock::new(), returned: Returned::new() });
        // SAFETY: an `Arc`'s pointer is never null.
        let home = Home::Arena(unsafe { NonNull::new_unchecked(Arc::as_ptr(&arena).cast_mut()) });
        let mut free = [Vec::new(), Vec::new(), Vec::new()];
        let mut headers = Vec::new();
        let mut at = 0;
        for ((list, size), count) in free.iter_mut().zip(ARENA_CLASSES).zip(counts) {
            for _ in 0..count {
                // SAFETY: `at + size <= len`, because `len` is the sum of the sizes of all pieces.
                let piece = unsafe { base.add(at) };
                at += size;
                let header = NonNull::from(Box::leak(Box::new(Block::new(piece, size, home))));
                headers.push(header);
                // SAFETY: the header was just leaked from a box. It is in no other list, and is freed with the arena.
                list.push(unsafe { FreeBlock::new(header) });
            }
            list.reverse();
        }
        let _ = arena.headers.set(headers);
        Ok((arena, free))
    }

    /// The memory that is registered with the ring.
    pub(crate) fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.base.as_ptr().cast(), iov_len: self.len }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for header in self.headers.get().into_iter().flatten() {
            // SAFETY: made by `Box::leak` in `new`. Every block in use holds a reference to the arena, so no block is
            // in use.
            drop(unsafe { Box::from_raw(header.as_ptr()) });
        }
        unmap_pages(self.base, self.len);
    }
}

/// The free memory of the calling thread.
///
/// No code that runs while the pool is borrowed uses the pool again: this code only takes and adds blocks, and calls
/// the global allocator, `mmap` and `munmap`. A reference to an arena is dropped only when the pool is not borrowed,
/// because the drop can run other code. At the end of the thread, destructors of other thread-local values may run
/// after the pool was dropped. Blocks are then allocated anew, and freed blocks return to their arena, to the shared
/// cache, or to the system.
struct ThreadPool {
    arena: Option<Arc<Arena>>,
    /// All pieces belong to `arena`, which keeps them valid.
    pieces: Pieces,
    small: [Vec<FreeBlock>; 3],
    /// Big blocks that this thread freed last, the newest at the end of the list.
    big: Vec<FreeBlock>,
    /// Total length of `big` in bytes.
    big_bytes: usize,
}

thread_local! {
    static POOL: RefCell<ThreadPool> = const {
        RefCell::new(ThreadPool {
            arena: None,
            pieces: [const { Vec::new() }; 3],
            small: [const { Vec::new() }; 3],
            big: Vec::new(),
            big_bytes: 0,
        })
    };
}

/// Gives the calling thread an arena of about `bytes` bytes, instead of its previous arena.
pub(crate) fn install_arena(bytes: usize) -> io::Result<Arc<Arena>> {
    let (arena, pieces) = Arena::new(bytes)?;
    let before = POOL.with_borrow_mut(|pool| pool.exchange(Some(Arc::clone(&arena)), pieces));
    drop(before);
    Ok(arena)
}

/// Takes the arena from the calling thread. Buffers in use keep the memory of the arena.
pub(crate) fn uninstall_arena() {
    let none = [const { Vec::new() }; 3];
    let before = POOL.try_with(|pool| pool.borrow_mut().exchange(None, none));
    drop(before);
}

impl ThreadPool {
    /// Replaces the arena and its free pieces. Returns the previous arena, which the caller drops.
    fn exchange(&mut self, arena: Option<Arc<Arena>>, pieces: Pieces) -> Option<Arc<Arena>> {
        // The pieces of the previous arena are freed together with that arena.
        self.pieces = pieces;
        std::mem::replace(&mut self.arena, arena)
    }

    fn take_piece(&mut self, len: usize) -> Option<BlockRef> {
        let arena = self.arena.as_ref()?;
        let wanted = ARENA_CLASSES.iter().position(|&size| size >= len)?;
        if self.pieces.get(wanted)?.is_empty() {
            arena.returned.take(|block| {
                // SAFETY: the block was free when it was pushed to the stack, and has now been removed from the stack.
                put_piece(&mut self.pieces, unsafe { FreeBlock::new(block) });
            });
        }
        let block = self.pieces.get_mut(wanted)?.pop()?;
        // SAFETY: the pointer comes from this `Arc`. `recycle_piece` drops the reference.
        unsafe { Arc::increment_strong_count(Arc::as_ptr(arena)) };
        Some(block.into_ref())
    }
}

fn put_piece(pieces: &mut Pieces, block: FreeBlock) {
    if let Some(class) = ARENA_CLASSES.iter().position(|&size| size == block.capacity()) {
        pieces[class].push(block);
    }
}

impl ThreadPool {
    /// Frees the small and big blocks that are kept for reuse.
    fn trim(&mut self) {
        for (class, list) in self.small.iter_mut().enumerate() {
            list.drain(..).for_each(|block| free_small(block, class));
        }
        self.big_bytes = 0;
        self.big.drain(..).for_each(unmap);
    }

    /// Takes the newest free big block of this capacity that the thread keeps.
    fn take_big(&mut self, capacity: usize) -> Option<FreeBlock> {
        let at = self.big.iter().rposition(|block| block.capacity() == capacity)?;
        self.big_bytes -= capacity;
        Some(self.big.remove(at))
    }

    /// Keeps a free big block. Passes the blocks that exceed the limits, the oldest first, to `release`.
    fn keep_big(&mut self, block: FreeBlock, mut release: impl FnMut(FreeBlock)) {
        if block.capacity() > LARGEST_KEPT {
            return release(block);
        }
        self.big_bytes += block.capacity();
        self.big.push(block);
        while self.big.len() > BIG_KEEP || self.big_bytes > BIG_KEEP_BYTES {
            let oldest = self.big.remove(0);
            self.big_bytes -= oldest.capacity();
            release(oldest);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.trim();
    }
}

/// Frees the small and big blocks that the calling thread keeps for reuse. The arena stays, because it is registered
/// with the kernel.
pub(crate) fn trim_thread() {
    let _ = POOL.try_with(|pool| pool.borrow_mut().trim());
}

/// Frees the blocks in the shared cache, and makes the allocator return its free pages to the system (glibc only).
pub(crate) fn trim_shared() {
    let blocks = {
        let mut cache = BIG.lock().unwrap_or_else(PoisonError::into_inner);
        cache.bytes = 0;
        std::mem::take(&mut cache.blocks)
    };
    blocks.into_iter().for_each(unmap);
    #[cfg(target_env = "gnu")]
    // SAFETY: the function has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Returns a block of at least `len` bytes, and whether its bytes are known to be zero.
///
/// Aborts the process if the system has no memory.
pub(super) fn take(len: usize) -> (BlockRef, bool) {
    let layout = Layout::from_size_align(len, PAGE).unwrap_or(Layout::new::<u8>());
    try_take(len).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Like [`take`], but returns `None` if the system has no memory for a block of more than 16 KiB.
pub(super) fn try_take(len: usize) -> Option<(BlockRef, bool)> {
    // Buffers of less than 512 bytes need no page alignment and are not worth a piece of the arena.
    if (SMALL[0]..=LARGEST_PIECE).contains(&len) {
        let piece = POOL.try_with(|pool| pool.borrow_mut().take_piece(len)).ok().flatten();
        if let Some(piece) = piece {
            return Some((piece, false));
        }
    }
    match small_class(len) {
        Some(class) => Some(take_small(class)),
        None => take_big(len),
    }
}

/// The class of the small blocks for buffers of `len` bytes; `None` if `len` is more than 16 KiB.
fn small_class(len: usize) -> Option<usize> {
    if len < SMALL[0] {
        return Some(0);
    }
    SMALL.iter().skip(1).position(|&size| size >= len).map(|i| i + 1)
}

fn take_small(class: usize) -> (BlockRef, bool) {
    let kept = POOL.try_with(|pool| pool.borrow_mut().small[class].pop()).ok().flatten();
    match kept {
        Some(block) => (block.into_ref(), false),
        None => (new_small(class), true),
    }
}

fn small_layout(class: usize) -> Layout {
    let align = if class == 0 { 64 } else { PAGE };
    // SAFETY: both alignments are powers of two and the sizes are far below `isize::MAX`.
    unsafe { Layout::from_size_align_unchecked(SMALL[class], align) }
}

fn new_small(class: usize) -> BlockRef {
    let layout = small_layout(class);
    // SAFETY: the layout is not empty.
    let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
        handle_alloc_error(layout)
    };
    let header = Box::leak(Box::new(Block::new(memory, SMALL[class], Home::Small(class))));
    // SAFETY: the block was just made, so no reference to it exists.
    unsafe { BlockRef::adopt(NonNull::from(header)) }
}

/// Frees a block that `new_small` has made.
fn free_small(block: FreeBlock, class: usize) {
    debug_assert!(matches!(block.header().home, Home::Small(of) if of == class));
    let header = block.into_header();
    // SAFETY: the lists of a class contain only blocks of `new_small`, which has allocated the memory with this layout.
    // No one else has the block.
    unsafe { dealloc(header.ptr.as_ptr(), small_layout(class)) };
}

/// The shared cache of free big blocks, the newest at the end of the list.
struct BigCache {
    blocks: VecDeque<FreeBlock>,
    bytes: usize,
}

static BIG: Mutex<BigCache> = Mutex::new(BigCache { blocks: VecDeque::new(), bytes: 0 });

/// Rounds a length up so that a block can be reused for other lengths. At most a quarter of the length is added.
fn round_big(len: usize) -> usize {
    let step = (len.checked_next_power_of_two().unwrap_or(len) / 8).max(PAGE);
    len.checked_next_multiple_of(step).unwrap_or(len)
}

fn take_big(len: usize) -> Option<(BlockRef, bool)> {
    let capacity = round_big(len);
    let kept = POOL.try_with(|pool| pool.borrow_mut().take_big(capacity)).ok().flatten();
    if let Some(block) = kept.or_else(|| take_shared(capacity)) {
        return Some((block.into_ref(), false));
    }
    let mapped = map_pages(capacity).or_else(|_| {
        // Free the blocks that are kept for reuse, and try again.
        trim_thread();
        trim_shared();
        map_pages(capacity)
    });
    let header = Box::leak(Box::new(Block::new(mapped.ok()?, capacity, Home::Mapped)));
    // SAFETY: the block was just made, so no reference to it exists.
    Some((unsafe { BlockRef::adopt(NonNull::from(header)) }, true))
}

/// Takes the newest block of this capacity from the shared cache.
fn take_shared(capacity: usize) -> Option<FreeBlock> {
    if capacity > LARGEST_CACHED {
        return None;
    }
    let mut cache = BIG.lock().unwrap_or_else(PoisonError::into_inner);
    let at = cache.blocks.iter().rposition(|block| block.capacity() == capacity)?;
    cache.bytes -= capacity;
    cache.blocks.remove(at)
}

fn recycle_big(block: FreeBlock) {
    let mut block = Some(block);
    let _ = POOL.try_with(|pool| {
        if let Some(block) = block.take() {
            pool.borrow_mut().keep_big(block, recycle_shared);
        }
    });
    // A thread whose pool was dropped keeps no block.
    block.into_iter().for_each(recycle_shared);
}

/// Puts a free big block into the shared cache. A block longer than [`LARGEST_CACHED`] is returned to the system, and
/// so are the oldest blocks if the cache is full.
fn recycle_shared(block: FreeBlock) {
    if block.capacity() > LARGEST_CACHED {
        return unmap(block);
    }
    let mut dropped = Vec::new();
    {
        let mut cache = BIG.lock().unwrap_or_else(PoisonError::into_inner);
        cache.bytes += block.capacity();
        cache.blocks.push_back(block);
        while cache.bytes > BIG_CACHE {
            let Some(oldest) = cache.blocks.pop_front() else { break };
            cache.bytes -= oldest.capacity();
            dropped.push(oldest);
        }
    }
    dropped.into_iter().for_each(unmap);
}

/// Frees a block of `Home::Mapped`.
fn unmap(block: FreeBlock) {
    debug_assert!(matches!(block.header().home, Home::Mapped));
    let header = block.into_header();
    unmap_pages(header.ptr, header.capacity);
}

/// Keeps or frees a block whose last reference was dropped.
pub(super) fn recycle(block: FreeBlock) {
    match block.header().home {
        Home::Arena(arena) => recycle_piece(block, arena),
        Home::Small(class) => recycle_small(block, class),
        Home::Mapped => recycle_big(block),
        Home::Vec => {
            let header = block.into_header();
            // SAFETY: memory and capacity are those of the `Vec` that `from_vec` took apart.
            drop(unsafe { Vec::from_raw_parts(header.ptr.as_ptr(), 0, header.capacity) });
        }
        // The memory is never freed.
        Home::Static => drop(block.into_header()),
    }
}

/// Returns a piece to its arena. The arena may belong to another thread, or to a thread that has ended.
fn recycle_piece(block: FreeBlock, arena: NonNull<Arena>) {
    let mut block = Some(block);
    let _ = POOL.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        let own = |mine: &Arc<Arena>| ptr::eq(Arc::as_ptr(mine), arena.as_ptr());
        if pool.arena.as_ref().is_some_and(own)
            && let Some(block) = block.take()
        {
            put_piece(&mut pool.pieces, block);
        }
    });
    if let Some(block) = block {
        // SAFETY: the piece is free and holds a reference to its arena, which is dropped below. The piece is valid as
        // long as the arena.
        unsafe { arena.as_ref().returned.put(block.into_raw()) };
    }
    // SAFETY: drops the reference that `take_piece` added. The pointer came from `Arc::as_ptr`.
    unsafe { Arc::decrement_strong_count(arena.as_ptr()) };
}

fn recycle_small(block: FreeBlock, class: usize) {
    let mut block = Some(block);
    let _ = POOL.try_with(|pool| {
        let list = &mut pool.borrow_mut().small[class];
        if list.len() < SMALL_KEEP[class] {
            list.extend(block.take());
        }
    });
    if let Some(block) = block {
        free_small(block, class);
    }
}

/// Takes over the memory of a vector.
pub(super) fn from_vec(vec: Vec<u8>) -> BlockRef {
    let mut vec = std::mem::ManuallyDrop::new(vec);
    // The spare capacity is not initialised. No view contains it: all views lie in the first `len` bytes.
    let (len, capacity) = (vec.len(), vec.capacity());
    debug_assert!(len <= capacity);
    // SAFETY: a vector's pointer is never null.
    let memory = unsafe { NonNull::new_unchecked(vec.as_mut_ptr()) };
    let header = Box::leak(Box::new(Block::new(memory, capacity, Home::Vec)));
    // SAFETY: the block was just made, so no reference to it exists.
    unsafe { BlockRef::adopt(NonNull::from(header)) }
}

/// Makes a block of static bytes. The bytes are never freed and never written.
pub(super) fn from_static(bytes: &'static [u8]) -> BlockRef {
    // SAFETY: a slice's pointer is never null.
    let memory = unsafe { NonNull::new_unchecked(bytes.as_ptr().cast_mut()) };
    shared_static(memory, bytes.len())
}

/// A run of zeroes that is never freed. It uses no memory for data: private pages that are only read map the kernel's
/// zero page.
pub(super) fn static_zeroes(len: usize) -> BlockRef {
    let Ok(memory) = map_pages(len) else {
        handle_alloc_error(Layout::from_size_align(len, PAGE).unwrap_or(Layout::new::<u8>()))
    };
    shared_static(memory, len)
}

fn shared_static(memory: NonNull<u8>, len: usize) -> BlockRef {
    let header = Box::leak(Box::new(Block::new(memory, len, Home::Static)));
    // SAFETY: the block was just made, so no reference to it exists.
    unsafe { BlockRef::adopt(NonNull::from(header)) }
}

pub(super) fn map_pages(len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh anonymous mapping touches no memory of ours.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

pub(super) fn unmap_pages(base: NonNull<u8>, len: usize) {
    // SAFETY: the range was mapped by `map_pages` and nobody refers to it any more.
    unsafe { libc::munmap(base.as_ptr().cast(), len) };
}
