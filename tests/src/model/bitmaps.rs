//! Persistent bitmaps of the images under test: made with them, and never wrong.

use std::sync::Arc;

use oxblk_core::bitmap::DirtyBitmap;
use oxblk_core::{Backend, Want};

/// The bitmaps that an image is made with, and their granularities in bytes.
const BITMAPS: [(&str, u64); 2] = [("fine", 512), ("coarse", 64 << 10)];

/// Adds them to an image that was just made.
///
/// # Errors
/// As the driver reports.
pub async fn add(disk: &Backend) -> Result<(), String> {
    let node = disk.node().map_err(|e| e.to_string())?;
    for (name, granularity) in BITMAPS {
        let added = disk.graph().add_persistent_bitmap(&node, name, Some(granularity)).await;
        added.map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn all(disk: &Backend) -> Result<Vec<Arc<DirtyBitmap>>, String> {
    let bitmaps = disk.node().map_err(|e| e.to_string())?.bitmaps().snapshot().to_vec();
    if bitmaps.len() == BITMAPS.len() {
        return Ok(bitmaps);
    }
    Err(format!("there are {} bitmaps", bitmaps.len()))
}

/// The image was closed: its bitmaps are good.
///
/// # Errors
/// Tells which one is not.
pub fn check_kept(disk: &Backend) -> Result<(), String> {
    match all(disk)?.iter().find(|bitmap| bitmap.is_inconsistent() || !bitmap.is_recording()) {
        Some(bitmap) => Err(format!("bitmap {} was lost", bitmap.name())),
        None => Ok(()),
    }
}

/// Nothing is known of how the image was left, but that its size has not changed: a bitmap that is called good has recorded
/// something in each cluster that the image has written.
///
/// # Errors
/// Tells which one has not.
pub async fn check_honest(disk: &Backend, cluster: u64) -> Result<(), String> {
    let bitmaps = all(disk)?;
    let node = disk.node().map_err(|e| e.to_string())?;
    if node.flags().copy_on_read {
        // What was read has been written as well, and is no change.
        return Ok(());
    }
    let below = node.child(oxblk_core::ChildIdx::BACKING);
    let mut at = 0;
    while at < disk.size() {
        let len = cluster.min(disk.size() - at);
        let status = disk.status_above(below.as_ref(), at, len, Want::Allocation).await;
        let status = status.map_err(|e| e.to_string())?.status;
        for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_inconsistent()) {
            if status.is_allocated() && bitmap.map().next_dirty(at, len).is_none() {
                let name = bitmap.name();
                return Err(format!("bitmap {name} missed a write to the cluster at {at}"));
            }
        }
        at += len;
    }
    Ok(())
}
