//! Operations that change the dirty bitmaps of a node.
//!
//! Persistent bitmaps are stored when the image is closed or becomes read-only, and bitmaps are resized with the disk.
//! So every operation of this file is a control operation: the operation has exclusive use of the node, and runs to its
//! end once it has begun. The operation never overlaps with a snapshot, a resize, a reopen, a close, or another change
//! of a bitmap. Only [`DirtyBitmap::mark`], and jobs that read a bitmap frozen by [`Graph::freeze_bitmap`], run at the
//! same time.
//!
//! While a node has bitmaps, its writes take the slow path. The slow path records the writes in the bitmaps. The list
//! of bitmaps and the flag for the slow path change together ([`Node::insert_bitmap`], [`Node::remove_bitmap`]).

use std::sync::Arc;

use super::Graph;
use crate::bitmap::{BitmapError, Checks, DirtyBitmap, RangeMap, Successor, default_granularity};
use crate::{Errno, Error, Node, Result};

impl Graph {
    /// Adds an enabled, clean bitmap to `node`. The bitmap records every write that begins after this function returns.
    /// Without `granularity`, the image's cluster size determines the granularity.
    ///
    /// # Errors
    /// When the name is empty, too long or in use, or the granularity is not valid for the size of the disk.
    pub async fn add_bitmap(
        &self,
        node: &Arc<Node>,
        name: &str,
        granularity: Option<u64>,
    ) -> Result<Arc<DirtyBitmap>> {
        let name = name.to_owned();
        let add = move |node: Arc<Node>| async move {
            let granularity = or_default(&node, granularity);
            insert_new(&node, &name, granularity)
        };
        self.run_exclusive(node, add).await
    }

    /// Like [`Self::add_bitmap`], for a persistent bitmap. The bitmap is written to the image when the image is closed
    /// or becomes read-only.
    ///
    /// # Errors
    /// The errors of [`Self::add_bitmap`], and when the image cannot store the bitmap.
    pub async fn add_persistent_bitmap(
        &self,
        node: &Arc<Node>,
        name: &str,
        granularity: Option<u64>,
    ) -> Result<Arc<DirtyBitmap>> {
        let name = name.to_owned();
        let add = move |node: Arc<Node>| async move {
            let granularity = or_default(&node, granularity);
            add_stored(&node, &name, granularity)
        };
        self.run_exclusive(node, add).await
    }

    /// Removes a bitmap from `node` and from its image. An inconsistent bitmap can be removed too.
    ///
    /// # Errors
    /// When `node` does not have the bitmap, when another operation uses the bitmap, when the bitmap is read-only, or
    /// when the image cannot be written.
    pub async fn delete_bitmap(&self, node: &Arc<Node>, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        let bitmap = Arc::clone(bitmap);
        let delete = move |node: Arc<Node>| async move {
            // The driver removes bitmaps by name, and another bitmap may have the name now.
            if !node.bitmaps().contains(&bitmap) {
                return Err(BitmapError::NotFound(bitmap.name().to_owned()).into());
            }
            let _busy = bitmap.hold()?;
            bitmap.check(Checks::READ_ONLY)?;
            if bitmap.is_persistent()
                && let Some(persistent) = node.driver().persistent_bitmaps()
            {
                persistent.remove(bitmap.name()).await?;
            }
            node.remove_bitmap(&bitmap);
            Ok(())
        };
        self.run_exclusive(node, delete).await
    }

    /// Makes the bitmap `name` of `node` clean. Returns the former contents of the bitmap.
    ///
    /// # Errors
    /// When there is no such bitmap, when another operation uses the bitmap, or when the bitmap is read-only or
    /// inconsistent.
    pub async fn clear_bitmap(&self, node: &Arc<Node>, name: &str) -> Result<Arc<RangeMap>> {
        self.change_bitmap(node, name, DirtyBitmap::clear).await
    }

    /// Starts or stops the recording of the bitmap `name` of `node`.
    ///
    /// # Errors
    /// The errors of [`Self::clear_bitmap`].
    pub async fn enable_bitmap(&self, node: &Arc<Node>, name: &str, enabled: bool) -> Result<()> {
        let set = move |bitmap: &DirtyBitmap| {
            bitmap.set_enabled(enabled);
            Ok(())
        };
        self.change_bitmap(node, name, set).await
    }

    /// Adds the dirty areas of `source` to the bitmap `name` of `node`.
    ///
    /// # Errors
    /// The errors of [`Self::clear_bitmap`], and when the sizes differ.
    pub async fn merge_bitmap(
        &self,
        node: &Arc<Node>,
        name: &str,
        source: Arc<RangeMap>,
    ) -> Result<()> {
        self.change_bitmap(node, name, move |bitmap| bitmap.merge_from(&source)).await
    }

    /// Freezes the bitmap `name` of `node` for a job. The job reads the frozen map. Until the job ends, a successor
    /// records the writes if the bitmap was enabled, and other operations cannot use the bitmap.
    ///
    /// # Errors
    /// The errors of [`Self::clear_bitmap`].
    pub async fn freeze_bitmap(&self, node: &Arc<Node>, name: &str) -> Result<Successor> {
        let name = name.to_owned();
        let freeze = move |node: Arc<Node>| async move {
            let bitmap = node.bitmaps().find(&name)?;
            bitmap.check(Checks::CHANGE)?;
            Ok(bitmap.create_successor()?)
        };
        self.run_exclusive(node, freeze).await
    }

    async fn change_bitmap<T: 'static>(
        &self,
        node: &Arc<Node>,
        name: &str,
        change: impl FnOnce(&DirtyBitmap) -> Result<T, BitmapError> + 'static,
    ) -> Result<T> {
        let name = name.to_owned();
        let change = move |node: Arc<Node>| async move {
            let bitmap = node.bitmaps().find(&name)?;
            let busy = bitmap.hold()?;
            bitmap.check(Checks::CHANGE - Checks::BUSY)?;
            Ok(change(busy.bitmap())?)
        };
        self.run_exclusive(node, change).await
    }
}

fn or_default(node: &Node, granularity: Option<u64>) -> u64 {
    granularity.unwrap_or_else(|| default_granularity(node.driver().info().cluster_size))
}

fn insert_new(node: &Node, name: &str, granularity: u64) -> Result<Arc<DirtyBitmap>> {
    if name.is_empty() {
        return Err(BitmapError::NameEmpty.into());
    }
    let bitmap = DirtyBitmap::new(name, node.size(), granularity)?;
    node.insert_bitmap(&bitmap)?;
    Ok(bitmap)
}

fn add_stored(node: &Node, name: &str, granularity: u64) -> Result<Arc<DirtyBitmap>> {
    if name.is_empty() {
        return Err(BitmapError::NameEmpty.into());
    }
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
    let bitmap = insert_new(node, name, granularity)?;
    if let Err(error) = persistent.store(&bitmap) {
        node.remove_bitmap(&bitmap);
        return Err(cannot(error));
    }
    bitmap.set_persistent(true);
    Ok(bitmap)
}
