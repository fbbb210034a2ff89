//! Persistent dirty bitmaps (section "Bitmaps" of the qcow2 specification).
//!
//! | file | concern |
//! |---|---|
//! | `load` | reading directory, tables and data; finding unusable bitmaps |
//! | `in_use` | setting the in-use flag on disk |
//! | `store` | writing the bitmaps when the image is closed, and removing a bitmap |
//! | `unchanged` | finding bitmaps that equal their copy on disk |
//! | `relocate` | moving bitmaps to lower clusters |
//! | `new_clusters` | new clusters to which no metadata refers yet |
//! | `extension` | the header extension that contains the offset of the directory |
//!
//! [`Bitmaps`] uses [`ImageState`] and [`Clusters`], but no L1 or L2 tables. The lock `Bitmaps::changing` is taken before all other
//! locks of the image: one change of the stored bitmaps, or one step of a compaction, runs at a time.
//!
//! `oxblk_core` records writes in the bitmaps that `PersistentBitmaps::load` returned. Before a writable node accepts requests,
//! these bitmaps are marked as in use on disk, and the marks are flushed.
//!
//! When the image is closed or becomes read-only, the bitmaps are stored in this order:
//!
//! 1. Data, tables, directory and the refcounts of their new clusters are written and flushed.
//! 2. The header is changed to refer to the new directory.
//! 3. The old clusters are freed.
//!
//! After a compaction, bitmaps that equal their copy on disk stay in place. If all usable bitmaps stay in place, only their
//! flags in the old directory are changed.
//!
//! So the header refers to a directory whose bitmaps are either marked as in use, or complete and no longer changing. After a
//! power cut, clusters may be leaked, and the bitmaps that were in use are inconsistent. There is one exception: if a bitmap is
//! removed and the file has no space for a new directory, the old directory is overwritten. A power cut during this write may
//! lose the other bitmaps.
//!
//! A bitmap whose entry, table or data is broken is loaded as inconsistent too. When such a bitmap is removed, its
//! clusters are freed only if no other metadata uses any of these clusters.

mod extension;
mod in_use;
mod load;
mod new_clusters;
mod relocate;
mod store;
mod unchanged;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::bitmap::{
    BitmapError, Checks, DirtyBitmap, MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY,
};
use oxblk_core::{Error, Result};
use oxblk_ring::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use super::clusters::Clusters;
use super::image_state::ImageState;
use super::layout::{
    Autoclear, BitmapEntry, BitmapFlags, BitmapsExtension, Geometry, MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY, MAX_BITMAPS, bitmap_bytes,
};
pub(super) use extension::{clear_bitmaps_autoclear, plan_extension, write_planned};
pub(super) use load::read_directory;

/// The bitmaps of an open image.
pub(super) struct Bitmaps {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    clusters: Arc<Clusters>,
    /// Held while the bitmaps on disk change. This lock is taken before all other locks of the image.
    changing: AsyncMutex<()>,
    state: Mutex<State>,
    /// The image was compacted, so bitmaps that equal their copy on disk stay in place when they are stored.
    unchanged_stay: AtomicBool,
}

#[derive(Clone, Default)]
struct State {
    directory: Directory,
    /// The node's usable bitmaps that this image stores, including new ones that are not on disk yet.
    live: Vec<Arc<DirtyBitmap>>,
}

/// The bitmap directory on disk.
#[derive(Clone, Default)]
struct Directory {
    /// Location of the directory, if the image has one.
    place: Option<BitmapsExtension>,
    /// Clusters of the directory. Empty before the directory is loaded, and if other metadata uses any of the clusters.
    clusters: RoaringTreemap,
    /// The entries in the order of the directory. Empty before the directory is loaded.
    stored: Vec<Stored>,
}

/// A bitmap on disk.
#[derive(Clone)]
struct Stored {
    entry: BitmapEntry,
    /// Clusters of the table and the data. Empty if the entry or the table is broken or cannot be read, and if other metadata
    /// uses any of the clusters.
    clusters: RoaringTreemap,
    /// Why the bitmap is unusable, apart from the in-use flag.
    fault: Option<String>,
}

impl Stored {
    fn is_usable(&self) -> bool {
        self.fault.is_none() && !self.entry.flags.contains(BitmapFlags::IN_USE)
    }

    /// The bitmap as QAPI's `Qcow2BitmapInfo`.
    fn info(&self) -> Value {
        let mut flags = Vec::new();
        if !self.is_usable() {
            flags.push("in-use");
        }
        if self.entry.flags.contains(BitmapFlags::AUTO) {
            flags.push("auto");
        }
        json!({
            "flags": flags,
            "name": self.entry.name(),
            "granularity": self.entry.granularity().unwrap_or(0),
        })
    }
}

impl State {
    /// The node's usable bitmaps by name. A map is needed because an image may have tens of thousands of bitmaps.
    fn live_by_name(&self) -> HashMap<&str, &Arc<DirtyBitmap>> {
        self.live.iter().map(|live| (live.name(), live)).collect()
    }
}

impl Bitmaps {
    /// The state before the directory is loaded: only the location of the directory is known, from the header.
    pub(super) fn new(image_state: Arc<ImageState>, clusters: Arc<Clusters>) -> Self {
        let place = image_state.header().extensions.bitmaps;
        let directory = Directory { place, ..Directory::default() };
        let state = State { directory, live: Vec::new() };
        Self {
            geometry: image_state.geometry(),
            image_state,
            clusters,
            changing: AsyncMutex::new(()),
            state: Mutex::new(state),
            unchanged_stay: AtomicBool::new(false),
        }
    }

