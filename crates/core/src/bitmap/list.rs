//! The bitmaps of one node. If a node has bitmaps, the request path calls [`BitmapList::mark`] after every write. If a
//! node has no bitmap, the check for bitmaps costs one atomic load.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use oxblk_ring::perturb::point;

use super::{BitmapError, BitmapInfo, DirtyBitmap};

/// The dirty bitmaps of a node, named and anonymous.
#[derive(Default)]
pub struct BitmapList {
    bitmaps: ArcSwap<Vec<Arc<DirtyBitmap>>>,
    control: Mutex<()>,
}

impl BitmapList {
    /// A list without bitmaps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the list contains no bitmap.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.load().is_empty()
    }

    /// Sets the range of a write in every bitmap that records writes.
    pub fn mark(&self, offset: u64, len: u64) {
        for bitmap in self.bitmaps.load().iter() {
            bitmap.mark(offset, len);
        }
    }

    /// The bitmap with this name. An anonymous bitmap cannot be found.
    ///
    /// # Errors
    /// When there is no such bitmap.
    pub fn find(&self, name: &str) -> Result<Arc<DirtyBitmap>, BitmapError> {
        self.lookup(name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
    }

    /// Whether the list contains this bitmap.
    pub(crate) fn contains(&self, bitmap: &Arc<DirtyBitmap>) -> bool {
        self.bitmaps.load().iter().any(|other| Arc::ptr_eq(other, bitmap))
    }

    /// Adds the bitmaps `new`, which must have different names, except for anonymous bitmaps. `set_recording(true)` is
    /// called before the bitmaps are in the list; this call makes later writes call [`Self::mark`]. If the list stays
    /// empty, `set_recording(false)` is called.
    ///
    /// # Errors
    /// When a name is in use; then no bitmap is added.
    pub(crate) fn insert(
        &self,
        new: &[Arc<DirtyBitmap>],
        set_recording: impl FnOnce(bool),
    ) -> Result<(), BitmapError> {
        let _control = self.lock();
        let mut bitmaps = Vec::clone(&self.bitmaps.load());
        let taken: HashSet<&str> = bitmaps.iter().map(|bitmap| bitmap.name()).collect();
        let is_taken = |name: &str| !name.is_empty() && taken.contains(name);
        if let Some(twice) = new.iter().find(|bitmap| is_taken(bitmap.name())) {
            return Err(BitmapError::Exists(twice.name().to_owned()));
        }
        bitmaps.extend_from_slice(new);
        set_recording(!bitmaps.is_empty());
        point();
        self.bitmaps.store(Arc::new(bitmaps));
        Ok(())
    }

    /// Removes a bitmap, if the list contains it. Then calls `set_recording`: with false if the list is empty, and with
    /// true otherwise. The list and the recording of writes change under one lock. So a node with bitmaps records its
    /// writes even if another thread adds a bitmap at the same time.
    pub(crate) fn remove(&self, bitmap: &Arc<DirtyBitmap>, set_recording: impl FnOnce(bool)) {
        let _control = self.lock();
        let mut bitmaps = Vec::clone(&self.bitmaps.load());
        bitmaps.retain(|other| !Arc::ptr_eq(other, bitmap));
        let is_recording = !bitmaps.is_empty();
        self.bitmaps.store(Arc::new(bitmaps));
        point();
        set_recording(is_recording);
    }

    /// Resizes the bitmaps to the node's size. `size` returns the node's size. Calls run one after the other, and each
    /// call reads the size under the lock. So after concurrent calls, the bitmaps have the last size of the node. If a
    /// bitmap cannot have this size, the bitmap becomes inconsistent, because it can no longer record all changes.
    pub fn resize(&self, size: impl Fn() -> u64) {
        if self.is_empty() {
            return;
        }
        let _control = self.lock();
        let size = size();
        for bitmap in self.bitmaps.load().iter() {
            if bitmap.resize(size).is_err() {
                bitmap.set_inconsistent();
            }
        }
    }

    /// The bitmaps at this moment, in the order in which they were added.
    pub fn snapshot(&self) -> Arc<Vec<Arc<DirtyBitmap>>> {
        self.bitmaps.load_full()
    }

    /// The bitmaps as `query-block` lists them: the newest first.
    pub fn infos(&self) -> Vec<BitmapInfo> {
        self.bitmaps.load().iter().rev().map(|bitmap| bitmap.info()).collect()
    }

    fn lookup(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        let bitmaps = self.bitmaps.load();
        bitmaps.iter().find(|b| !name.is_empty() && b.name() == name).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
