//! parallels: the expandable disk image format of Parallels.
//!
//! Spec: docs/interop/parallels of QEMU. An image is `header | BAT | clusters`. The BAT has a 32-bit entry for each cluster
//! of the disk: the position of the cluster in the file, or 0 if the cluster reads as zeroes. A discarded cluster is freed
//! and can be allocated again.
//!
//! | | |
//! |---|---|
//! | `header` | parsing and encoding the header, without I/O |
//! | `extent` | the layout for `crate::blocks`: disk offset → extent; status |
//! | `read_write` | zero writes and discards |
//! | `write_back` | the order in which the BAT reaches the disk; closing |
//! | `survey` | checking all entries of the BAT: clusters in use, faults |
//! | `check` | check and repair |
//! | `create`, `open`, `reopen` | creating and opening an image; changing read-only mode |
//! | `driver` | the traits `Driver` and `DriverFactory` |
//!
//! `crate::blocks` provides the BAT in memory, the allocator of clusters of the file, and the requests that are the same for
//! vdi and parallels.
//!
//! # Locks, in the order in which they are taken
//!
//! 1. `guest`: range lock on the clusters of the disk that are being allocated or freed;
//! 2. `writing_back`: one write-back at a time;
//! 3. `growing`: making the file longer;
//! 4. short mutexes (of the allocator, of the dirty sectors, `freed`), never held across I/O.
//!
//! # After a crash
//!
//! An entry is written after the data of its cluster has been flushed. A freed cluster is allocated again only after the 0
//! in its entry has been written and flushed. So a crash loses no flushed data. After a crash the header says that the
//! image was not closed, and clusters at the end of the file may be unused. When this driver opens such an image for
//! writing, it checks and repairs the image.

mod check;
mod create;
mod driver;
mod extent;
#[doc(hidden)]
pub mod header;
mod open;
mod read_write;
mod reopen;
mod survey;
mod write_back;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use oxblk_core::ChildrenRef;
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use driver::PARALLELS;

use crate::blocks::reopen::WriteAccess;
use crate::blocks::{Allocator, DirtySectors, EntryMap, FreedBlocks};
use crate::header_mark::Mark;
use crate::write_barrier::WriteBarrier;
use header::Header;
use survey::Survey;

/// An open parallels image.
pub(crate) struct Parallels {
    /// The header when the image was opened.
    header: Header,
    children: ChildrenRef,
    access: WriteAccess<Survey>,
    map: EntryMap,
    allocator: Arc<Allocator>,
    /// State of the field `in_use` in the header on disk.
    mark: Mark,
    /// A program that opened the image before did not close it, and the image has not been repaired.
    unclean: AtomicBool,
    /// Whether the field `data_off` of the header on disk is valid.
    data_offset_is_valid: AtomicBool,
    /// All clusters with a lower number lie completely inside the file.
    whole_clusters: AtomicU32,
    dirty: DirtySectors,
    /// Freed clusters: their entries are 0 in memory, but possibly not on disk yet.
    freed: FreedBlocks,
    guest: RangeLock,
    growing: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
}

impl Parallels {
    /// Changes a BAT entry and marks it as dirty. A thread that reads the new entry also sees all writes to memory before
    /// this call.
    fn set_entry(&self, index: u32, number: u32) {
        self.dirty.change(index, || self.map.set(index, number));
    }
}
