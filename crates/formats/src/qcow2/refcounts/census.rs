//! Queries over ranges of host clusters: which of them are in use.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering::Acquire;

use oxblk_core::Result;

use super::Refcounts;

impl Refcounts {
    /// The clusters of the refcount table and of the refcount blocks.
    pub(in super::super) fn structure(&self) -> BTreeSet<u64> {
        let table = self.table_place();
        let first = self.geometry.cluster_index(table.offset);
        let blocks = (0..self.table_entries.load(Acquire)).map(|index| self.block_offset(index));
        let blocks = blocks.filter(|offset| *offset != 0);
        let blocks = blocks.map(|offset| self.geometry.cluster_index(offset));
        blocks.chain(first..first.saturating_add(table.clusters)).collect()
    }

    /// Calls `visit` with each cluster of a range that is in use and its refcount, in ascending order.
    pub(in super::super) async fn visit_in_use(
        &self,
        range: Range<u64>,
        mut visit: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let counted = self.table_entries.load(Acquire).saturating_mul(per_block);
        let (mut at, end, mask) = (range.start, range.end.min(counted), self.mask());
        while at < end {
            if self.block_offset(at / per_block) == 0 {
                at = (at / per_block).saturating_add(1).saturating_mul(per_block);
                continue;
            }
            let place = self.place(at)?;
            let Some(slice) = self.slice(&place).await? else { continue };
            let first = place.slice;
            while at < end {
                let place = self.place(at)?;
                if place.slice != first {
                    break;
                }
                let word = slice.words().get(place.word).map_or(0, |word| word.load(Acquire));
                let count = (word >> place.shift) & mask;
                if count > 0 {
                    visit(at, count)?;
                }
                at = at.saturating_add(1);
            }
        }
        Ok(())
    }

    /// The last cluster in use among the first `clusters` host clusters.
    pub(in super::super) async fn last_in_use(&self, clusters: u64) -> Result<Option<u64>> {
        let (mut end, mask) = (clusters, self.mask());
        while let Some(last) = end.checked_sub(1) {
            let place = self.place(last)?;
            let Some(slice) = self.slice(&place).await? else {
                end = place.block.saturating_mul(self.geometry.refcounts_per_block());
                continue;
            };
            let first = place.slice;
            while let Some(last) = end.checked_sub(1) {
                let place = self.place(last)?;
                if place.slice != first {
                    break;
                }
                let word = slice.words().get(place.word).map_or(0, |word| word.load(Acquire));
                if (word >> place.shift) & mask != 0 {
                    return Ok(Some(last));
                }
                end = last;
            }
        }
        Ok(None)
    }

    /// Whether at least `enough` of the first `clusters` host clusters are in use.
    pub(in super::super) async fn uses_at_least(&self, enough: u64, clusters: u64) -> Result<bool> {
        let (mut at, mut used) = (0_u64, 0_u64);
        let per_block = self.geometry.refcounts_per_block();
        while at < clusters && used < enough {
            let place = self.place(at)?;
            let Some(slice) = self.slice(&place).await? else {
                at = place.block.saturating_add(1).saturating_mul(per_block);
                continue;
            };
            let (first, mask) = (place.slice, self.mask());
            while at < clusters {
                let place = self.place(at)?;
                if place.slice != first {
                    break;
                }
                let word = slice.words().get(place.word).map_or(0, |word| word.load(Acquire));
                used = used.saturating_add(u64::from((word >> place.shift) & mask != 0));
                at = at.saturating_add(1);
            }
        }
        Ok(used >= enough)
    }
}
