//! The host clusters of an image: allocating, counting and freeing them.
//!
//! | file | concern |
//! |---|---|
//! | `allocator` | the free map, and the quarantine of freed clusters |
//! | `overlaps` | clusters that several metadata structures use |
//! | `dropped` | the list of references whose refcounts are lowered later |
//! | `table` | the refcount table: its offset and its entries |
//! | `slices` | refcounts in cached slices of refcount blocks; writing dirty slices |
//! | `in_use` | finding the clusters in use |
//! | `reserve` | taking clusters out of the free map, and filling the map from the refcount blocks |
//! | `counted` | references that are added to a refcount, but that no table contains yet |
//! | `growth`, `blocks` | growing the refcount table; creating refcount blocks |
//! | `count` | raising refcounts |
//! | `release` | lowering refcounts, and freeing clusters after their quarantine |
//! | `allocate`, `tail` | reservations for other modules; the places of compressed clusters |
//! | `file_end` | completing and truncating the end of the file |
//! | `moving`, `width` | moving refcount structures, for a compaction; writing refcounts of another width |
//!
//! A file uses the files above it, and `release` also uses `tail`. [`Clusters`] uses [`ImageState`], but not the mapping, the data,
//! the snapshots or the bitmaps of the image.
//!
//! Guest requests change the refcounts in existing blocks only in the cache ([`Clusters::count`], [`Clusters::lower`]). The
//! refcounts reach the disk with [`Clusters::write_back_refcounts`]. Dirty refcounts may be written at any time: a refcount is
//! raised before the reference is written, and lowered only after the reference is gone from the disk. So refcounts on disk are
//! never too low. An image with lazy refcounts is an exception, and is marked dirty. When a refcount block or a larger refcount
//! table is created, the new structure is written and flushed before other metadata refers to it.
//!
//! Locks, in the order in which they are taken: `Tail::lock`, `growing`, `Allocator::scanning`, `writing`; then the mutexes of
//! the free map and of the list of dropped references. These mutexes are never held across I/O.
//!
//! Spec: docs/interop/qcow2, "Host cluster management".

mod allocate;
mod allocator;
mod blocks;

mod count;
mod counted;
mod dropped;
mod file_end;
mod growth;
mod in_use;
mod moving;
mod overlaps;
mod release;
mod reserve;
mod slices;
mod table;
mod tail;
mod width;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use oxblk_core::{Edge, Result};
use oxblk_ring::Mutex as AsyncMutex;

use super::image_state::ImageState;
use super::layout::Geometry;
use crate::slice_cache::{Radix, SliceCache};
use crate::write_barrier::WriteBarrier;
use allocator::Allocator;
use dropped::DroppedList;
use overlaps::Overlaps;
use tail::Tail;

pub(super) use allocator::Reserved;
pub(super) use counted::Counted;
pub(super) use dropped::{Dropped, ReleaseReason};

/// The host clusters of an image: their refcounts, and which of them are free.
pub(in crate::qcow2) struct Clusters {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    table: Radix<AtomicU64>,
    table_offset: AtomicU64,
    table_entries: AtomicU64,
    cache: Arc<SliceCache>,
    slice_bytes: u64,
    /// Held while refcount blocks are created, and while the refcount table moves.
    growing: AsyncMutex<()>,
    /// Held while dirty refcount slices are written.
    writing: AsyncMutex<()>,
    barrier: WriteBarrier,
    allocator: Allocator,
    /// Dropped references. Their refcounts are lowered later.
    dropped: DroppedList,
    /// Which metadata structures overlap.
    overlaps: Overlaps,
    tail: Tail,
}

/// The place of the refcount table.
pub(in crate::qcow2) struct RefcountTable {
    /// Byte offset in the file.
    pub(in crate::qcow2) offset: u64,
    /// Length in clusters.
    pub(in crate::qcow2) clusters: u64,
}

impl Clusters {
    /// Reads the refcount table at `place`, and makes the [`Clusters`] of the image.
    pub(in crate::qcow2) async fn open(
        image_state: Arc<ImageState>,
        place: RefcountTable,
        cache: Arc<SliceCache>,
        slice_bytes: u64,
    ) -> Result<Self> {
        let geometry = image_state.geometry();
        let bytes = place.clusters.saturating_mul(geometry.cluster_size());
        let file = image_state.file()?;
        let clusters = Self {
            geometry,
            table: Radix::default(),
            table_offset: AtomicU64::new(place.offset),
            table_entries: AtomicU64::new(bytes / 8),
            cache,
            slice_bytes,
            growing: AsyncMutex::new(()),
            writing: AsyncMutex::new(()),
            barrier: WriteBarrier::default(),
            allocator: Allocator::new(geometry, &file, Arc::clone(image_state.epochs())),
            dropped: DroppedList::default(),
            overlaps: Overlaps::default(),
            tail: Tail::default(),
            image_state,
        };
        clusters.read_table(&file, place.offset, bytes).await?;
        Ok(clusters)
    }

    /// The cache of refcount blocks.
    pub(in crate::qcow2) fn cache(&self) -> &Arc<SliceCache> {
        &self.cache
    }

    fn file(&self) -> Result<Arc<Edge>> {
        self.image_state.file()
    }
}
