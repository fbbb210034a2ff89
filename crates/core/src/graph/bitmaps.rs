//! Adding and removing dirty bitmaps of nodes.

use std::sync::Arc;

use super::Graph;
use crate::bitmap::{BitmapError, Checks, DirtyBitmap, RangeMap, default_granularity};
use crate::node::SlowPathFlags;
use crate::{Errno, Error, Node, Result};

impl Graph {
    /// Adds an enabled, clean bitmap to `node`. The function waits for writes in flight, so the bitmap records every
    /// write that begins after it returns. Without `granularity`, the image's cluster size determines the granularity.
    ///
    /// # Errors
    /// When the name is empty, too long or in use, or the granularity is not valid.
    pub async fn add_bitmap(
        &self,
        node: &Arc<Node>,
        name: &str,
        granularity: Option<u64>,
    ) -> Result<Arc<DirtyBitmap>> {
        let granularity =
            granularity.unwrap_or_else(|| default_granularity(node.driver().info().cluster_size));
        let bitmap = node.bitmaps().create(name, node.size(), granularity)?;
        self.attach_bitmaps(node).await;
        Ok(bitmap)
    }

    /// As [`Self::add_bitmap`], for a persistent bitmap. The image contains the bitmap once the image has been closed.
    ///
    /// # Errors
    /// The errors of [`Self::add_bitmap`], and when the image cannot store the bitmap.
    pub async fn add_persistent_bitmap(
        &self,
        node: &Arc<Node>,
        name: &str,
        granularity: Option<u64>,
    ) -> Result<Arc<DirtyBitmap>> {
        if name.is_empty() {
            return Err(BitmapError::NameEmpty.into());
        }
        let granularity =
            granularity.unwrap_or_else(|| default_granularity(node.driver().info().cluster_size));
        RangeMap::new(0, granularity)?;
        if node.bitmaps().find(name).is_ok() {
            return Err(BitmapError::Exists(name.to_owned()).into());
        }
        let Some(persistent) = node.driver().persistent_bitmaps() else {
            let text = format!("Can't store persistent bitmaps to {}", node.name());
            return Err(Error::from_errno(Errno::OPNOTSUPP).prefix(text));
        };
        let cannot = |error: Error| {
            let text = format!("Can't make bitmap '{name}' persistent in '{}'", node.name());
            error.prefix(text)
        };
        persistent.can_store_new(name, granularity).map_err(cannot)?;
        let bitmap = self.add_bitmap(node, name, Some(granularity)).await?;
        if let Err(error) = persistent.store(&bitmap) {
            self.remove_bitmap(node, &bitmap);
            return Err(cannot(error));
        }
        bitmap.set_persistent(true);
        Ok(bitmap)
    }

    /// Removes a bitmap from `node` and from its image. An inconsistent bitmap can be removed too.
    ///
    /// # Errors
    /// When an operation uses the bitmap, when the bitmap is read-only, or when the image cannot be written.
    pub async fn delete_bitmap(&self, node: &Node, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        bitmap.check(Checks::BUSY | Checks::READ_ONLY)?;
        if bitmap.is_persistent()
            && let Some(persistent) = node.driver().persistent_bitmaps()
        {
            persistent.remove(bitmap.name()).await?;
        }
        self.remove_bitmap(node, bitmap);
        Ok(())
    }

    /// Makes `node` record writes in the bitmaps of its list.
    pub async fn attach_bitmaps(&self, node: &Arc<Node>) {
        node.set_slow_path(SlowPathFlags::BITMAPS);
        let drained = self.drain(node).await;
        // The node may have grown before the bitmap was in its list.
        node.bitmaps().resize(|| node.size());
        drop(drained);
    }

    /// Removes a bitmap from `node`. Other bitmaps continue to record.
    pub fn remove_bitmap(&self, node: &Node, bitmap: &Arc<DirtyBitmap>) {
        node.bitmaps().remove(bitmap);
        if node.bitmaps().is_empty() {
            node.clear_slow_path(SlowPathFlags::BITMAPS);
        }
        // Another thread may have added a bitmap meanwhile.
        if !node.bitmaps().is_empty() {
            node.set_slow_path(SlowPathFlags::BITMAPS);
        }
    }
}
