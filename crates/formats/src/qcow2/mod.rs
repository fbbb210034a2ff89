//! qcow2: QEMU's copy-on-write image format.
//!
//! Spec: docs/interop/qcow2. The rooms:
//!
//! | | |
//! |---|---|
//! | `layout/` | on-disk structures, pure |
//! | `cache/` | L2 and refcount tables in slices, read without a lock |
//! | `refcounts`, `refcount_blocks`, `allocator`, `counted` | which host clusters are in use, free, reserved, quarantined |
//! | `lookup` | guest offset → extent |
//! | `data` | guest data at its host offset: which child, where new data goes, and what is done to it |
//! | `encryption/` | encryption of guest data |
//! | `read`, `write`, `discard`, `compressed` | requests that the map cannot answer |
//! | `subclusters/` | all that differs where L2 entries describe subclusters |
//! | `tables`, `l1_table` | making L2 tables; moving the L1 table to a bigger place |
//! | `refscan/` | what tables refer to, found out in bulk |
//! | `read_ahead` | metadata whose length is not known yet |
//! | `write_back` | the order in which metadata reaches the disk |
//! | `bitmaps/` | persistent dirty bitmaps |
//! | `resize`, `shrink`, `preallocate`, `snapshots/`, `vm_state`, `status`, `check/`, `compact/`, `create`, `measure` | what the names say |
//! | `plan` | where everything in a new image lies |
//! | `header` | the header as a whole |
//! | `amend/` | other options |
//! | `backing`, `trim` | another backing file, giving up all contents; the end of the file |
//! | `run_options`, `overlap` | how an open image is worked with; metadata that lies on other metadata |
//! | `open`, `factory`, `reopen` | how a node comes to be, and to be another |
//!
//! # Locks, in the order in which they are taken
//!
//! 0. `Bitmaps::changing`: one change of what the image has of bitmaps, or one step of compaction, at a time;
//! 1. `guest`: range lock over guest clusters whose L2 entries change;
//! 2. `Tail::turn`: where the next compressed cluster goes;
//! 3. `tables`: making an L2 table;
//! 4. `writing_back`: one write-back cycle at a time;
//! 5. `HeaderState::turn`: writing more of the header than the place of a table, changing passwords;
//! 6. `Refcounts::growing`: making refcount blocks and tables;
//! 7. `Allocator::scanning`; 8. `Refcounts::writing`;
//! 9. short mutexes (`l1_dirty`, `dropped`, the free map), never across I/O.
//!
//! What a crash leaves: data, then refcounts, then L2, then L1 reach the disk; refcounts are lowered last. So a crash
//! leaks clusters at worst. See `write_back`.

mod allocator;
mod amend;
mod backing;
mod bitmaps;
mod cache;
mod check;
mod compact;
mod compressed;
#[doc(hidden)]
pub mod compression;
mod counted;
#[doc(hidden)]
pub mod create;
mod data;
mod discard;
mod driver;
#[doc(hidden)]
pub mod encryption;
mod factory;
mod header;
mod l1_table;
#[doc(hidden)]
pub mod layout;
mod lookup;
mod measure;
mod open;
mod overlap;
mod plan;
mod preallocate;
mod read;
mod read_ahead;
mod refcount_blocks;
mod refcounts;
mod refscan;
mod reopen;
mod resize;
mod run_options;
mod shrink;
mod snapshots;
mod status;
mod subclusters;
mod tables;
mod trim;
mod vm_state;
mod write;
mod write_back;

use std::collections::BTreeSet;
use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex};

