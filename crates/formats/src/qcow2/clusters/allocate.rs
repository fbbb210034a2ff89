//! Reserving host clusters for other modules, and recording which clusters contain metadata or are cut off.

use oxblk_core::{DebugEvent, Result};

use super::Clusters;
use super::allocator::Reserved;

/// If the list of dropped references has more entries than this, a write-back cycle runs before clusters are allocated.
const MANY_DROPPED: usize = 8192;

impl Clusters {
    /// Reserves up to `count` contiguous host clusters, and at least one.
    pub(in crate::qcow2) async fn reserve(&self, count: u64) -> Result<Reserved<'_>> {
        self.image_state.event(DebugEvent::ClusterAlloc).await;
        if self.allocator.has_quarantined() {
            self.free_quarantined().await?;
        }
        self.image_state.mark_if_corrupt(self.reserve_any(count).await, 0).await
    }

    /// Whether there is contiguous free space for a table of `bytes` bytes in front of `cluster`. Restarts the search for free
    /// clusters at the front of the file.
    pub(in crate::qcow2) async fn has_room(&self, bytes: u64, cluster: u64) -> Result<bool> {
        self.scan_up_to(cluster).await?;
        Ok(self.allocator.has_run_below(self.geometry.clusters_for(bytes), cluster))
    }

    /// Whether a write-back cycle must run before clusters are allocated. This is so if the list of dropped references is long,
    /// or if the list is not empty and the file is nearly full.
    pub(in crate::qcow2) async fn needs_write_back(&self) -> Result<bool> {
        let dropped = self.dropped.len();
        Ok(dropped > MANY_DROPPED || dropped > 0 && self.is_nearly_full().await?)
    }

    /// Reserves host clusters as [`Self::reserve_run_behind`] does, and creates the missing refcount blocks for these clusters
    /// immediately. So a new refcount block usually lies directly behind the clusters, as in images that QEMU writes. If the
    /// refcount table moves because of this, the reservation is repeated, because the clusters of the old table were freed.
    pub(in crate::qcow2) async fn reserve_to_use_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
        self.image_state.event(DebugEvent::ClusterAlloc).await;
        loop {
            if self.allocator.has_quarantined() {
                self.free_quarantined().await?;
            }
            let reserved = self.reserve_run_behind(behind, count).await;
            let reserved = self.image_state.mark_if_corrupt(reserved, 0).await?;
            if !self.ensure_blocks(reserved.start(), reserved.count()).await? {
                return Ok(reserved);
            }
            reserved.give_back();
        }
    }

    /// Records that a range of the file contains metadata. Clusters of this range are not allocated.
    pub(in crate::qcow2) fn note_metadata(&self, offset: u64, bytes: u64) {
        self.allocator.note_metadata(offset, bytes);
    }

    /// Records that a range of the file no longer contains metadata.
    pub(in crate::qcow2) fn forget_metadata(&self, offset: u64, bytes: u64) {
        self.allocator.forget_metadata(offset, bytes);
    }

    /// Forgets all ranges with metadata except the header cluster. The caller records the current ranges.
    pub(in crate::qcow2) fn forget_all_metadata(&self) {
        self.allocator.forget_all_metadata();
    }

    /// Whether any cluster of a range of the file contains metadata.
    pub(in crate::qcow2) fn is_metadata(&self, offset: u64, bytes: u64) -> bool {
        self.allocator.is_metadata(offset, bytes)
    }

    /// Restarts the search for free clusters at the front of the file.
    pub(in crate::qcow2) fn rewind(&self) {
        self.allocator.rewind();
    }

    /// Whether the first run of `count` free clusters ends at or before `limit`. Restarts the search for free clusters at the
    /// front, so that a following reservation finds this run.
    pub(in crate::qcow2) fn has_run_below(&self, count: u64, limit: u64) -> bool {
        self.allocator.has_run_below(count, limit)
    }

    /// Call this when the file was truncated in front of `cluster`. The clusters from `cluster` on read as zeroes again.
    pub(in crate::qcow2) fn note_truncated(&self, cluster: u64) {
        self.allocator.note_truncated(cluster);
    }

    /// Takes over the size of the file, and whether it can grow. No request is in flight.
    pub(in crate::qcow2) fn file_changed(&self) {
        if let Ok(file) = self.file() {
            self.allocator.note_file_size(&file);
        }
    }

    /// Forgets which clusters are free, and where compressed data ends, because another program may have changed the image.
    /// The caller ensures that the node is drained.
    pub(in crate::qcow2) fn forget_free(&self) {
        self.file_changed();
        self.allocator.forget_free();
        self.tail.forget();
    }
}
