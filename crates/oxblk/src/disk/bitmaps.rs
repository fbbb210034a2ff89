//! Dirty bitmaps of a disk, by name. A dirty bitmap records which ranges have been written since it was added or cleared.

use std::ops::Range;

use oxblk_core::Result;
use oxblk_core::bitmap::BitmapInfo;

use super::Disk;
use crate::Request;

impl Disk {
    /// The bitmaps of the image.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        Ok(self.backend().node()?.bitmaps().infos())
    }

    /// Adds a bitmap `name`, which records all writes from now on. A persistent bitmap is stored in the image when the
    /// image is closed.
    ///
    /// # Errors
    /// If the name is empty, too long or in use, or if the format cannot store the bitmap.
    pub fn add_bitmap(&self, name: &str, persistent: bool) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let (graph, node) = (disk.graph(), disk.node()?);
            let added = match persistent {
                true => graph.add_persistent_bitmap(&node, &name, None).await,
                false => graph.add_bitmap(&node, &name, None).await,
            };
            added.map(drop)
        })
    }

    /// The byte ranges that have been written since the bitmap was added or cleared.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn dirty_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let bitmap = self.backend().node()?.bitmaps().find(name)?;
        Ok(bitmap.map().areas().collect())
    }

    /// Clears a bitmap and returns the byte ranges that it had recorded. A concurrent write is either in the returned
    /// ranges or in the cleared bitmap, never in neither.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn take_dirty_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let bitmap = self.backend().node()?.bitmaps().find(name)?;
        Ok(bitmap.clear()?.areas().collect())
    }

    /// Deletes a bitmap, also from the image.
    ///
    /// # Errors
    /// If no bitmap has that name, if it is in use, or if the image cannot be written.
    pub fn remove_bitmap(&self, name: &str) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let node = disk.node()?;
            let bitmap = node.bitmaps().find(&name)?;
            disk.graph().delete_bitmap(&node, &bitmap).await
        })
    }
}