use oxblk_core::{ChildrenRef, Epochs, Errno, Error, ErrorKind, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use factory::QCOW2;

use crate::write_barrier::WriteBarrier;

use cache::{Cleaner, Radix, SliceCache};
use compressed::Tail;
use layout::{Compression, Geometry, Incompatible};
use refcounts::Refcounts;
use reopen::Prepared;
use write_back::Dropped;

/// An open qcow2 image.
pub(crate) struct Qcow2 {
    geometry: Geometry,
    version: u32,
    compression: Compression,
    header: header::HeaderState,
    read_only: AtomicBool,
    children: ChildrenRef,
    encryption: Option<encryption::Encryption>,
    epochs: Arc<Epochs>,
    size: AtomicU64,
    /// A writable image was found corrupt, or it is not known what a pointer on disk names: everything is refused.
    corrupt: Arc<AtomicBool>,
    /// Corruption has been reported.
    signalled: AtomicBool,
    /// Whether the metadata was allocated ahead of the data, once known (see `status`).
    preallocated: AtomicU8,

    l1: Radix<AtomicU64>,
    l1_offset: AtomicU64,
    l1_entries: AtomicU64,
    l2: Arc<SliceCache>,
    /// Drops what the caches have not used for a while.
    cleaner: Cleaner,
    /// 64-bit words in a slice of an L2 table; a power of two.
    slice_words: u64,
    refcounts: Refcounts,

    guest: RangeLock,
    compressed_tail: Tail,
    tables: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
    dropped: Mutex<Vec<Dropped>>,
    l1_dirty: Mutex<BTreeSet<u64>>,
    snapshots: Mutex<snapshots::TablePlace>,
    /// How the image is worked with (see `run_options`).
    modes: AtomicU32,
    /// The header says that refcounts may be too low because they are written later.
    postponed: AtomicBool,
    /// A change of snapshots could not be carried to its end: the image stays dirty, so that the next to open it repairs it.
    unfinished: AtomicBool,
    bitmaps: bitmaps::Bitmaps,
    /// A reopen that waits for commit or abort.
    prepared: Mutex<Option<Prepared>>,
}

/// The unit that disks consist of.
const SECTOR: u64 = 512;

impl Qcow2 {
    /// The size of the disk: that of the header in whole sectors.
    fn size(&self) -> u64 {
        let size = self.size.load(Acquire);
        size.checked_next_multiple_of(SECTOR).unwrap_or(size)
    }

    fn l1_entries(&self) -> u64 {
        self.l1_entries.load(Acquire)
    }

    /// Where the area behind the guest disk begins that holds VM state.
    fn vm_state_offset(&self) -> u64 {
        let reach = self.geometry.cluster_size().checked_shl(self.geometry.l2_bits()).unwrap_or(0);
        self.geometry.l1_entries_for(self.size()).unwrap_or(0).saturating_mul(reach)
    }

    fn cluster_start(&self, offset: u64) -> u64 {
        self.geometry.cluster_start(offset)
    }

    /// `offset` rounded up to a cluster. Guest offsets are below 2^63, so that it cannot overflow.
    fn cluster_end(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.geometry.cluster_size()).unwrap_or(u64::MAX)
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    fn check_usable(&self) -> Result<()> {
        if self.corrupt.load(Relaxed) {
            return Err(Error::from_errno(Errno::IO));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        self.check_usable()
    }

    /// Metadata was found to contradict itself: says so once, and where the image is writable marks it corrupt and
    /// refuses everything from then on. Returns the error for the request that found it.
    async fn mark_corrupt(&self, text: &str, offset: u64) -> Error {
        let error = Error::corrupt(text.to_owned()).at(offset);
        if self.signalled.swap(true, Relaxed) {
            return error;
        }
        if self.is_read_only() {
            tracing::error!(
                "qcow2: Image is corrupt: {text}; further non-fatal corruption events will be suppressed"
            );
            return error;
        }
        self.corrupt.store(true, Release);
        tracing::error!(
            "qcow2: Marking image as corrupt: {text}; further corruption events will be suppressed"
        );
        if self.version >= 3
            && let Err(failed) = self.set_incompatible(Incompatible::CORRUPT, true).await
        {
            tracing::error!("qcow2: the image could not be marked corrupt: {failed}");
        }
        error
    }
}
