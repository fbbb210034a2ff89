//! Requests that the fast path cannot answer: requests that allocate clusters, and requests over several extents.
//!
//! A request that allocates locks the range of its clusters before it looks them up, and holds the lock until the map
//! names the new clusters. So two writers of one cluster run one after the other. Each run of clusters goes through
//! these steps:
//!
//! 1. *reserve*: get clusters of the file that no other request has; make the file long enough;
//! 2. *write*: write the data, and zeroes around it where the file may contain other data;
//! 3. *link*: set the entries in memory. Readers see the new data from here on. [`super::write_back`] writes the entries to
//!    the file.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use oxblk_core::Errno;
use oxblk_core::{BoxFuture, Error, Preallocation, Result, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Parallels;
use crate::blocks::{Content, Extent, Run, extent, length};

/// Most freed clusters that may wait for a write-back of their entries, if no flush comes.
const MANY_FREED: usize = 64;
/// In a file that cannot grow, freed clusters do not wait if no more than this number of clusters can be allocated. It is larger
/// than [`MANY_FREED`]: a freed cluster can be allocated only after the requests that are in flight now.
const FEW_AVAILABLE: u64 = 128;

impl Parallels {
    /// Reads `buf.len()` bytes of the disk at `offset`.
    pub(super) async fn read_guest(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let file = self.file()?;
        let extent = async |at, len| self.extent(at, len).await;
        extent::read(&file, offset, buf, extent).await
    }

    /// Writes `data` to the disk at `offset`.
    pub(super) async fn write_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.change(offset, data).await
    }

    /// Makes a range of the disk read as zeroes. Whole clusters are freed. Zeroes are written to allocated clusters
    /// that the range covers in part.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.access.check_writable()?;
        let end = offset.saturating_add(len);
        let (first, last) = (self.cluster_of(offset), self.cluster_of(end.saturating_sub(1)));
        let _lock = self.guest.lock(u64::from(first)..u64::from(last).saturating_add(1)).await;
        let (from, to) = self.whole_within(offset, end);
        if from >= to {
            return self.zero_allocated(offset, end, flags).await;
        }
        self.zero_allocated(offset, from, flags).await?;
        self.free_clusters(from, to).await?;
        self.zero_allocated(to, end, flags).await?;
        self.relieve().await
    }

    /// Frees the whole clusters of a range.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.access.check_writable()?;
        let (from, to) = self.whole_within(offset, offset.saturating_add(len));
        if from >= to {
            return Ok(());
        }
        let clusters = u64::from(self.cluster_of(from))..to.div_ceil(self.header.cluster);
        let _lock = self.guest.lock(clusters).await;
        self.free_clusters(from, to).await?;
        self.relieve().await
    }

    /// Writes back early if many freed clusters wait for it, or if they are needed soon. Otherwise the file would grow for as
    /// long as no flush comes, or a file that cannot grow would be full.
    async fn relieve(&self) -> Result<()> {
        let freed = self.freed.len();
        let needed = freed > MANY_FREED || freed > 0 && self.is_nearly_full()?;
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

    /// The part of a range that consists of whole clusters. The last cluster of the disk may end with the disk.
    fn whole_within(&self, offset: u64, end: u64) -> (u64, u64) {
        let cluster = self.header.cluster;
        let from = offset.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let to = if end >= self.header.size { end } else { end - end % cluster };
        (from, to)
    }

    /// Frees the allocated clusters of a range of whole clusters. The caller holds the range lock.
    async fn free_clusters(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            if let Extent::Data { host, len } = extent {
                let count = len.div_ceil(self.header.cluster);
                for step in 0..count {
                    let ahead = step.saturating_mul(self.header.cluster);
                    self.set_entry(self.cluster_of(at.saturating_add(ahead)), 0);
                    // Every host offset is that of a cluster: faults were repaired when the image was opened for
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

    async fn change(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.access.check_writable()?;
        let len = length(&data);
        let content = Content::Data(data);
        // A write to allocated clusters needs no lock.
        if let Extent::Data { host, len: covered } = self.extent(offset, len).await?
            && covered == len
        {
            return self.put_in_place(host, content).await;
        }
        let last = offset.saturating_add(len).saturating_sub(1);
        if self.cluster_of(last) >= self.map.len() {
            // The BAT is shorter than the disk.
            return Err(Error::from_errno(Errno::INVAL));
        }
        let clusters =
            u64::from(self.cluster_of(offset))..u64::from(self.cluster_of(last)).saturating_add(1);
        let _lock = self.guest.lock(clusters).await;
        self.relieve().await?;
        self.change_locked(offset, content).await
    }

    async fn change_locked(&self, offset: u64, mut content: Content) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while content.len() > 0 {
            let extent = match self.extent(at, content.len()).await {
                Ok(extent) => extent,
                // Reserved clusters return to the allocator once no write to them is in flight.
                Err(error) => return run_all(jobs).await.and(Err(error)),
            };
            let mut piece = content.split_to(extent.len());
            let first = at;
            at = at.saturating_add(piece.len());
            match extent {
                Extent::Data { host, .. } => jobs.push(Box::pin(self.put_in_place(host, piece))),
                Extent::Unallocated { .. } => {
                    let mut from = first;
                    while piece.len() > 0 {
                        let end =
                            self.cluster_of(from.saturating_add(piece.len()).saturating_sub(1));
                        let count = end.saturating_sub(self.cluster_of(from)).saturating_add(1);
                        let run = match self.allocator.reserve(count).await {
                            Ok(run) => run,
                            Err(error) => return run_all(jobs).await.and(Err(error)),
                        };
                        let room = u64::from(run.count).saturating_mul(self.header.cluster)
                            - from % self.header.cluster;
                        let part = piece.split_to(room);
                        let next = from.saturating_add(part.len());
                        jobs.push(Box::pin(self.fill_and_link(from, part, run)));
                        from = next;
                    }
                }
            }
        }
        run_all(jobs).await
    }

    /// Writes to clusters that are allocated.
    async fn put_in_place(&self, host: u64, content: Content) -> Result<()> {
        // The clusters may lie behind the end of the file, if the file was truncated by another program.
        let end = host.saturating_add(content.len()).saturating_sub(self.header.data_offset);
        self.lengthen(self.cluster_of(end.saturating_add(self.header.cluster - 1))).await?;
        self.put(host, content).await
    }

    async fn put(&self, host: u64, content: Content) -> Result<()> {
        let file = self.file()?;
        match content {
            Content::Data(data) => file.write(host, data, WriteFlags::empty()).await,
            Content::Zeroes(0, _) => Ok(()),
            Content::Zeroes(len, flags) => file.write_zeroes(host, len, flags).await,
        }
    }

    async fn fill_and_link(&self, offset: u64, content: Content, run: Run) -> Result<()> {
        self.lengthen(run.end()).await?;
        let start = self.header.cluster_offset(run.start);
        let host = start.saturating_add(offset % self.header.cluster);
        let end = host.saturating_add(content.len());
        if run.fresh {
            if let Content::Data(_) = content {
                self.put(host, content).await?;
            }
        } else {
            let flags = ZeroFlags::MAY_UNMAP;
            let head = Content::Zeroes(host - start, flags);
            let tail = self.header.cluster_offset(run.end()).saturating_sub(end);
            let tail = Content::Zeroes(tail, flags);
            run_all([self.put(start, head), self.put(host, content), self.put(end, tail)]).await?;
        }
        point();
        let first = self.cluster_of(offset);
        for index in 0..run.count {
            let at = run.start.saturating_add(index);
            // The allocator never returns a cluster that an entry cannot name.
            let entry = self.header.entry(at).unwrap_or_default();
            self.set_entry(first.saturating_add(index), entry);
        }
        run.keep();
        Ok(())
    }

    /// Extends the file so that it contains all clusters before `end`. All extensions go through the `growing` lock, so
    /// no extension truncates the file.
    pub(super) async fn lengthen(&self, end: u32) -> Result<()> {
        if self.whole_clusters.load(Acquire) >= end {
            return Ok(());
        }
        let _turn = self.growing.lock().await;
        if self.whole_clusters.load(Acquire) >= end {
            return Ok(());
        }
        let (file, needed) = (self.file()?, self.header.cluster_offset(end));
        if file.size() < needed {
            if !file.node().limits().grows {
                return Err(Error::from_errno(Errno::NOSPC));
            }
            file.resize(needed, Preallocation::Off).await?;
        }
        self.whole_clusters.fetch_max(end, AcqRel);
        Ok(())
    }
}
