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
mod discard;
mod driver;
#[doc(hidden)]
pub mod encryption;
mod factory;
mod facts;
#[doc(hidden)]
pub mod layout;
mod mapping;
mod measure;
mod metadata;
mod open;
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
mod vm_state;
mod write;

use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex};

use oxblk_ring::RangeLock;

pub use factory::QCOW2;

use bitmaps::Bitmaps;
use cache::Cleaner;
use clusters::Clusters;
use data::Data;
use facts::Facts;
use layout::{Compression, Geometry};
use mapping::Mapping;
use metadata::Metadata;
use reopen::Prepared;
use snapshots::ImageSnapshots;

/// An open qcow2 image.
pub(crate) struct Qcow2 {
    geometry: Geometry,
    facts: Arc<Facts>,
    clusters: Arc<Clusters>,
    mapping: Arc<Mapping>,
    metadata: Arc<Metadata>,
    bitmaps: Arc<Bitmaps>,
    snapshots: ImageSnapshots,
    data: Data,
    compression: Compression,
    /// Whether the image appears to have preallocated metadata. Computed at the first use (see `status`).
    preallocated: AtomicU8,
    /// Drops cached slices that were not used for a while.
    cleaner: Cleaner,
    /// Range lock over guest clusters whose L2 entries change.
    guest: RangeLock,
    /// A reopen that is prepared and waits for commit or abort.
    prepared: Mutex<Option<Prepared>>,
}
