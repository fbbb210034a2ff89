//! qed: the format QEMU Enhanced Disk (QED).
//!
//! Spec: docs/interop/qed_spec of QEMU. An image consists of clusters: the header, an L1 table, L2 tables and data. The L1
//! table contains the offsets of the L2 tables, and the L2 tables contain the offsets of the data clusters. A cluster that
//! is not allocated is read from the backing file, or as zeroes without a backing file. There are no refcounts: a cluster
//! is in use if an entry of a table refers to it.
//!
//! | | |
//! |---|---|
//! | `header` | parsing and encoding the header, the meaning of entries, without I/O |
//! | `header_change` | changes of the header of an open image, and the need-check flag |
//! | `lookup` | disk offset → extent; loading L2 slices |
//! | `read` | reads that the fast path cannot forward; block status |
//! | `write` | writes that allocate clusters |
//! | `zero` | zero writes and discards |
//! | `tables` | new L2 tables; changing L1 entries |
//! | `write_back` | the order in which tables reach the disk |
//! | `survey` | reading all tables: clusters in use, faults |
//! | `gaps` | moving the last clusters into unused clusters; truncating the file |
//! | `check` | check and repair |
//! | `resize`, `backing` | changes of the size and of the backing file; emptying the image |
//! | `create`, `measure` | creating an image; the size of a new image |
//! | `open`, `reopen` | opening and closing an image; changing read-only mode |
//! | `driver` | the traits `Driver` and `DriverFactory` |
//!
//! `crate::slice_cache` caches L2 tables in slices. `crate::blocks` provides the allocator of clusters of the file.
//!
//! # Locks, in the order in which they are taken
//!
//! 1. `guest`: range lock on the part of the disk whose clusters are being allocated;
//! 2. `tables`: making an L2 table;
//! 3. `writing_back`: one write-back at a time;
//! 4. `header_write`: one change of the header at a time;
//! 5. `growing`: making the file longer;
//! 6. short mutexes (of the allocator, of the cache, `l1_dirty`, `freed`, `header`), never held across I/O.
//!
//! # After a crash
//!
//! An L2 entry is written after its data has been flushed, and an L1 entry after its table has been flushed. A freed
//! cluster is allocated again only after the entries that referred to it have been changed on disk and flushed. So a crash
//! loses no flushed data, but can leave unused clusters. The need-check flag of the header is written and flushed before
//! the first cluster is allocated. A program that opens the image for writing after a crash finds the flag, and checks and
//! repairs the image.

mod backing;
mod check;
mod create;
mod driver;
mod gaps;
#[doc(hidden)]
pub mod header;
mod header_change;
mod lookup;
mod measure;
mod open;
mod read;
mod reopen;
mod resize;
mod survey;
mod tables;
mod write;
mod write_back;
mod zero;

use std::collections::BTreeSet;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::{ChildIdx, ChildrenRef, Edge, Errno, Error, ErrorKind, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use driver::QED;

use crate::blocks::{Allocator, FreedBlocks};
use crate::header_mark::Mark;
use crate::slice_cache::{Cleaner, Radix, SliceCache};
use crate::write_barrier::WriteBarrier;
use header::{Geometry, Header};

/// An open QED image.
pub(crate) struct Qed {
    geometry: Geometry,
    /// The header in the file. Its need-check flag is in `mark`.
    header: Mutex<HeaderState>,
    children: ChildrenRef,
    read_only: AtomicBool,
    /// A prepared reopen, before commit or abort.
    prepared: Mutex<Option<reopen::Prepared>>,
    /// Virtual size in bytes.
    size: AtomicU64,
    /// Byte offset of the first cluster that can store a table or data.
    first_cluster: u64,
    /// The file has at least this number of bytes. An entry that refers to this offset or a higher one is invalid.
    file_end: AtomicU64,
    /// The L1 table. An entry that is absent here is 0.
    l1: Radix<AtomicU64>,
    l1_dirty: Mutex<BTreeSet<u64>>,
    /// Slices of L2 tables. A word of a slice is an entry with its bytes swapped; see [`lookup`].
    l2: Arc<SliceCache>,
    cleaner: Cleaner,
    /// Entries of a slice.
    slice_words: u64,
    allocator: Arc<Allocator>,
    /// Freed clusters: no entry in memory refers to them, but an entry on disk may still refer to them.
    freed: FreedBlocks,
    /// State of the need-check flag in the header on disk.
    mark: Mark,
    /// The contents of the header on disk are unknown: no metadata may be written.
    stopped: AtomicBool,
    guest: RangeLock,
    tables: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    header_write: AsyncMutex<()>,
    growing: AsyncMutex<()>,
    barrier: WriteBarrier,
    /// Like `barrier`, for writes of the need-check flag.
    flag_barrier: WriteBarrier,
}

/// The header, and the name of the backing file.
#[derive(Debug, Clone)]
struct HeaderState {
    header: Header,
    backing: Option<String>,
}

impl Qed {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    /// Refuses writes that the image does not permit.
    ///
    /// # Errors
    /// Fails if the image is read-only, or if the header on disk is unknown after a failed write.
    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        self.check_running()
    }

    fn check_running(&self) -> Result<()> {
        if self.stopped.load(Acquire) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "A write to the header failed: the image has to be opened again",
            )
            .errno(Errno::IO));
        }
        Ok(())
    }

    fn header(&self) -> MutexGuard<'_, HeaderState> {
        lock(&self.header)
    }

    /// Byte offset of a cluster of the file.
    fn offset_of(&self, cluster: u32) -> u64 {
        u64::from(cluster) << self.geometry.cluster_bits
    }

    /// The cluster of the file that contains `offset`. The number fits in 32 bits for every valid entry, see
    /// [`Self::entry_end`].
    fn cluster_at(&self, offset: u64) -> u32 {
        u32::try_from(self.geometry.index(offset)).unwrap_or(u32::MAX)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
