//! Finding the host clusters that are in use, and the clusters of the refcount structures.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering::Acquire;

use oxblk_core::Result;

use super::Clusters;

impl Clusters {
    /// The clusters of the refcount table and of the refcount blocks.
    pub(in crate::qcow2) fn refcount_structures(&self) -> BTreeSet<u64> {
        let table = self.table_place();
        let first = self.geometry.cluster_index(table.offset);
        let blocks = (0..self.table_entries.load(Acquire)).map(|index| self.block_offset(index));
        let blocks = blocks.filter(|offset| *offset != 0);
        let blocks = blocks.map(|offset| self.geometry.cluster_index(offset));
        blocks.chain(first..first.saturating_add(table.clusters)).collect()
    }

    /// Calls `visit` with the number and the refcount of each cluster in use in `range`, in ascending order.
    pub(super) async fn visit_in_use(
        &self,
        range: Range<u64>,
        mut visit: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let counted = self.table_entries.load(Acquire).saturating_mul(per_block);
        let (mut at, end) = (range.start, range.end.min(counted));
        while at < end {
            if self.block_offset(at / per_block) == 0 {
                at = (at / per_block).saturating_add(1).saturating_mul(per_block);
                continue;
            }
            let position = self.position(at)?;
            let Some(slice) = self.slice(&position).await? else { continue };
            let first = position.slice;
            while at < end {
                let position = self.position(at)?;
                if position.slice != first {
                    break;
                }
                let count = self.refcount_in(&slice, &position);
                if count > 0 {
                    visit(at, count)?;
                }
                at = at.saturating_add(1);
            }
        }
        Ok(())
    }

    /// The last cluster in use among the first `clusters` host clusters.
    pub(in crate::qcow2) async fn last_in_use(&self, clusters: u64) -> Result<Option<u64>> {
        let mut end = clusters;
        while let Some(last) = end.checked_sub(1) {
            let position = self.position(last)?;
            let Some(slice) = self.slice(&position).await? else {
                end = position.block.saturating_mul(self.geometry.refcounts_per_block());
                continue;
            };
            let first = position.slice;
            while let Some(last) = end.checked_sub(1) {
                let position = self.position(last)?;
                if position.slice != first {
                    break;
                }
                if self.refcount_in(&slice, &position) != 0 {
                    return Ok(Some(last));
                }
                end = last;
            }
        }
        Ok(None)
    }

    /// Whether at least `enough` of the first `clusters` host clusters are in use.
    pub(in crate::qcow2) async fn uses_at_least(&self, enough: u64, clusters: u64) -> Result<bool> {
        let (mut at, mut used) = (0_u64, 0_u64);
        let per_block = self.geometry.refcounts_per_block();
        while at < clusters && used < enough {
            let position = self.position(at)?;
            let Some(slice) = self.slice(&position).await? else {
                at = position.block.saturating_add(1).saturating_mul(per_block);
                continue;
            };
            let first = position.slice;
            while at < clusters {
                let position = self.position(at)?;
                if position.slice != first {
                    break;
                }
                used = used.saturating_add(u64::from(self.refcount_in(&slice, &position) != 0));
                at = at.saturating_add(1);
            }
        }
        Ok(used >= enough)
    }
}
