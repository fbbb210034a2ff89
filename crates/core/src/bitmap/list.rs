//! The bitmaps of one node. The request path calls [`BitmapList::mark`] after every write; without bitmaps this costs
//! one atomic load.

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
    /// A list without bitmaps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the list contains no bitmap.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.load().is_empty()
    }

    /// Records a write in every enabled bitmap.
    pub fn mark(&self, offset: u64, len: u64) {
        for bitmap in self.bitmaps.load().iter() {
            bitmap.mark(offset, len);
        }
    }

    /// The bitmap with this name.
    ///
    /// # Errors
    /// When there is no such bitmap.
    pub fn find(&self, name: &str) -> Result<Arc<DirtyBitmap>, BitmapError> {
        self.lookup(name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
    }

    /// Creates an enabled bitmap over `size` bytes and adds it. The name must not be empty.
    ///
    /// # Errors
    /// When the name is in use or not valid, or when [`super::RangeMap::new`] refuses.
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

    /// Adds a bitmap. Several bitmaps may be anonymous.
    ///
    /// # Errors
    /// When the name is in use.
    pub fn insert(&self, bitmap: Arc<DirtyBitmap>) -> Result<(), BitmapError> {
        self.change(|bitmaps| {
            if !bitmap.name().is_empty() && bitmaps.iter().any(|b| b.name() == bitmap.name()) {
                return Err(BitmapError::Exists(bitmap.name().to_owned()));
            }
            bitmaps.push(bitmap);
            Ok(())
        })
    }

    /// Adds several bitmaps. The caller guarantees that their names differ from each other.
    ///
    /// # Errors
    /// When a name is in use; then no bitmap is added.
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

    /// Removes a bitmap. Does nothing if the list does not contain it.
    pub fn remove(&self, bitmap: &Arc<DirtyBitmap>) {
        let kept: Result<(), BitmapError> = self.change(|bitmaps| {
            bitmaps.retain(|b| !Arc::ptr_eq(b, bitmap));
            Ok(())
        });
        debug_assert!(kept.is_ok());
    }

    /// Adapts the bitmaps to the node's size, which `size` returns. Calls are serialised and each queries the size
    /// under the lock. So after concurrent calls the bitmaps have the node's last size. A bitmap that cannot have this
    /// size becomes inconsistent, because it can no longer record all changes.
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
