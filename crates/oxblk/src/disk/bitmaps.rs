//! Dirty bitmaps of a disk, by name: what has been written since some moment.

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

    /// Records writes from now on in a bitmap `name`. A persistent one is stored in the image when that is closed.
    ///
    /// # Errors
    /// When the name is empty, too long or taken, or the format cannot store it.
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

    /// What has been written since the bitmap was added or cleared, as ranges of bytes.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn dirty_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let bitmap = self.backend().node()?.bitmaps().find(name)?;
        Ok(bitmap.map().areas().collect())
    }

    /// Forgets what a bitmap has recorded, and gives it back: no write is in neither.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn take_dirty_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let bitmap = self.backend().node()?.bitmaps().find(name)?;
        Ok(bitmap.clear()?.areas().collect())
    }

    /// Removes a bitmap, also from the image.
    ///
    /// # Errors
    /// When there is none of that name, it is in use, or the image cannot be written.
    pub fn remove_bitmap(&self, name: &str) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let node = disk.node()?;
            let bitmap = node.bitmaps().find(&name)?;
            disk.graph().delete_bitmap(&node, &bitmap).await
        })
    }
}
