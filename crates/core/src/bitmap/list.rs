//! The bitmaps of one node. The request path asks [`BitmapList::mark`] after every write; with no bitmaps
//! that is one atomic load.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use super::{BitmapError, BitmapInfo, DirtyBitmap};

/// The dirty bitmaps of a node, named and anonymous.
#[derive(Default)]
pub struct BitmapList {
    bitmaps: ArcSwap<Vec<Arc<DirtyBitmap>>>,
    control: Mutex<()>,
}

impl BitmapList {
    /// No bitmaps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to mark.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.load().is_empty()
    }

    /// Records a write in every bitmap that is recording.
    pub fn mark(&self, offset: u64, len: u64) {
        for bitmap in self.bitmaps.load().iter() {
            bitmap.mark(offset, len);
        }
    }

    /// The bitmap of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Arc<DirtyBitmap>, BitmapError> {
        self.lookup(name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
    }

    /// Makes an enabled bitmap over `size` bytes and adds it. The name must not be empty.
    ///
    /// # Errors
    /// When the name is taken or unfit, or [`super::RangeMap::new`] refuses.
    pub fn create(
        &self,
        name: &str,
        size: u64,
        granularity: u64,
    ) -> Result<Arc<DirtyBitmap>, BitmapError> {
        if name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        let bitmap = DirtyBitmap::new(name, size, granularity)?;
        self.insert(bitmap.clone())?;
        Ok(bitmap)
    }

    /// Adds a bitmap; several may be anonymous.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn insert(&self, bitmap: Arc<DirtyBitmap>) -> Result<(), BitmapError> {
        self.change(|bitmaps| {
            if !bitmap.name().is_empty() && bitmaps.iter().any(|b| b.name() == bitmap.name()) {
                return Err(BitmapError::Exists(bitmap.name().to_owned()));
            }
            bitmaps.push(bitmap);
            Ok(())
        })
    }

    /// Adds many at once, whose names are known to differ.
    ///
    /// # Errors
    /// When a name is taken; then none is added.
    pub fn insert_all(&self, new: Vec<Arc<DirtyBitmap>>) -> Result<(), BitmapError> {
        self.change(|bitmaps| {
            let taken: HashSet<&str> = bitmaps.iter().map(|bitmap| bitmap.name()).collect();
            if let Some(twice) = new.iter().find(|bitmap| taken.contains(bitmap.name())) {
                return Err(BitmapError::Exists(twice.name().to_owned()));
            }
            bitmaps.extend(new);
            Ok(())
        })
    }

    /// Takes a bitmap out; nothing happens if it is not here.
    pub fn remove(&self, bitmap: &Arc<DirtyBitmap>) {
        let kept: Result<(), BitmapError> = self.change(|bitmaps| {
            bitmaps.retain(|b| !Arc::ptr_eq(b, bitmap));
            Ok(())
        });
        debug_assert!(kept.is_ok());
    }

    /// Follows a change of the node's size, which `size` tells: asked for one change after another, so that of
    /// several at once the last word is the size that the node really has. A bitmap that cannot become so
    /// large is marked inconsistent, for it can no longer tell what changed.
    pub fn resize(&self, size: impl Fn() -> u64) {
        if self.is_empty() {
            return;
        }
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let size = size();
        for bitmap in self.bitmaps.load().iter() {
            if bitmap.resize(size).is_err() {
                bitmap.set_inconsistent();
            }
        }
    }

    /// The bitmaps as they are now, in the order they were added.
    pub fn snapshot(&self) -> Arc<Vec<Arc<DirtyBitmap>>> {
        self.bitmaps.load_full()
    }

    /// What `query-block` lists: the newest first.
    pub fn infos(&self) -> Vec<BitmapInfo> {
        self.bitmaps.load().iter().rev().map(|bitmap| bitmap.info()).collect()
    }

    fn lookup(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        let bitmaps = self.bitmaps.load();
        bitmaps.iter().find(|b| !name.is_empty() && b.name() == name).cloned()
    }

    fn change(
        &self,
        edit: impl FnOnce(&mut Vec<Arc<DirtyBitmap>>) -> Result<(), BitmapError>,
    ) -> Result<(), BitmapError> {
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bitmaps = Vec::clone(&self.bitmaps.load());
        edit(&mut bitmaps)?;
        self.bitmaps.store(Arc::new(bitmaps));
        Ok(())
    }
}
