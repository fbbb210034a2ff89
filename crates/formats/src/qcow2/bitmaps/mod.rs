//! Persistent dirty bitmaps ("Bitmaps").
//!
//! | file | concern |
//! |---|---|
//! | `load` | reading directory, tables and data; what cannot be used |
//! | `in_use` | the mark on disk that says so, set and taken back |
//! | `store` | writing the bitmaps when the image is closed, and taking one out |
//! | `unchanged` | the bitmaps of a compacted image that need not be written when it is closed |
//! | `relocate` | moving them towards the front of the file |
//! | `fresh` | clusters that nothing refers to yet |
//! | `extension` | the header's word of where the directory is |
//!
//! Core tracks writes in the bitmaps that [`PersistentBitmaps::load`] gave it. On disk each is marked as in use, durably,
//! before the node takes requests. When the image is closed or becomes read-only, all of them are written to new clusters,
//! data, tables and directory, and counted; then the header is made to name the new directory, which is one write; only
//! then the old ones are given up. In an image that has been compacted, those that it has as they are in memory stay where
//! they are, and if that goes for all of them, their marks are taken back in place. So at any moment the header names a
//! directory of bitmaps that are in use, or of bitmaps that are complete and that nobody changes any more. A power cut
//! leaks clusters at worst, and bitmaps that were in use come back as inconsistent.
//!
//! A bitmap whose entry, table or data is broken comes as an inconsistent one too. Its clusters are given up with it only if
//! they are all known to be its own.

mod extension;
mod fresh;
mod in_use;
mod load;
mod relocate;
mod store;
mod unchanged;

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
    /// Held by who changes what the image has of them; taken before all other locks of the image.
    changing: AsyncMutex<()>,
    state: Mutex<State>,
    /// They lie where they are to lie, and what has not changed stays there.
    stay: AtomicBool,
}

#[derive(Clone, Default)]
struct State {
    directory: Directory,
    /// The bitmaps of the node that are kept here and can be used.
    live: Vec<Arc<DirtyBitmap>>,
}

/// What the image has.
#[derive(Clone, Default)]
struct Directory {
    /// Where the directory is, while there is one.
    place: Option<BitmapsExtension>,
    /// Its clusters, if they are its own.
    clusters: RoaringTreemap,
    /// What it says, in its order; nothing before it has been loaded.
    stored: Vec<Stored>,
}

/// A bitmap in the image.
#[derive(Clone)]
struct Stored {
    entry: BitmapEntry,
    /// The clusters of its table and data, if all of them are its own.
    clusters: RoaringTreemap,
    /// Why it cannot be used, besides being marked as in use.
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

impl Bitmaps {
    /// What the header tells of them.
    pub(super) fn of(header: &Header) -> Self {
        let directory = Directory { place: header.extensions.bitmaps, ..Directory::default() };
        let state = State { directory, live: Vec::new() };
        Self {
            changing: AsyncMutex::new(()),
            state: Mutex::new(state),
            stay: AtomicBool::new(false),
        }
    }

    /// Nobody changes what the image has of bitmaps while this lives.
    pub(super) async fn hold(&self) -> AsyncMutexGuard<'_, ()> {
        self.changing.lock().await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image has been compacted: what has not changed is not put elsewhere when it is closed.
    pub(super) fn stay(&self) {
        self.stay.store(true, Relaxed);
    }

    /// The autoclear bit that a writer leaves set: there are bitmaps, and they are kept up to date.
    pub(super) fn autoclear(&self) -> Autoclear {
        let mut bits = Autoclear::empty();
        bits.set(Autoclear::BITMAPS, self.state().directory.place.is_some());
        bits
    }

    /// QAPI's list of `Qcow2BitmapInfo`, where there are any.
    pub(super) fn info(&self) -> Option<Value> {
        let stored = &self.state().directory.stored;
        (!stored.is_empty()).then(|| stored.iter().map(Stored::info).collect())
    }

    /// These clusters hold other metadata: what lays claim to one of them as well has none that are its own.
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
    /// Refuses a change of size that a bitmap of the image could not follow.
    pub(super) fn check_bitmaps_can_follow(&self, size: u64) -> Result<()> {
        let state = self.bitmaps.state().clone();
        for stored in &state.directory.stored {
            let name = stored.entry.name().into_owned();
            if !state.live.iter().any(|live| *live.name() == *name) {
                return Err(BitmapError::Inconsistent(name).into());
            }
        }
        self.check_live_bitmaps_can_follow(size)
    }

    /// The same, except that bitmaps which cannot be used stay as they are.
    pub(super) fn check_live_bitmaps_can_follow(&self, size: u64) -> Result<()> {
        for live in &self.bitmaps.state().live {
            live.check(Checks::CHANGE)?;
            check_fits(size, live.map().granularity())?;
        }
        Ok(())
    }

    /// Has the bitmaps that are kept in the image follow a change of size.
    pub(super) fn resize_bitmaps(&self, size: u64) {
        let live = self.bitmaps.state().live.clone();
        for bitmap in live {
            if let Err(error) = bitmap.resize(size) {
                // It has been checked that they can; core marks what does not.
                tracing::warn!("qcow2: bitmap '{}' stays as it is: {error}", bitmap.name());
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
        check_fits(self.size(), granularity)?;
        let state = self.bitmaps.state();
        let new = state.live.iter().map(|live| live.name()).filter(|name| !state.has(name));
        let new: Vec<&str> = new.collect();
        if state.has(name) || new.contains(&name) {
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

impl State {
    fn has(&self, name: &str) -> bool {
        self.directory.stored.iter().any(|stored| stored.entry.name() == name)
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
