//! qcow2: QEMU's copy-on-write image format.
//!
//! Specification: docs/interop/qcow2 in the source tree of QEMU.
//!
//! # Owners
//!
//! Each part of the state of an open image has one owner. The fields of an owner are private to its folder, and its interface
//! is marked `pub(in crate::qcow2)`, or `pub(super)` in its `mod.rs`. An owner uses only owners above it in this table. If a
//! function needs an owner below, for instance to check a cluster before it is freed, the caller passes a closure.
//!
//! | owner | state | uses |
//! |---|---|---|
//! | `image_state::ImageState` | geometry, children, header, runtime options, size; whether the image accepts requests | |
//! | `clusters::Clusters` | refcounts, free clusters, quarantine, dropped references, overlaps | `ImageState` |
//! | `mapping::Mapping` | the L1 table and the cached slices of L2 tables | `ImageState` |
//! | `metadata::Metadata` | order of metadata writes: write-back, new tables, changed entries, dirty bit | the three above |
//! | `bitmaps::Bitmaps` | persistent dirty bitmaps | `ImageState`, `Clusters` |
//! | `data::Data` | guest data at its host offset, encryption | `ImageState`, `Clusters`, `Metadata` |
//! | `snapshots::ImageSnapshots` | changes of snapshots | all above except `Data` |
//! | `compact::Compaction` | one step of a compaction | all above except `ImageSnapshots` |
//! | `Qcow2`, the driver | range locks of guest clusters, requests, operations on the complete image | all |
//!
//! # Modules without state
//!
//! | | |
//! |---|---|
//! | `layout/` | on-disk structures: encoding and parsing, no I/O |
//! | `encryption/`, `compression` | encryption of guest data; compression of clusters |
//! | `refscan/` | reads many tables in parallel and lists the clusters that they refer to |
//! | `read_ahead` | reads metadata whose length is not known yet |
//! | `check/` | checks and repairs a file, without an open image |
//! | `create`, `create_options`, `plan`, `measure` | a new image: its options, its layout, its size |
//!
//! # The driver
//!
//! | | |
//! |---|---|
//! | `driver` | implements `Driver`; its method `map` looks up host offsets without I/O |
//! | `open`, `factory`, `reopen` | opening, creating and reopening a node |
//! | `read`, `write`, `write_new`, `fill`, `discard`, `compressed` | requests that `map` cannot forward to a child |
//! | `subclusters/` | these requests in images with subclusters |
//! | `resize`, `shrink`, `preallocate`, `amend/`, `backing`, `vm_state`, `status` | one operation each |
//!
//! # Locks, in the order in which they are taken
//!
//! 0. `Bitmaps::changing`: one change of the stored bitmaps, or one step of compaction, at a time;
//! 1. `Qcow2::guest`: range lock over guest clusters whose L2 entries change;
//! 2. `Tail::lock` of `Clusters`: placing the next compressed cluster;
//! 3. `Metadata::tables`: making an L2 table;
//! 4. `Metadata::writing_back`: one write-back cycle at a time;
//! 5. `HeaderState::lock` of `ImageState`: writing more of the header than one table pointer, changing passwords;
//! 6. `Clusters::growing`: making refcount blocks, moving the refcount table;
//! 7. `Allocator::scanning` of `Clusters`: scanning refcount blocks for free clusters, lowering refcounts;
//! 8. `Clusters::writing`: writing dirty refcount slices;
//! 9. short mutexes (dirty L1 entries, dropped references, the free map), never held across I/O.
//!
//! Crash safety: guest data reaches the disk first, then refcounts, then L2 tables, then the L1 table. Refcounts are
//! lowered last. So a crash leaks clusters at worst. With lazy refcounts, the next open for writing repairs the refcounts
//! after a crash. See `metadata/write_back`.

mod amend;
mod backing;
mod bitmaps;
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
mod fill;
mod image_state;
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
mod write_new;

use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex};

use oxblk_ring::RangeLock;

pub use factory::QCOW2;

use crate::slice_cache::Cleaner;
use bitmaps::Bitmaps;
use clusters::Clusters;
use data::Data;
use image_state::ImageState;
use layout::{Compression, Geometry};
use mapping::Mapping;
use metadata::Metadata;
use reopen::Prepared;
use snapshots::ImageSnapshots;

/// An open qcow2 image.
pub(crate) struct Qcow2 {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    clusters: Arc<Clusters>,
    mapping: Arc<Mapping>,
    metadata: Arc<Metadata>,
    bitmaps: Arc<Bitmaps>,
    snapshots: ImageSnapshots,
    data: Data,
    compression: Compression,
    /// Cached answer to the question whether the image appears to have preallocated metadata. 0: not known yet; see
    /// `status` for the other values.
    preallocated: AtomicU8,
    /// Drops cached slices that were not used for a while.
    cleaner: Cleaner,
    /// Range lock over guest clusters whose L2 entries change.
    guest: RangeLock,
    /// A reopen that is prepared and waits for commit or abort.
    prepared: Mutex<Option<Prepared>>,
}
