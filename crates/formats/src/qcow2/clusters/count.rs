//! Raising refcounts. Missing refcount blocks are made.

use oxblk_core::Result;
use oxblk_ring::perturb::point;

use super::Clusters;
use super::allocator::Reserved;
use super::counted::{Counted, Counting};
use super::dropped::ReleaseReason;

impl Clusters {
    /// Adds `times` references to each host cluster from `*at` up to `end`, and advances `*at`. If this fails or is
    /// cancelled, exactly the clusters before `*at` have been counted.
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

    /// Counts one reference to each cluster of a run whose contents have been written. `was` is the release reason if the
    /// references are dropped again.
    ///
    /// # Errors
    /// As the file reports. The run is then freed.
    pub(in crate::qcow2) async fn count<'a>(
        &'a self,
        run: Reserved<'a>,
        was: ReleaseReason,
    ) -> Result<Counted<'a>> {
        let mut counting = Counting::new(self, run, was);
        let counted = self.add_up_to(&mut counting.at, counting.end, 1).await;
        counting.finish(counted)
    }

    /// Counts `times` further references to a cluster that is in use.
    ///
    /// # Errors
    /// As the file reports, or when the refcount would exceed its maximum. No reference is added then.
    pub(in crate::qcow2) async fn count_again(
        &self,
        cluster: u64,
        times: u64,
        was: ReleaseReason,
    ) -> Result<Counted<'_>> {
        let mut at = cluster;
        if times > 0 {
            self.add_up_to(&mut at, cluster.saturating_add(1), times).await?;
        }
        Ok(Counted { clusters: self, start: cluster, count: 1, times, was })
    }
}
