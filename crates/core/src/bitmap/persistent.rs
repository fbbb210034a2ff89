//! Persistent dirty bitmaps: the interface of formats that store dirty bitmaps in their images.
//!
//! When an image is opened (but not for a check), its bitmaps are loaded before the first write and are added to the
//! node's list. As long as the image is writable, its bitmaps have the flag "in use" in the image. When the image is
//! closed or becomes read-only, the driver writes the contents of the bitmaps and clears their flags. An inconsistent
//! bitmap keeps its flag. After a crash the flag of a bitmap is still set, and the bitmap is inconsistent
//! ([`DirtyBitmap::is_inconsistent`]). So a crash can make a bitmap unusable. A bitmap that is usable contains all
//! writes that it had to record.

use std::sync::Arc;

use super::DirtyBitmap;
use crate::Result;
use crate::driver::BoxFuture;

/// The interface of formats that store dirty bitmaps in their images.
pub trait PersistentBitmaps: Send + Sync {
    /// Whether this image can store bitmaps (qcow2: from version 3 on).
    fn are_supported(&self) -> bool;

    /// Reads the image's bitmaps. If the image is writable, sets the flag "in use" of the bitmaps in the image. The
    /// graph calls this function once, when it opens the node, but not if the node is opened for a check. A bitmap that
    /// cannot be used is returned as an inconsistent bitmap.
    ///
    /// # Errors
    /// When the image cannot be read or written, or when its list of bitmaps is corrupt.
    fn load(&self) -> BoxFuture<'_, Result<Vec<Arc<DirtyBitmap>>>>;

    /// Whether the image can store one more bitmap with this name and `granularity` bytes per bit.
    ///
    /// # Errors
    /// An error with the reason why the image cannot store the bitmap.
    fn can_store_new(&self, name: &str, granularity: u64) -> Result<()>;

    /// Adds a bitmap of the node to the image. The driver writes the bitmap when the image is closed or becomes
    /// read-only.
    ///
    /// # Errors
    /// The errors of [`PersistentBitmaps::can_store_new`].
    fn store(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()>;

    /// Removes every bitmap with this name from the image, even an inconsistent one. A bitmap that was never written to
    /// the image is removed from memory only.
    ///
    /// # Errors
    /// When the image cannot be written.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;
}
