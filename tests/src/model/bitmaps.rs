//! Persistent bitmaps of the images under test. The harness creates the bitmaps with the image and checks that the bitmaps
//! never miss a write.

use std::sync::Arc;

use oxblk_core::bitmap::DirtyBitmap;
use oxblk_core::{Backend, Want};

/// The bitmaps of each image, with their granularities in bytes.
const BITMAPS: [(&str, u64); 2] = [("fine", 512), ("coarse", 64 << 10)];

/// Adds the bitmaps to a new image.
///
/// # Errors
/// The error that the driver reports.
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

/// Checks that all bitmaps are consistent and recording. The image must have been closed without an error before this open.
///
/// # Errors
/// A text with the name of the faulty bitmap.
pub fn check_kept(disk: &Backend) -> Result<(), String> {
    match all(disk)?.iter().find(|bitmap| bitmap.is_inconsistent() || !bitmap.is_recording()) {
        Some(bitmap) => Err(format!("bitmap {} was lost", bitmap.name())),
        None => Ok(()),
    }
}

/// Checks that no consistent bitmap has missed a write: each consistent bitmap has recorded a write in every allocated cluster
/// of the image. A crash before this open is allowed, but the size of the image must never have changed. With copy-on-read,
/// only the number of bitmaps is checked.
///
/// # Errors
/// A text with the name of the bitmap that missed a write, or with a wrong number of bitmaps.
pub async fn check_honest(disk: &Backend, cluster: u64) -> Result<(), String> {
    let bitmaps = all(disk)?;
    let node = disk.node().map_err(|e| e.to_string())?;
    if node.flags().copy_on_read {
        // Copy-on-read allocates clusters without a change of the disk.
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
