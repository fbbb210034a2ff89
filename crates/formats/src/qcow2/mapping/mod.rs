//! The mapping of guest offsets: the L1 table in memory, and the cached slices of L2 tables.
//!
//! | file | concern |
//! |---|---|
//! | `l1` | L1 entries, and which of them are dirty |
//! | `extent`, `entries` | the results of a lookup; invalid L2 entries |
//! | `slices` | the numbers of slices, their offsets in the file, and loading them |
//! | `subclusters` | extended L2 entries, and extents of subclusters |
//! | `lookup` | looking up extents of clusters in the cache |
//!
//! A file uses only files above it in this table. [`Mapping`] uses [`ImageState`] and no other owner. `Mapping` neither allocates
//! clusters nor writes to the file: `metadata` does both.
//!
//! Invariant: an L1 entry that a task can see is on disk, marked dirty, or taken by a running write-back cycle. So a flush that
//! starts after the task has seen the entry also writes the entry.
//!
//! A lookup takes no lock. The only lock of this module is the mutex of the dirty L1 entries. It is never held across I/O.

mod entries;
mod extent;
mod l1;
mod lookup;
mod slices;
mod subclusters;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use super::image_state::ImageState;
use super::layout::Geometry;
use crate::slice_cache::{Radix, SliceCache};

pub(super) use extent::{Extent, Miss};
pub(super) use subclusters::{load_entry, same_host, store_entry};

/// The mapping of an open image.
pub(super) struct Mapping {
    /// A copy, because lookups use it often. It does not change.
    geometry: Geometry,
    version: u32,
    image_state: Arc<ImageState>,
    l1: Radix<AtomicU64>,
    l1_offset: AtomicU64,
    l1_entries: AtomicU64,
    /// Indices of the dirty L1 entries, without those that a running write-back cycle has taken.
    l1_dirty: Mutex<BTreeSet<u64>>,
    l2: Arc<SliceCache>,
    /// Number of 64-bit words in a slice of an L2 table; a power of two.
    slice_words: u64,
}

impl Mapping {
    /// A mapping whose L1 table, of `l1_entries` entries at `l1_offset`, has not been read yet. `l2`: the cache for slices of
    /// `slice_words` words.
    pub(super) fn new(
        image_state: Arc<ImageState>,
        (l1_offset, l1_entries): (u64, u64),
        l2: Arc<SliceCache>,
        slice_words: u64,
    ) -> Self {
        Self {
            geometry: image_state.geometry(),
            version: image_state.version(),
            image_state,
            l1: Radix::default(),
            l1_offset: AtomicU64::new(l1_offset),
            l1_entries: AtomicU64::new(l1_entries),
            l1_dirty: Mutex::default(),
            l2,
            slice_words,
        }
    }
}
