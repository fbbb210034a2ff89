//! Adding and removing dirty bitmaps of nodes.

use std::sync::Arc;

use super::Graph;
use crate::bitmap::{BitmapError, Checks, DirtyBitmap, RangeMap, default_granularity};
use crate::node::SlowPathFlags;
use crate::{Errno, Error, Node, Result};

impl Graph {
    /// Adds an enabled, clean bitmap to `node`. Every write that ends after this returns is recorded: those
    /// that began before are waited for. Without a granularity the image's cluster size decides.
    ///
    /// # Errors
    /// When the name is empty, too long or taken, or the granularity does not suit.
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

    /// The same for a bitmap that is kept in the image: it is there once that has been closed.
    ///
    /// # Errors
    /// As [`Self::add_bitmap`], and when the image cannot hold it.
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

    /// Takes a bitmap off `node`, and out of its image. One that is inconsistent can be removed like any other.
    ///
    /// # Errors
    /// When an operation holds it, when it must not change, or when the image cannot be written.
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

    /// Makes `node` record writes in the bitmaps that it has been given.
    pub async fn attach_bitmaps(&self, node: &Arc<Node>) {
        node.set_slow_path(SlowPathFlags::BITMAPS);
        let drained = self.drain(node).await;
        // The node may have grown before the bitmap was in its list.
        node.bitmaps().resize(|| node.size());
        drop(drained);
    }

    /// Takes a bitmap off `node`; others keep recording.
    pub fn remove_bitmap(&self, node: &Node, bitmap: &Arc<DirtyBitmap>) {
        node.bitmaps().remove(bitmap);
        if node.bitmaps().is_empty() {
            node.clear_slow_path(SlowPathFlags::BITMAPS);
        }
        // One may have been added just now.
        if !node.bitmaps().is_empty() {
            node.set_slow_path(SlowPathFlags::BITMAPS);
        }
    }
}
