//! Taking clusters out of the free map. The map is filled from the refcount blocks, as far as the search needs.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{DebugEvent, Errno, Error, Result};
use oxblk_ring::perturb::point;

use super::Clusters;
use super::allocator::Reserved;

/// A file that cannot grow is nearly full if its number of free clusters is less than this and less than a sixteenth of its
/// clusters.
const FEW_FREE: u64 = 4096;

impl Clusters {
    /// For a file that cannot grow, the first cluster that does not lie completely inside the file. `u64::MAX` if the file can
    /// grow.
    fn limit(&self) -> Result<u64> {
        let file = self.file()?;
        Ok(match file.node().limits().grows {
            true => u64::MAX,
            false => self.geometry.cluster_index(file.size()),
        })
    }

    /// Whether the file cannot grow and has few free clusters. Scans refcount blocks until enough free clusters are found.
    pub(super) async fn is_nearly_full(&self) -> Result<bool> {
        let limit = self.limit()?;
        if limit == u64::MAX {
            return Ok(false);
        }
        let few = FEW_FREE.min(limit.div_ceil(16));
        while !self.allocator.has_free(few, limit) {
            if self.allocator.scanned() >= limit {
                return Ok(true);
            }
            self.scan_next(0).await?;
        }
        Ok(false)
    }

    /// Reserves host clusters with `take`. `take` gets a limit: the reserved run must end at or before this cluster. If the
    /// file cannot grow, free runs that the search has skipped are reserved before clusters behind the end of the file.
    async fn reserve_with<'a>(
        &'a self,
        take: impl Fn(u64) -> Result<Option<Reserved<'a>>>,
    ) -> Result<Reserved<'a>> {
        let mut limit = self.limit()?;
        loop {
            if let Some(reserved) = take(limit)? {
                point();
                return Ok(reserved);
            }
            if self.allocator.scanned() < limit {
                self.scan_next(0).await?;
                continue;
            }
            self.allocator.rewind();
            if let Some(reserved) = take(limit)? {
                point();
                return Ok(reserved);
            }
            limit = u64::MAX;
        }
    }

    /// Reserves up to `count` contiguous host clusters, and at least one. Uses the first run that the search finds, even if
    /// this run is shorter.
    pub(super) async fn reserve_any(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_with(|limit| self.allocator.take(count, limit)).await
    }

    /// Reserves exactly `count` contiguous host clusters.
    pub(in crate::qcow2) async fn reserve_contiguous(&self, count: u64) -> Result<Reserved<'_>> {
        self.image_state.event(DebugEvent::ClusterAlloc).await;
        self.reserve_with(|limit| self.allocator.take_contiguous(count, limit)).await
    }

    /// Reserves up to `count` contiguous host clusters, preferably from `behind` on, so that data is contiguous. If cluster
    /// `behind` is free, takes the free clusters from `behind` on, even if these are fewer than `count`. Otherwise takes a run
    /// of `count` clusters, or a shorter run if the file cannot grow and has no run of `count` clusters.
    pub(super) async fn reserve_run_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
        let limit = self.limit()?;
        // `behind` comes from an L2 entry, which may be corrupt. So a cluster far beyond the end of the file is not used.
        let end = self.geometry.cluster_index(self.file()?.size()).saturating_add(1);
        if let Some(start) = behind.filter(|start| *start <= end) {
            let count = count.min(limit.saturating_sub(start));
            self.scan_up_to(start.saturating_add(count)).await?;
            if let Some(reserved) = self.allocator.take_from(start, count)? {
                point();
                return Ok(reserved);
            }
        }
        loop {
            if let Some(reserved) = self.allocator.take_contiguous(count, limit)? {
                point();
                return Ok(reserved);
            }
            if self.allocator.scanned() >= limit {
                self.allocator.rewind();
                return self.reserve_any(count).await;
            }
            self.scan_next(0).await?;
        }
    }

    /// Scans the next refcount block and reports the free clusters of the block to the allocator. Contiguous blocks that do not
    /// exist are scanned together, up to the block of cluster `reach`.
    async fn scan_next(&self, reach: u64) -> Result<()> {
        let _guard = self.allocator.scanning.lock().await;
        let per_block = self.geometry.refcounts_per_block();
        let start = self.allocator.scanned();
        let block = start / per_block;
        let base = self.block_offset(block);
        let last = if base == 0 { self.last_missing(block, reach / per_block) } else { block };
        let end = last.saturating_add(1).saturating_mul(per_block);
        if end > 1 << (56 - self.geometry.cluster_bits) {
            return Err(Error::from_errno(Errno::FBIG));
        }
        if base == 0 {
            self.allocator.add_scanned(start, end, vec![(start, end)]);
            return Ok(());
        }
        let mut free: Vec<(u64, u64)> = Vec::new();
        let mut at = start;
        while at < end {
            let position = self.position(at)?;
            let Some(slice) = self.slice(&position).await? else { break };
            let first = position.slice;
            while at < end {
                let position = self.position(at)?;
                if position.slice != first {
                    break;
                }
                if self.refcount_in(&slice, &position) == 0 {
                    match free.last_mut() {
                        Some((_, last)) if *last == at => *last = at.saturating_add(1),
                        _ => free.push((at, at.saturating_add(1))),
                    }
                }
                at = at.saturating_add(1);
            }
        }
        self.allocator.add_scanned(start, end, free);
        Ok(())
    }

    /// The last of the contiguous blocks from `block` to `reach` that do not exist. `block` does not exist.
    fn last_missing(&self, block: u64, reach: u64) -> u64 {
        let next = block.saturating_add(1);
        let end = self.table_entries.load(Acquire).min(reach.saturating_add(1));
        match (next..end).find(|block| self.block_offset(*block) != 0) {
            Some(existing) => existing.saturating_sub(1),
            None => reach.max(block),
        }
    }

    /// Scans refcount blocks until all clusters before `cluster` have been scanned.
    pub(in crate::qcow2) async fn scan_up_to(&self, cluster: u64) -> Result<()> {
        while self.allocator.scanned() < cluster {
            self.scan_next(cluster).await?;
        }
        Ok(())
    }
}
