//! Dirty bitmaps of a disk, by name. A dirty bitmap records which ranges have been written since it was added or taken.
//!
//! A backup takes the dirty ranges, copies them, and then calls [`TakenRanges::finish`]. While the ranges are taken, the bitmap
//! keeps them and records new writes separately. So no range is lost if the backup fails, or if the disk is closed during the
//! backup.

use std::ops::Range;

use oxblk_core::Result;
use oxblk_core::bitmap::{BitmapInfo, Checks, Successor};

use super::Disk;
use crate::Request;

/// The dirty ranges of a bitmap, taken with [`Disk::take_dirty_ranges`].
///
/// While this value exists, the ranges stay recorded in the bitmap, and no other operation can use the bitmap.
/// [`finish`](Self::finish) removes the ranges from the bitmap. If this value is dropped, the ranges are restored: the bitmap
/// then contains the ranges and all later writes.
#[must_use = "the ranges are given back to the bitmap if this is dropped"]
pub struct TakenRanges {
    ranges: Vec<Range<u64>>,
    taken: Successor,
}

impl TakenRanges {
    /// The byte ranges, in ascending order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Removes the ranges from the bitmap. The bitmap keeps only the writes since the ranges were taken. Call this after the
    /// copies of the ranges have been flushed.
    pub fn finish(self) {
        self.taken.abdicate();
    }

    /// Restores the ranges in the bitmap, as a drop does.
    pub fn restore(self) {
        self.taken.reclaim();
    }
}

impl std::fmt::Debug for TakenRanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TakenRanges").field("ranges", &self.ranges).finish_non_exhaustive()
    }
}

impl Disk {
    /// The dirty bitmaps of the disk.
    ///
    /// # Errors
    /// If the disk is closed.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        Ok(self.backend().node()?.bitmaps().infos())
    }

    /// Adds a bitmap `name`. It records all writes that begin after this request has completed. A persistent bitmap is stored
    /// in the image when the image is closed.
    ///
    /// # Errors
    /// If the disk is closed, if the name is empty, too long or in use, or if the image cannot store a persistent bitmap.
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

    /// The byte ranges that the bitmap has recorded.
    ///
    /// # Errors
    /// If the disk is closed, if no bitmap has that name, if the ranges of the bitmap are taken, or if the bitmap is
    /// inconsistent. A persistent bitmap is inconsistent if the image was not closed after it was last open for writing.
    /// Writes may be missing in such a bitmap, so a backup must copy the complete disk.
    pub fn dirty_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let bitmap = self.backend().node()?.bitmaps().find(name)?;
        bitmap.check(Checks::READ)?;
        Ok(bitmap.map().areas().collect())
    }

    /// Takes the byte ranges that the bitmap has recorded. After that, the bitmap records new writes separately. A concurrent
    /// write is either in the taken ranges or in the ranges that the bitmap contains after [`TakenRanges::finish`].
    ///
    /// # Errors
    /// The errors of [`Self::dirty_ranges`]. A bitmap that is read-only, because its image is read-only, is an error
    /// too.
    pub fn take_dirty_ranges(&self, name: &str) -> Request<TakenRanges> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let taken = disk.graph().freeze_bitmap(&disk.node()?, &name).await?;
            Ok(TakenRanges { ranges: taken.frozen().areas().collect(), taken })
        })
    }

    /// Deletes a bitmap, also from the image. An inconsistent bitmap can be deleted too.
    ///
    /// # Errors
    /// If the disk is closed, if no bitmap has that name, if the ranges of the bitmap are taken, or if the image cannot be
    /// written.
    pub fn remove_bitmap(&self, name: &str) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let node = disk.node()?;
            let bitmap = node.bitmaps().find(&name)?;
            disk.graph().delete_bitmap(&node, &bitmap).await
        })
    }
}
