//! Rewriting the complete header of an open image, under the locks of the header and of the refcount table.

use oxblk_core::Result;
use oxblk_ring::MutexGuard;

use super::Metadata;
use crate::qcow2::layout::Header;

impl Metadata {
    /// Changes and writes the header, as [`Facts::replace_header`](crate::qcow2::facts::Facts::replace_header) does. Takes
    /// both locks.
    pub(in crate::qcow2) async fn rewrite_header(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let turn = self.facts.hold_header().await;
        self.rewrite_held_header(&turn, change).await
    }

    /// The same as [`Self::rewrite_header`], for callers that hold the header lock.
    pub(in crate::qcow2) async fn rewrite_held_header(
        &self,
        turn: &MutexGuard<'_, ()>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let table = self.clusters.hold_table().await;
        self.facts.replace_header((turn, &table), change).await
    }
}
