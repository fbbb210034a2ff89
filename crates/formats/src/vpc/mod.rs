//! vpc: the VHD format of Virtual PC, Hyper-V and Azure.
//!
//! A fixed image is `data | footer`. A dynamic image is `copy of the footer | header | BAT | blocks | footer`. The BAT
//! (block allocation table) has a 32-bit entry for each block of the disk: the sector of the file where the block starts,
//! or a special value if the block reads as zeroes. A block of the file is `sector bitmap | data`. All numbers are
//! big-endian.
//!
//! | | |
//! |---|---|
//! | `geometry`, `footer`, `header` | parsing and encoding, without I/O |
//! | `metadata` | reading the footers and the header; choosing one of the two footers |
//! | `entry` | entries of the BAT |
//! | `extent` | disk offset → extent; loading the BAT |
//! | `slots` | the places of new blocks in the file |
//! | `sector_bitmap` | the sector bitmaps of blocks |
//! | `read_write` | requests that the fast path cannot forward |
//! | `write_back` | the order in which the BAT reaches the disk |
//! | `file_end` | the footer after the last block; closing |
//! | `survey` | checking all entries of the BAT: blocks in use, faults |
//! | `check`, `repair` | check and repair |
//! | `fixed` | fixed images |
//! | `create`, `measure` | creating an image; the size of a new image |
//! | `open`, `reopen` | opening an image; changing read-only mode |
//! | `driver` | the traits `Driver` and `DriverFactory` |
//!
//! `crate::blocks` provides the BAT in memory and the allocator of slots.
//!
//! # Locks, in the order in which they are taken
//!
//! 1. `guest`: range lock on the blocks of the disk that are being allocated;
//! 2. `writing_back`: one write-back at a time;
//! 3. `growing`: making the file longer, and writing the footer at its end;
//! 4. short mutexes (of the allocator, of the dirty sectors), never held across I/O.
//!
//! # After a crash
//!
//! An entry is written after the data of its block has been flushed. So a crash loses no flushed data. Before a new block
//! overwrites the footer at the end of the file, the footer is written after the block, without a flush. So after a crash,
//! the file possibly does not end with a footer. In this case the copy at the beginning is used. The driver does not
//! change this copy while it is valid. If this driver has opened such an image for writing, it writes the footer when it
//! closes the image. If the copy at the beginning is damaged, it is written and flushed before the first new block.

mod check;
mod create;
mod driver;
mod entry;
mod extent;
mod file_end;
mod fixed;
#[doc(hidden)]
pub mod footer;
mod geometry;
#[doc(hidden)]
pub mod header;
mod measure;
mod metadata;
mod open;
mod read_write;
mod reopen;
mod repair;
mod sector_bitmap;
mod slots;
mod survey;
mod write_back;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use oxblk_core::{ChildIdx, ChildrenRef, Edge, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use driver::VPC;
pub use entry::Entry;

use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::write_barrier::WriteBarrier;
use file_end::FileEnd;
use footer::SizeRule;
use metadata::Metadata;
use sector_bitmap::FullBitmaps;
use survey::Survey;

/// An open dynamic image.
pub(crate) struct Vpc {
    /// The footer and the header when the image was opened.
    metadata: Metadata,
    /// Virtual size in bytes.
    size: u64,
    /// Selects the field of the footer from which `size` was read.
    rule: SizeRule,
    children: ChildrenRef,
    access: WriteAccess<Survey>,
    map: EntryMap,
    /// Allocates slots; see `slots`.
    allocator: Arc<Allocator>,
    /// Byte offset of slot 0. The offset is computed before the first write to the image.
    first_slot: AtomicU64,
    /// The file has at least this length in bytes.
    file_len: AtomicU64,
    end: FileEnd,
    full: FullBitmaps,
    dirty: DirtySectors,
    /// Old slots of blocks that have been moved. An entry on disk may still refer to them.
    freed: FreedBlocks,
    guest: RangeLock,
    growing: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
}

impl Vpc {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }
}
