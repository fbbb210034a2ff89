//! Persistent dirty bitmaps ("Bitmaps").
//!
//! | file | concern |
//! |---|---|
//! | `load` | reading directory, tables and data; finding unusable bitmaps |
//! | `in_use` | setting the in-use flag on disk |
//! | `store` | writing the bitmaps when the image is closed, and removing one |
//! | `unchanged` | closing a compacted image without rewriting its unchanged bitmaps |
//! | `relocate` | moving bitmaps to lower clusters |
//! | `fresh` | new clusters that are not referred to yet |
//! | `extension` | the header extension that names the directory |
//!
//! Core tracks writes in the bitmaps that [`PersistentBitmaps::load`] returned. Before the node accepts requests, each
//! bitmap is durably marked as in use on disk.
//!
//! When the image is closed or becomes read-only, the bitmaps are stored in this order:
//!
//! 1. Data, tables and directory are written to new clusters, and the clusters are counted.
//! 2. One write to the header names the new directory.
//! 3. The old clusters are freed.
//!
//! After a compaction, bitmaps that are unchanged on disk stay in place. If all bitmaps are unchanged, only their
//! in-use flags are cleared in place.
//!
//! So the header always names a directory whose bitmaps are either in use, or complete and no longer changing. After a
//! power cut, clusters may be leaked, and the bitmaps that were in use are inconsistent.
//!
//! A bitmap whose entry, table or data is broken is loaded as inconsistent too. When such a bitmap is removed, its
//! clusters are freed only if no other metadata uses any of them.

mod extension;
mod fresh;
mod in_use;
mod load;
mod relocate;
mod store;
mod unchanged;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::bitmap::{
    BitmapError, Checks, DirtyBitmap, MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY, PersistentBitmaps,
};
use oxblk_core::{BoxFuture, Error, Result};
use oxblk_ring::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use super::Qcow2;
use super::layout::{
    Autoclear, BitmapEntry, BitmapFlags, BitmapsExtension, Header, MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY, MAX_BITMAPS, bitmap_bytes,
};
pub(super) use extension::{carry_out, distrust, plan};
pub(super) use load::read_directory;

/// The bitmaps of an open image.
pub(super) struct Bitmaps {
    /// Held while the bitmaps on disk change. It is taken before all other locks of the image.
    changing: AsyncMutex<()>,
    state: Mutex<State>,
    /// The image was compacted: unchanged bitmaps are not moved to new clusters when they are stored.
    stay: AtomicBool,
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
    /// Clusters of the directory. Empty if other metadata uses any of them.
    clusters: RoaringTreemap,
    /// The entries in the order of the directory. Empty before the directory is loaded.
    stored: Vec<Stored>,
}

/// A bitmap on disk.
#[derive(Clone)]
struct Stored {
    entry: BitmapEntry,
    /// Clusters of the table and the data. Empty if the table is broken, or if other metadata uses any of them.
    clusters: RoaringTreemap,
    /// Why the bitmap is unusable, apart from the in-use flag.
    fault: Option<String>,
}

impl Stored {
    fn is_usable(&self) -> bool {
        self.fault.is_none() && !self.entry.flags.contains(BitmapFlags::IN_USE)
    }

    /// QAPI's `Qcow2BitmapInfo`.
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
    /// The node's usable bitmaps by name. An image may have tens of thousands.
    fn live_by_name(&self) -> HashMap<&str, &Arc<DirtyBitmap>> {
        self.live.iter().map(|live| (live.name(), live)).collect()
    }
}

impl Bitmaps {
    /// The bitmaps that the header names, before the directory is loaded.
    pub(super) fn of(header: &Header) -> Self {
        let directory = Directory { place: header.extensions.bitmaps, ..Directory::default() };
        let state = State { directory, live: Vec::new() };
        Self {
            changing: AsyncMutex::new(()),
            state: Mutex::new(state),
            stay: AtomicBool::new(false),
        }
    }

    /// Locks the bitmaps on disk: they do not change while the guard lives.
    pub(super) async fn hold(&self) -> AsyncMutexGuard<'_, ()> {
        self.changing.lock().await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the image was compacted: unchanged bitmaps stay in place when they are stored.
    pub(super) fn stay(&self) {
        self.stay.store(true, Relaxed);
    }

    /// The autoclear bit that this driver leaves set: the image has bitmaps, and they are kept up to date.
    pub(super) fn autoclear(&self) -> Autoclear {
        let mut bits = Autoclear::empty();
        bits.set(Autoclear::BITMAPS, self.state().directory.place.is_some());
        bits
    }

    /// QAPI's list of `Qcow2BitmapInfo`, or `None` without bitmaps.
    pub(super) fn info(&self) -> Option<Value> {
        let stored = &self.state().directory.stored;
        (!stored.is_empty()).then(|| stored.iter().map(Stored::info).collect())
    }

    /// Notes that other metadata uses these clusters. Bitmaps and a directory that also use one of them have no
    /// clusters of their own from now on, so that removing them frees nothing.
    pub(super) fn disown(&self, others: &RoaringTreemap) {
        let directory = &mut self.state().directory;
        let all = directory.stored.iter_mut().map(|stored| &mut stored.clusters);
        for clusters in all.chain([&mut directory.clusters]) {
            if !clusters.is_disjoint(others) {
                clusters.clear();
            }
        }
    }
}

impl Qcow2 {
    /// Refuses a change of size if a bitmap of the image cannot be resized.
    pub(super) fn check_bitmaps_can_follow(&self, size: u64) -> Result<()> {
        let state = self.bitmaps.state().clone();
        let live = state.live_by_name();
        for stored in &state.directory.stored {
            let name = stored.entry.name();
            if !live.contains_key(&*name) {
                return Err(BitmapError::Inconsistent(name.into_owned()).into());
            }
        }
        self.check_live_bitmaps_can_follow(size)
    }

    /// Like [`Self::check_bitmaps_can_follow`], but ignores unusable bitmaps.
    pub(super) fn check_live_bitmaps_can_follow(&self, size: u64) -> Result<()> {
        for live in &self.bitmaps.state().live {
            live.check(Checks::CHANGE)?;
            check_fits(size, live.map().granularity())?;
        }
        Ok(())
    }

    /// Resizes the bitmaps that are stored in the image.
    pub(super) fn resize_bitmaps(&self, size: u64) {
        let live = self.bitmaps.state().live.clone();
        for bitmap in live {
            if let Err(error) = bitmap.resize(size) {
                // The caller checked before that a resize is possible. Core marks a bitmap that was not resized.
                tracing::warn!("qcow2: bitmap '{}' was not resized: {error}", bitmap.name());
            }
        }
    }

    fn check_can_store(&self, name: &str, granularity: u64) -> Result<()> {
        if self.version < 3 {
            return Err(Error::unsupported("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        self.check_writable()?;
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
        if self.size() == 0 {
            return Err(Error::invalid("The disk is empty"));
        }
        check_fits(self.size(), granularity)?;
        let state = self.bitmaps.state();
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

    fn take_in(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        self.check_can_store(bitmap.name(), bitmap.map().granularity())?;
        self.bitmaps.state().live.push(Arc::clone(bitmap));
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

impl PersistentBitmaps for Qcow2 {
    fn are_supported(&self) -> bool {
        self.version >= 3
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<Arc<DirtyBitmap>>>> {
        Box::pin(self.load_bitmaps())
    }

    fn can_store_new(&self, name: &str, granularity: u64) -> Result<()> {
        self.check_can_store(name, granularity)
    }

    fn store(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        self.take_in(bitmap)
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.remove_bitmap(name))
    }
}
