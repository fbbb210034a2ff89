//! qcow2: QEMU's copy-on-write image format.
//!
//! Spec: docs/interop/qcow2. The modules:
//!
//! | | |
//! |---|---|
//! | `layout/` | on-disk structures: encoding and parsing, no I/O |
//! | `cache/` | slices of L2 tables and refcount blocks; a hit takes no lock |
//! | `refcounts`, `refcount_blocks`, `allocator`, `counted` | which host clusters are in use, free, reserved, quarantined |
//! | `lookup` | guest offset → extent |
//! | `data` | guest data at its host offset: which child holds it, where new data goes, encryption |
//! | `encryption/` | encryption of guest data |
//! | `read`, `write`, `discard`, `compressed` | requests that the map cannot answer |
//! | `subclusters/` | the code for extended L2 entries, which describe subclusters |
//! | `tables`, `l1_table` | making L2 tables; replacing the L1 table by a larger one |
//! | `refscan/` | reads many tables in parallel and lists the clusters that they refer to |
//! | `read_ahead` | reads metadata whose length is not known yet |
//! | `write_back`, `dropped` | write-back cycles, in an order that survives a crash; references that they release |
//! | `bitmaps/` | persistent dirty bitmaps |
//! | `resize`, `shrink`, `preallocate`, `snapshots/`, `vm_state` | one operation each, as named |
//! | `status`, `check/`, `compact/`, `create`, `measure` | one operation each, as named |
//! | `create_options`, `plan` | the options of a new image; its layout |
//! | `header` | the header of an open image, and rewriting it safely |
//! | `amend/` | changing the options of an existing image |
//! | `backing`, `trim` | changing the backing file, emptying the image; cutting off the unused end of the file |
//! | `run_options`, `overlap` | runtime options of an open image; metadata that overlaps other metadata |
//! | `dirty_bit` | the dirty bit of the header: lazy refcounts, changes of snapshots |
//! | `open`, `factory`, `reopen` | opening, creating and reopening a node |
//! | `stopped` | why an open image accepts no further requests |
//!
//! # Locks, in the order in which they are taken
//!
//! 0. `Bitmaps::changing`: one change of the stored bitmaps, or one step of compaction, at a time;
//! 1. `guest`: range lock over guest clusters whose L2 entries change;
//! 2. `Tail::turn`: placing the next compressed cluster;
//! 3. `tables`: making an L2 table;
//! 4. `writing_back`: one write-back cycle at a time;
//! 5. `HeaderState::turn`: writing more of the header than one table pointer, changing passwords;
//! 6. `Refcounts::growing`: making refcount blocks, moving the refcount table;
//! 7. `Allocator::scanning`: scanning refcount blocks for free clusters, lowering refcounts to 0;
//! 8. `Refcounts::writing`: writing dirty refcount slices;
//! 9. short mutexes (`l1_dirty`, `dropped`, the free map), never held across I/O.
//!
//! Crash safety: guest data reaches the disk first, then refcounts, then L2 tables, then the L1 table. Refcounts are lowered
//! last. So a crash leaks clusters at worst. See `write_back`.

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
mod create_options;
mod data;
mod dirty_bit;
mod discard;
mod driver;
mod dropped;
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
mod stopped;
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

use oxblk_core::{ChildrenRef, Epochs, Error, ErrorKind, Result};
use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use factory::QCOW2;

use crate::write_barrier::WriteBarrier;

use cache::{Cleaner, Radix, SliceCache};
use compressed::Tail;
use layout::{Compression, Geometry, Incompatible};
use refcounts::Refcounts;
use reopen::Prepared;

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
    /// Set when a writable image was found corrupt, or when the value of a pointer on disk is unknown after an I/O error. Every
    /// request then fails.
    corrupt: Arc<AtomicBool>,
    /// Why requests fail, if a repair or an amend is the cause.
    replaced: stopped::ReplacedBy,
    /// Corruption has already been reported. It is reported once.
    signalled: AtomicBool,
    /// Whether the image appears to have preallocated metadata. Computed at the first use (see `status`).
    preallocated: AtomicU8,

    l1: Radix<AtomicU64>,
    l1_offset: AtomicU64,
    l1_entries: AtomicU64,
    l2: Arc<SliceCache>,
    /// Drops cached slices that were not used for a while.
    cleaner: Cleaner,
    /// Number of 64-bit words in a slice of an L2 table; a power of two.
    slice_words: u64,
    refcounts: Refcounts,

    guest: RangeLock,
    compressed_tail: Tail,
    tables: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
    l1_dirty: Mutex<BTreeSet<u64>>,
    snapshots: Mutex<snapshots::TablePlace>,
    /// Runtime options of the image (see `run_options`).
    modes: AtomicU32,
    /// The dirty bit of the header.
    dirty_bit: dirty_bit::DirtyBit,
    /// A change of snapshots did not complete. The image stays marked dirty, so that the next writable open repairs it.
    unfinished: AtomicBool,
    bitmaps: bitmaps::Bitmaps,
    /// A reopen that is prepared and waits for commit or abort.
    prepared: Mutex<Option<Prepared>>,
}

/// Disk sizes are multiples of this many bytes.
const SECTOR: u64 = 512;

impl Qcow2 {
    /// The size of the disk as the header gives it. It may end within a sector.
    fn size_in_header(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// The size of the disk: the size in the header, rounded up to whole sectors.
    fn size(&self) -> u64 {
        let size = self.size_in_header();
        size.checked_next_multiple_of(SECTOR).unwrap_or(size)
    }

    fn l1_entries(&self) -> u64 {
        self.l1_entries.load(Acquire)
    }

    /// Start of the area for VM state, which lies behind the guest disk.
    fn vm_state_offset(&self) -> u64 {
        let reach = self.geometry.cluster_size().checked_shl(self.geometry.l2_bits()).unwrap_or(0);
        self.geometry.l1_entries_for(self.size()).unwrap_or(0).saturating_mul(reach)
    }

    fn cluster_start(&self, offset: u64) -> u64 {
        self.geometry.cluster_start(offset)
    }

    /// `offset` rounded up to a cluster. Guest offsets are below 2^63, so the result does not overflow.
    fn cluster_end(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.geometry.cluster_size()).unwrap_or(u64::MAX)
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    fn check_usable(&self) -> Result<()> {
        if self.corrupt.load(Relaxed) {
            return Err(self.stopped());
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        self.check_usable()
    }

    /// Handles metadata that contradicts itself. The first call logs an error. If the image is writable, the first call also
    /// marks the image corrupt, and every later request fails. Returns the error for the request that found the corruption.
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
