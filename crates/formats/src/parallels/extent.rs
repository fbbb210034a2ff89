//! Mapping of disk offsets to extents with the BAT.
//!
//! [`BlockImage::lookup`] uses only the BAT in memory and takes no lock. [`BlockImage::extent`] loads missing parts of the BAT
//! first.

use std::sync::Arc;

use oxblk_core::{ChildIdx, Edge, Result, Status, StatusFlags};

use super::Parallels;
use super::header::HEADER_BYTES;
use crate::blocks::{BlockImage, ENTRY_BYTES, Extent, Parts, extent};

/// A lookup ends when it has covered this many clusters.
const MAX_RUN: u32 = 1 << 20;

impl BlockImage for Parallels {
    const MAP_NAME: &'static str = "BAT";

    fn parts(&self) -> Parts<'_> {
        Parts {
            map: &self.map,
            allocator: &self.allocator,
            whole: &self.whole_clusters,
            guest: &self.guest,
            growing: &self.growing,
        }
    }

    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn check_writable(&self) -> Result<()> {
        self.access.check_writable()
    }

    fn block_size(&self) -> u64 {
        self.header.cluster
    }

    fn block_offset(&self, block: u32) -> u64 {
        self.header.cluster_offset(block)
    }

    fn entry_offset(&self, index: u32) -> u64 {
        HEADER_BYTES.saturating_add(u64::from(index).saturating_mul(ENTRY_BYTES))
    }

    fn lookup(&self, offset: u64, len: u64) -> Option<Extent> {
        let (first, within) = (self.block_of(offset), offset % self.header.cluster);
        if first >= self.map.len() {
            // The BAT has no entry for this part of the disk.
            return Some(Extent::Unallocated { len });
        }
        let entry = self.map.get(first)?;
        let host = self.header.host(entry);
        let mut covered = self.header.cluster - within;
        let mut clusters = 1_u32;
        while covered < len && clusters < MAX_RUN {
            let next = first.saturating_add(clusters);
            let ahead = u64::from(clusters).saturating_mul(self.header.cluster);
            let step = match (entry, self.map.uniform(next)) {
                (0, Some((0, count))) => count.max(1),
                _ => match (entry, self.map.get(next)) {
                    (0, Some(0)) => 1,
                    (1.., Some(other @ 1..))
                        if self.header.host(other) == host.saturating_add(ahead) =>
                    {
                        1
                    }
                    _ => break,
                },
            };
            clusters = clusters.saturating_add(step);
            let more = u64::from(step).saturating_mul(self.header.cluster);
            covered = covered.saturating_add(more);
        }
        let len = covered.min(len);
        Some(match entry {
            0 => Extent::Unallocated { len },
            _ => Extent::Data { host: host.saturating_add(within), len },
        })
    }

    fn link(&self, index: u32, block: u32) {
        // The allocator returns only clusters whose offsets fit in an entry.
        self.set_entry(index, self.header.entry(block).unwrap_or_default());
    }

    async fn before_allocation(&self) -> Result<()> {
        self.write_back_if_nearly_full().await
    }
}

impl Parallels {
    /// The block status at `offset`, for at most `len` bytes. Allocated clusters are reported as data.
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Status> {
        let extent = async |at, len| self.extent(at, len).await;
        Ok(match extent::joined(offset, len, extent).await? {
            Extent::Unallocated { len } => Status::unallocated(len),
            Extent::Data { host, len } => {
                let mut status = Status::stored(len, ChildIdx::FILE, host);
                status.flags -= StatusFlags::RECURSE;
                status
            }
        })
    }
}
