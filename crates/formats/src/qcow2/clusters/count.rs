//! Raising refcounts. Missing refcount blocks are created.

use oxblk_core::{DebugEvent, Result};
use oxblk_ring::perturb::point;

use super::Clusters;
use super::allocator::Reserved;
use super::counted::{Counted, Counting};
use super::dropped::ReleaseReason;

impl Clusters {
    /// Adds `times` references to each host cluster from `*at` up to `end`, and advances `*at`. After an error or a
    /// cancellation, `*at` is the first cluster to which no reference was added.
    async fn add_up_to(&self, at: &mut u64, end: u64, times: u64) -> Result<()> {
        while *at < end {
            let position = self.position(*at)?;
            let Some(slice) = self.slice(&position).await? else {
                self.make_block(position.block).await?;
                continue;
            };
            let first = position.slice;
            while *at < end {
                let position = self.position(*at)?;
                if position.slice != first {
                    break;
                }
                if let Err(error) = self.raise(&slice, &position, times) {
                    slice.mark_dirty();
                    return Err(error);
                }
                *at = at.saturating_add(1);
            }
            point();
            slice.mark_dirty();
        }
        Ok(())
    }

    /// Adds one reference to each cluster of a reserved run. `reason` is the release reason if the references are dropped
    /// again.
    ///
    /// # Errors
    /// The errors of requests to the image file and of the creation of refcount blocks. The added references are then dropped,
    /// and the other clusters of the run are freed.
    pub(in crate::qcow2) async fn count<'a>(
        &'a self,
        run: Reserved<'a>,
        reason: ReleaseReason,
    ) -> Result<Counted<'a>> {
        self.image_state.event(DebugEvent::RefblockAlloc).await;
        let mut counting = Counting::new(self, run, reason);
        let counted = self.add_up_to(&mut counting.at, counting.end, 1).await;
        counting.finish(counted)
    }

    /// Adds `times` further references to a cluster that is in use.
    ///
    /// # Errors
    /// When the refcount would exceed its maximum, and the errors of requests to the image file. No reference is then added.
    pub(in crate::qcow2) async fn count_again(
        &self,
        cluster: u64,
        times: u64,
        reason: ReleaseReason,
    ) -> Result<Counted<'_>> {
        let mut at = cluster;
        if times > 0 {
            self.add_up_to(&mut at, cluster.saturating_add(1), times).await?;
        }
        Ok(Counted { clusters: self, start: cluster, count: 1, times, reason })
    }
}
