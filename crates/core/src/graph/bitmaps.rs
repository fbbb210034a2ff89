//! Adding and removing dirty bitmaps of nodes.

use std::sync::Arc;

use super::Graph;
use crate::bitmap::{DirtyBitmap, default_granularity};
use crate::node::Gates;
use crate::{Node, Result};

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

    /// Makes `node` record writes in the bitmaps that it has been given.
    pub async fn attach_bitmaps(&self, node: &Arc<Node>) {
        node.set_gate(Gates::BITMAPS);
        let drained = self.drain(node).await;
        // The node may have grown before the bitmap was in its list.
        node.bitmaps().resize(|| node.size());
        drop(drained);
    }

    /// Takes a bitmap off `node`; others keep recording.
    pub fn remove_bitmap(&self, node: &Node, bitmap: &Arc<DirtyBitmap>) {
        node.bitmaps().remove(bitmap);
        if node.bitmaps().is_empty() {
            node.clear_gate(Gates::BITMAPS);
        }
        // One may have been added just now.
        if !node.bitmaps().is_empty() {
            node.set_gate(Gates::BITMAPS);
        }
    }
}
