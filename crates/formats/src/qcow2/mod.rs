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
//! | `facts/` | the state that all parts share: geometry, children, header, runtime options, whether requests are accepted |
//! | `header` | rewriting the complete header |
//! | `amend/` | changing the options of an existing image |
//! | `backing`, `trim` | changing the backing file, emptying the image; cutting off the unused end of the file |
//! | `overlap` | metadata that overlaps other metadata |
//! | `dirty_bit` | the dirty bit of the header: lazy refcounts, changes of snapshots |
//! | `open`, `factory`, `reopen` | opening, creating and reopening a node |
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

mod amend;
mod backing;
mod bitmaps;
mod cache;
mod check;
mod clusters;
mod compact;
mod compressed;
#[doc(hidden)]
pub mod compression;
#[doc(hidden)]
pub mod create;
mod create_options;
mod data;
mod dirty_bit;
mod discard;
mod driver;
#[doc(hidden)]
pub mod encryption;
mod factory;
mod facts;
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
mod refscan;
mod reopen;
mod resize;
mod shrink;
mod snapshots;
mod status;
mod subclusters;
mod tables;
mod vm_state;
mod write;
mod write_back;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Acquire};
use std::sync::{Arc, Mutex};

use oxblk_ring::{Mutex as AsyncMutex, RangeLock};

pub use factory::QCOW2;

use crate::write_barrier::WriteBarrier;

use cache::{Cleaner, Radix, SliceCache};
use clusters::Clusters;
use facts::Facts;
use layout::{Compression, Geometry};
use reopen::Prepared;

/// An open qcow2 image.
pub(crate) struct Qcow2 {
    facts: Arc<Facts>,
    geometry: Geometry,
    compression: Compression,
    encryption: Option<encryption::Encryption>,
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
    clusters: Arc<Clusters>,

    guest: RangeLock,
    tables: AsyncMutex<()>,
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
    l1_dirty: Mutex<BTreeSet<u64>>,
    snapshots: Mutex<snapshots::TablePlace>,
    /// The dirty bit of the header.
    dirty_bit: dirty_bit::DirtyBit,
    /// A change of snapshots did not complete. The image stays marked dirty, so that the next writable open repairs it.
    unfinished: AtomicBool,
    bitmaps: bitmaps::Bitmaps,
    /// A reopen that is prepared and waits for commit or abort.
    prepared: Mutex<Option<Prepared>>,
}

impl Qcow2 {
    fn l1_entries(&self) -> u64 {
        self.l1_entries.load(Acquire)
    }
}
