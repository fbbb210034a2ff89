//! Finding the host clusters in use, from the refcounts on disk.

use futures_util::stream::StreamExt as _;
use oxblk_core::Result;
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::super::layout::refcount_get;
use super::super::refscan::read_tables;
use super::Compaction;

/// The set of clusters in use.
pub(super) struct UsedClusters(RoaringTreemap);

impl UsedClusters {
    /// Number of clusters in use.
    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// Number of used clusters that would have to move so that all used clusters are contiguous at the start of the file.
    pub(super) fn clusters_to_move(&self) -> u64 {
        let count = self.0.len();
        count.saturating_sub(self.0.range_cardinality(0..count))
    }

    /// The last `count` used clusters, last first.
    pub(super) fn last(&self, count: u64) -> Vec<u64> {
        self.0.iter().rev().take(usize::try_from(count).unwrap_or(usize::MAX)).collect()
    }

    /// The index of the cluster behind the last used cluster; 0 if no cluster is used.
    pub(super) fn end(&self) -> u64 {
        self.0.max().map_or(0, |last| last.saturating_add(1))
    }

    /// The free runs between used clusters, from cluster `from` on. Each item is the first cluster of a run and the cluster
    /// behind the run.
    pub(super) fn gaps(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut next = from;
        let mut used = self.0.iter();
        used.advance_to(from);
        used.filter_map(move |cluster| {
            let gap = (next < cluster).then_some((next, cluster));
            next = cluster.saturating_add(1);
            gap
        })
    }
}

impl Compaction<'_> {
    /// Reads from the refcount blocks on disk which clusters are in use. The caller ensures that no cached refcount block is
    /// dirty.
    pub(super) async fn used_clusters(&self) -> Result<UsedClusters> {
        let (per_block, order) =
            (self.geometry.refcounts_per_block(), self.geometry.refcount_order);
        let file = self.image_state.file()?;
        let places = self.clusters.places_of(self.clusters.blocks())?;
        let parse = move |_: &u64, block: IoBufMut| -> Vec<(u64, u64)> {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            let used = (0..per_block).filter(|at| refcount_get(&block, *at, order) != Some(0));
            for at in used {
                match runs.last_mut() {
                    Some((_, end)) if *end == at => *end = at.saturating_add(1),
                    _ => runs.push((at, at.saturating_add(1))),
                }
            }
            runs
        };
        let mut used = RoaringTreemap::new();
        let mut blocks =
            std::pin::pin!(read_tables(&file, self.geometry.cluster_size(), places, parse));
        while let Some((index, runs)) = blocks.next().await {
            let start = index.saturating_mul(per_block);
            for (from, to) in runs? {
                used.insert_range(start.saturating_add(from)..start.saturating_add(to));
            }
        }
        Ok(UsedClusters(used))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_between_used_clusters_are_found() {
        let used = UsedClusters(RoaringTreemap::from_iter([0, 1, 2, 5, 6, 9]));
        assert_eq!(used.gaps(0).collect::<Vec<_>>(), [(3, 5), (7, 9)]);
        assert_eq!(used.gaps(4).collect::<Vec<_>>(), [(4, 5), (7, 9)]);
        assert_eq!((used.clusters_to_move(), used.end()), (2, 10));
        assert_eq!(used.last(2), [9, 6]);
    }
}
