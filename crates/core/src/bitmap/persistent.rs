//! Persistent dirty bitmaps: formats store them in their images.
//!
//! The bitmaps of an image are loaded when it is opened, before the first write, and belong to the node's list like any
//! other. While the image is writable, the driver marks them as in use on disk. When the image is closed or becomes
//! read-only, the driver writes their contents and removes the mark. After a crash the mark is still set, and the
//! bitmap is inconsistent ([`DirtyBitmap::is_inconsistent`]). So a bitmap may be lost, but it never misses a write.

use std::sync::Arc;

use super::DirtyBitmap;
use crate::Result;
use crate::driver::BoxFuture;

/// Offered by formats that store dirty bitmaps in their images.
pub trait PersistentBitmaps: Send + Sync {
    /// Whether an image of this kind can store bitmaps.
    fn are_supported(&self) -> bool;

    /// Reads the image's bitmaps, and marks them as in use on disk if the image is writable. Core calls this once, when
    /// it opens the node. A bitmap that cannot be used is returned as an inconsistent one.
    ///
    /// # Errors
    /// When the image cannot be written, or is so corrupt that its bitmaps cannot be separated.
    fn load(&self) -> BoxFuture<'_, Result<Vec<Arc<DirtyBitmap>>>>;

    /// Whether the image can store one more bitmap with this name and `granularity` bytes per bit.
    ///
    /// # Errors
    /// The reason why it cannot.
    fn can_store_new(&self, name: &str, granularity: u64) -> Result<()>;

    /// Adds a bitmap of the node to the image. The image contains the bitmap once the image has been closed.
    ///
    /// # Errors
    /// The errors of [`PersistentBitmaps::can_store_new`].
    fn store(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()>;

    /// Removes every bitmap with this name from the image, whatever its state. A bitmap that was never written to the
    /// image is removed from memory only.
    ///
    /// # Errors
    /// When the image cannot be written.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;
}
