//! Dirty bitmaps that outlive the node: formats keep them in their images.
//!
//! The bitmaps of an image are loaded when it is opened, before anybody can write to it, and belong to the node's list like
//! any other. The driver keeps a hand on them: while the image is writable they are marked as in use on disk, and when it is
//! closed or becomes read-only it writes their contents and takes the mark back. After a crash the mark is still there, and
//! the bitmap is known to be worthless ([`DirtyBitmap::is_inconsistent`]): a bitmap may be lost, but it never misses a write.

use std::sync::Arc;

use super::DirtyBitmap;
use crate::Result;
use crate::driver::BoxFuture;

/// Offered by formats that keep dirty bitmaps in their images.
pub trait PersistentBitmaps: Send + Sync {
    /// Whether an image of this kind can hold any.
    fn are_supported(&self) -> bool;

    /// Reads the image's bitmaps, and marks them as in use on disk if the image is writable. Core calls it once, when the
    /// node is opened. A bitmap that cannot be used comes as an inconsistent one.
    ///
    /// # Errors
    /// When the image cannot be written, or contradicts itself so far that its bitmaps cannot be told apart.
    fn load(&self) -> BoxFuture<'_, Result<Vec<Arc<DirtyBitmap>>>>;

    /// Whether the image can hold one more bitmap, of this name and of `granularity` bytes per bit.
    ///
    /// # Errors
    /// Why not.
    fn can_store_new(&self, name: &str, granularity: u64) -> Result<()>;

    /// Takes a bitmap of the node in: it is in the image once that has been closed.
    ///
    /// # Errors
    /// As [`PersistentBitmaps::can_store_new`].
    fn store(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()>;

    /// Takes every bitmap of this name out of the image, whatever state it is in. One that was never written there is only
    /// forgotten.
    ///
    /// # Errors
    /// When the image cannot be written.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;
}
