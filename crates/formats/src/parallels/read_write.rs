//! Zero writes and discards of parallels. These requests free clusters. [`BlockImage`] implements the other requests.

use oxblk_core::{Result, ZeroFlags};

use super::Parallels;
use crate::blocks::{BlockImage, Content, Extent};

/// If more freed clusters than this wait for a write-back, their entries are written back immediately.
const MANY_FREED: usize = 64;
/// In a file that cannot grow, entries of freed clusters are written back immediately if only this number of clusters or fewer
/// can be allocated. The number is larger than [`MANY_FREED`], because a freed cluster can be allocated only after the requests
/// that are in flight now have ended.
const FEW_AVAILABLE: u64 = 128;

impl Parallels {
    /// Makes a range of the disk read as zeroes. Clusters that the range covers completely are freed. In other allocated
    /// clusters of the range, zeroes are written.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.access.check_writable()?;
        let end = offset.saturating_add(len);
        let _lock = self.guest.lock(self.blocks_of(offset, len)).await;
        let (from, to) = self.whole_within(offset, end);
        if from >= to {
            return self.zero_allocated(offset, end, flags).await;
        }
        self.zero_allocated(offset, from, flags).await?;
        self.free_clusters(from, to).await?;
        self.zero_allocated(to, end, flags).await?;
        self.write_back_if_needed().await
    }

    /// Frees the clusters that a range covers completely.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.access.check_writable()?;
        let (from, to) = self.whole_within(offset, offset.saturating_add(len));
        if from >= to {
            return Ok(());
        }
        let clusters = u64::from(self.block_of(from))..to.div_ceil(self.header.cluster);
        let _lock = self.guest.lock(clusters).await;
        self.free_clusters(from, to).await?;
        self.write_back_if_needed().await
    }

    /// Writes back if many freed clusters wait for a write-back, or if the file is nearly full. Without this, the file
    /// could grow until the next flush request.
    async fn write_back_if_needed(&self) -> Result<()> {
        if self.freed.len() > MANY_FREED {
            return self.write_back().await;
        }
        self.write_back_if_nearly_full().await
    }

    /// Writes back if freed clusters wait for a write-back and few other clusters can be allocated.
    pub(super) async fn write_back_if_nearly_full(&self) -> Result<()> {
        let needed = self.freed.len() > 0 && self.is_nearly_full()?;
        if needed { self.write_back().await } else { Ok(()) }
    }

    /// Whether the file cannot grow and contains few clusters that can be allocated.
    fn is_nearly_full(&self) -> Result<bool> {
        let file = self.file()?;
        if file.node().limits().grows {
            return Ok(false);
        }
        let capacity = file.size().saturating_sub(self.header.data_offset) / self.header.cluster;
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        Ok(self.allocator.available(capacity) <= FEW_AVAILABLE)
    }

    /// The part of a range that consists of complete clusters. The last cluster of the disk is complete if the range reaches
    /// the end of the disk.
    fn whole_within(&self, offset: u64, end: u64) -> (u64, u64) {
        let cluster = self.header.cluster;
        let from = offset.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let to = if end >= self.header.size { end } else { end - end % cluster };
        (from, to)
    }

    /// Frees the allocated clusters of a range of complete clusters. The caller holds the range lock.
    async fn free_clusters(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            if let Extent::Data { host, len } = extent {
                let count = len.div_ceil(self.header.cluster);
                for step in 0..count {
                    let ahead = step.saturating_mul(self.header.cluster);
                    self.set_entry(self.block_of(at.saturating_add(ahead)), 0);
                    // Every host offset is the start of a cluster, because faults were repaired when the image was opened for
                    // writing.
                    let freed = self.header.cluster_index(host.saturating_add(ahead));
                    self.freed.add(freed);
                }
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }

    /// Writes zeroes to the allocated parts of a range. The caller holds the range lock.
    async fn zero_allocated(&self, from: u64, to: u64, flags: ZeroFlags) -> Result<()> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            if let Extent::Data { host, len } = extent {
                let flags = flags & ZeroFlags::MAY_UNMAP;
                self.put_in_place(host, Content::Zeroes(len, flags)).await?;
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }
}
