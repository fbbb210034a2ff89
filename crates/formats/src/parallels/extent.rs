//! Translation of disk offsets to extents by the BAT.
//!
//! [`Parallels::lookup`] answers from memory, without a lock; [`Parallels::extent`] first loads missing parts of the
//! BAT.

use oxblk_core::{ChildIdx, Error, Result, Status, StatusFlags};
use oxblk_ring::IoBufMut;

use super::Parallels;
use super::header::HEADER_BYTES;
use crate::blocks::{ENTRY_BYTES, Extent, extent};

/// Most clusters whose entries one lookup examines.
const MAX_RUN: u32 = 1 << 20;

impl Parallels {
    /// The cluster of the disk that contains `offset`.
    pub(super) fn cluster_of(&self, offset: u64) -> u32 {
        u32::try_from(offset / self.header.cluster).unwrap_or(u32::MAX)
    }

    /// Looks up the extent at the start of `offset..offset + len` (`len` > 0) in memory; `None` if the BAT is not
    /// loaded there. Takes no lock.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Option<Extent> {
        let (first, within) = (self.cluster_of(offset), offset % self.header.cluster);
        if first >= self.map.len() {
            // The BAT is shorter than the disk.
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

    /// The extent at the start of `offset..offset + len`. Loads the BAT if necessary.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        if let Some(extent) = self.lookup(offset, len) {
            return Ok(extent);
        }
        self.load(self.cluster_of(offset)).await?;
        self.lookup(offset, len)
            .ok_or_else(|| Error::corrupt("the BAT has no such entry").at(offset))
    }

    /// Loads the chunk of the BAT with the entry of `cluster`.
    pub(super) async fn load(&self, cluster: u32) -> Result<()> {
        if !self.map.is_loaded(cluster) {
            let bytes = self.read_bat_chunk(cluster).await?;
            self.map.load(cluster, &bytes);
        }
        Ok(())
    }

    /// Reads the chunk of the BAT with the entry of `cluster` from the file.
    pub(super) async fn read_bat_chunk(&self, cluster: u32) -> Result<IoBufMut> {
        let range = self.map.chunk_of(cluster);
        let entries = u64::from(range.end.saturating_sub(range.start));
        let len = usize::try_from(entries.saturating_mul(ENTRY_BYTES)).unwrap_or(0);
        let read = self.file()?.read(entry_offset(range.start), IoBufMut::new(len)).await;
        read.map_err(|error| error.prefix("Could not read the BAT"))
    }

    /// The status of the start of `offset..offset + len`. An allocated cluster is data.
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

/// Byte offset of an entry in the file.
pub(super) fn entry_offset(index: u32) -> u64 {
    HEADER_BYTES.saturating_add(u64::from(index).saturating_mul(ENTRY_BYTES))
}
