//! Rewriting the complete header of an open image, under the locks of the header and of the refcount table.

use oxblk_core::Result;
use oxblk_ring::MutexGuard;

use super::Metadata;
use crate::qcow2::layout::Header;

impl Metadata {
    /// Changes and writes the header, as [`ImageState::replace_header`](crate::qcow2::image_state::ImageState::replace_header)
    /// does. Takes both locks.
    pub(in crate::qcow2) async fn rewrite_header(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let guard = self.image_state.lock_header().await;
        self.rewrite_locked_header(&guard, change).await
    }

    /// The same as [`Self::rewrite_header`], for callers that hold the header lock.
    pub(in crate::qcow2) async fn rewrite_locked_header(
        &self,
        guard: &MutexGuard<'_, ()>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let table = self.clusters.lock_table().await;
        self.image_state.replace_header((guard, &table), change).await
    }
}
