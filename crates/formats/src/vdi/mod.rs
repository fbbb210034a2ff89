//! vdi: VirtualBox's disk image format.
//!
//! An image is `header | block map | blocks`. A block has 1 MiB, and the map has a 32-bit entry for each block of the disk: which
//! block of the file holds it, or that it reads as zeroes. Blocks are allocated from 0 on without gaps, and the header has
//! how many there are. A dynamic image allocates a block when it is first written; a static one has all from the beginning.
//!
//! | | |
//! |---|---|
//! | `header` | the header, pure |
//! | `entry` | entries of the block map, pure |
//! | `extent` | disk offset → extent; loading the map |
//! | `read_write` | requests that the map of the fast path cannot answer |
//! | `write_back` | the order in which the header and the map reach the disk |
//! | `survey` | what the whole map says: blocks in use, faults |
//! | `gaps` | filling gaps with the last blocks |
//! | `check` | check and repair |
//! | `create`, `measure`, `open`, `reopen`, `driver` | what the names say |
//!
//! The map in memory, and which blocks of the file are in use, are kept by `blocks`.
//!
//! # Locks, in the order in which they are taken
//!
//! 1. `guest`: range lock over the blocks of the disk that are being allocated;
//! 2. `writing_back`: one write-back at a time;
//! 3. `growing`: making the file longer;
//! 4. short mutexes (of the allocator, of the dirty sectors), never across I/O.
//!
//! # What a crash leaves
//!
//! An entry is written after the data of its block is durable, after the file is long enough, and after the header counts the
//! block. So a crash loses nothing that was flushed, and may leave blocks that the header counts and no entry names. They are
//! leaks. The next program that opens the image for writing through this driver allocates them first, and when it closes the image,
//! the last blocks fill the gaps that are left.

mod check;
mod create;
mod driver;
mod entry;
mod extent;
mod gaps;
#[doc(hidden)]
pub mod header;
mod measure;
mod open;
mod read_write;
mod reopen;
mod survey;
mod write_back;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::{ChildIdx, ChildrenRef, Edge, Error, ErrorKind, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use driver::VDI;
pub use entry::Entry;

use crate::blocks::{Allocator, DirtySectors, EntryMap};
use crate::write_barrier::WriteBarrier;
use header::Header;

/// An open vdi image.
pub(crate) struct Vdi {
    /// As the image was opened. What it says of allocated blocks is `allocated_on_disk`.
    header: Header,
    children: ChildrenRef,
    read_only: AtomicBool,
    map: EntryMap,
    allocator: Arc<Allocator>,
    /// How many blocks are allocated, as the header says it on disk (see `write_back`).
    allocated_on_disk: AtomicU64,
    /// The allocator knows which blocks are in use. Requests allocate none until it does: after an image was opened for a
    /// check, and after gaps could not be filled.
    surveyed: AtomicBool,
    /// The file has all blocks before this one.
    whole_blocks: AtomicU32,
    dirty: DirtySectors,
    guest: RangeLock,
    growing: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
    /// A reopen that waits for commit or abort.
    prepared: Mutex<Option<reopen::Prepared>>,
}

impl Vdi {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