    /// Locks the bitmaps on disk. The bitmaps on disk do not change while the guard lives.
    pub(super) async fn lock(&self) -> AsyncMutexGuard<'_, ()> {
        self.changing.lock().await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the image was compacted: bitmaps that equal their copy on disk stay in place when they are stored.
    pub(super) fn keep_unchanged_in_place(&self) {
        self.unchanged_stay.store(true, Relaxed);
    }

    /// The autoclear bits of this module that stay set: the bit of bitmaps, if the image has a bitmap directory.
    pub(super) fn autoclear(&self) -> Autoclear {
        let mut bits = Autoclear::empty();
        bits.set(Autoclear::BITMAPS, self.state().directory.place.is_some());
        bits
    }

    /// The bitmaps on disk as QAPI's list of `Qcow2BitmapInfo`, or `None` if there are none.
    pub(super) fn info(&self) -> Option<Value> {
        let stored = &self.state().directory.stored;
        (!stored.is_empty()).then(|| stored.iter().map(Stored::info).collect())
    }

    /// Notes that other metadata uses the clusters `others`. If a bitmap or the directory uses one of these clusters too, the
    /// cluster set of the bitmap or directory is cleared. So no cluster is freed when this bitmap or directory is removed.
    pub(super) fn forget_overlapping_clusters(&self, others: &RoaringTreemap) {
        let directory = &mut self.state().directory;
        let all = directory.stored.iter_mut().map(|stored| &mut stored.clusters);
        for clusters in all.chain([&mut directory.clusters]) {
            if !clusters.is_disjoint(others) {
                clusters.clear();
            }
        }
    }
}

impl Bitmaps {
    /// Refuses a change of the disk size to `size` bytes if a bitmap of the image cannot be resized.
    pub(super) fn check_bitmaps_can_resize(&self, size: u64) -> Result<()> {
        let state = self.state().clone();
        let live = state.live_by_name();
        for stored in &state.directory.stored {
            let name = stored.entry.name();
            if !live.contains_key(&*name) {
                return Err(BitmapError::Inconsistent(name.into_owned()).into());
            }
        }
        self.check_usable_bitmaps_can_resize(size)
    }

    /// Like [`Self::check_bitmaps_can_resize`], but ignores unusable bitmaps.
    pub(super) fn check_usable_bitmaps_can_resize(&self, size: u64) -> Result<()> {
        for live in &self.state().live {
            live.check(Checks::CHANGE)?;
            check_fits(size, live.map().granularity())?;
        }
        Ok(())
    }

    /// Resizes the bitmaps that are stored in the image.
    pub(super) fn resize_bitmaps(&self, size: u64) {
        let live = self.state().live.clone();
        for bitmap in live {
            if let Err(error) = bitmap.resize(size) {
                // The caller has checked that a resize is possible. `oxblk_core` marks a bitmap that was not resized as
                // inconsistent.
                tracing::warn!("qcow2: bitmap '{}' was not resized: {error}", bitmap.name());
            }
        }
    }

    /// Refuses a bitmap that cannot be stored in the image.
    pub(super) fn check_can_store(&self, name: &str, granularity: u64) -> Result<()> {
        if self.image_state.version() < 3 {
            return Err(Error::unsupported("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        self.image_state.check_writable()?;
        if oxblk_core::names::to_bytes(name).len() > MAX_NAME {
            let text = format!("Name length exceeds maximum ({MAX_NAME} characters)");
            return Err(Error::invalid(text));
        }
        if granularity < MIN_GRANULARITY {
            let text = format!("Granularity is under minimum ({MIN_GRANULARITY} bytes)");
            return Err(Error::invalid(text));
        }
        if granularity > MAX_GRANULARITY {
            let text = format!("Granularity exceeds maximum ({MAX_GRANULARITY} bytes)");
            return Err(Error::invalid(text));
        }
        if self.image_state.size() == 0 {
            return Err(Error::invalid("The disk is empty"));
        }
        check_fits(self.image_state.size(), granularity)?;
        let state = self.state();
        let on_disk: HashSet<_> =
            state.directory.stored.iter().map(|stored| stored.entry.name()).collect();
        let new = state.live.iter().map(|live| live.name()).filter(|name| !on_disk.contains(*name));
        let new: Vec<&str> = new.collect();
        if on_disk.contains(name) || new.contains(&name) {
            return Err(BitmapError::Exists(name.to_owned()).into());
        }
        let stored = &state.directory.stored;
        let count = stored.len().saturating_add(new.len());
        if u32::try_from(count).map_or(true, |count| count >= MAX_BITMAPS) {
            return Err(Error::invalid("Maximum number of persistent bitmaps is already reached"));
        }
        let names = new.iter().chain([&name]);
        let bytes = stored.iter().map(|stored| stored.entry.encoded_len());
        let bytes =
            bytes.chain(names.map(|name| BitmapEntry::new(name, granularity).encoded_len()));
        if bytes.sum::<u64>() > MAX_BITMAP_DIRECTORY {
            return Err(Error::invalid("Not enough space in the bitmap directory"));
        }
        Ok(())
    }

    /// Adds a bitmap of the node. The bitmap is stored in the image when the image is closed.
    pub(super) fn add_bitmap(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        self.check_can_store(bitmap.name(), bitmap.map().granularity())?;
        self.state().live.push(Arc::clone(bitmap));
        Ok(())
    }
}

fn check_fits(size: u64, granularity: u64) -> Result<()> {
    if bitmap_bytes(size, granularity) > MAX_BITMAP_BYTES {
        return Err(Error::invalid(
            "Too much space will be occupied by the bitmap. Use larger granularity",
        ));
    }
    Ok(())
}
