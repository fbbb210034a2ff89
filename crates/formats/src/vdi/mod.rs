//! vdi: VirtualBox's disk image format.
//!
//! An image is `header | block map | blocks`. A block has 1 MiB. The map has a 32-bit entry for each block of the disk: the
//! number of the block in the file, or a special value if the block reads as zeroes. The header contains the number of
//! allocated blocks. In an image without leaks, these blocks have the numbers from 0 on, without gaps. In a dynamic image, a
//! block is allocated when it is first written. In a static image, all blocks are allocated when the image is created.
//!
//! | | |
//! |---|---|
//! | `header` | parsing and encoding the header, without I/O |
//! | `entry` | entries of the block map, without I/O |
//! | `extent` | the layout for `crate::blocks`: disk offset → extent; status |
//! | `read_write` | zero writes and discards |
//! | `write_back` | the order in which the header and the map reach the disk |
//! | `survey` | checking all entries of the map: blocks in use, faults |
//! | `gaps` | moving the last blocks into gaps |
//! | `check` | check and repair |
//! | `create`, `measure` | creating an image; the size of a new image |
//! | `open`, `reopen` | opening an image; changing read-only mode |
//! | `driver` | the traits `Driver` and `DriverFactory` |
//!
//! `crate::blocks` provides the map in memory, the allocator of blocks of the file, and the requests that are the same for vdi
//! and parallels.
//!
//! # Locks, in the order in which they are taken
//!
//! 1. `guest`: range lock on the blocks of the disk that are being allocated;
//! 2. `writing_back`: one write-back at a time;
//! 3. `growing`: making the file longer;
//! 4. short mutexes (of the allocator, of the dirty sectors), never held across I/O.
//!
//! # After a crash
//!
//! Before an entry is written, the data of its block has been flushed, the file contains the block, and the number of
//! allocated blocks in the header includes the block. So a crash loses no flushed data. A crash can leave leaks: blocks
//! that the number in the header includes, but to which no entry refers. After this driver has opened the image for
//! writing, it allocates such blocks first. When it closes the image, it moves the last blocks into the remaining gaps, if
//! there are only a few.

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

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use oxblk_core::ChildrenRef;
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use driver::VDI;
pub use entry::Entry;

use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::write_barrier::WriteBarrier;
use header::Header;
use survey::Survey;

/// An open vdi image.
pub(crate) struct Vdi {
    /// The header when the image was opened. The current number of allocated blocks is in `allocated_on_disk`.
    header: Header,
    children: ChildrenRef,
    access: WriteAccess<Survey>,
    map: EntryMap,
    allocator: Arc<Allocator>,
    /// The number of allocated blocks in the header on disk (see `write_back`).
    allocated_on_disk: AtomicU64,
    /// All blocks with a lower number lie completely inside the file.
    whole_blocks: AtomicU32,
    dirty: DirtySectors,
    /// Old copies of blocks that have been moved. An entry on disk may still refer to them.
    freed: FreedBlocks,
    guest: RangeLock,
    growing: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
}
