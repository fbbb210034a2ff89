//! Requests that the map of the fast path cannot answer: those that allocate, and those that go over several extents.
//!
//! A request that allocates holds the range lock on its clusters of the disk from the moment it looks at them until the map names
//! them, so that two writers of one cluster follow each other. Each run of clusters goes through
//!
//! 1. *reserve*: clusters of the file that nobody else can have; the file becomes long enough;
//! 2. *write*: the data, and zeroes around it where the file may hold something else;
//! 3. *link*: the entries name the clusters in memory. Readers see the new data from here on, and [`super::write_back`] writes
//!    the entries.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use oxblk_core::Errno;
use oxblk_core::{BoxFuture, Error, Preallocation, Result, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::{Parallels, lock};
use crate::blocks::{Content, Extent, Run, extent, length};

/// Clusters that may wait for their entries to be written before they are free, if no flush comes.
const MANY_FREED: usize = 64;

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

    /// Makes a range of the disk read as zeroes: whole clusters are freed, and in others zeroes are written to what is
    /// allocated.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
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
        self.check_writable()?;
        let (from, to) = self.whole_within(offset, offset.saturating_add(len));
        if from >= to {
            return Ok(());
        }
        let clusters = u64::from(self.cluster_of(from))..to.div_ceil(self.header.cluster);
        let _lock = self.guest.lock(clusters).await;
        self.free_clusters(from, to).await?;
        self.relieve().await
    }

    /// Writes back early if many clusters wait for it: else the file would grow as long as no flush comes.
    async fn relieve(&self) -> Result<()> {
        let many = lock(&self.freed).len() > MANY_FREED;
        if many { self.write_back().await } else { Ok(()) }
    }

    /// The part of a range that is whole clusters; the last one ends with the disk.
    fn whole_within(&self, offset: u64, end: u64) -> (u64, u64) {
        let cluster = self.header.cluster;
        let from = offset.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let to = if end >= self.header.size { end } else { end - end % cluster };
        (from, to)
    }

    /// Frees what is allocated of whole clusters. The caller holds the range lock.
    async fn free_clusters(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            if let Extent::Data { host, len } = extent {
                let count = len.div_ceil(self.header.cluster);
                for step in 0..count {
                    let ahead = step.saturating_mul(self.header.cluster);
                    self.set_entry(self.cluster_of(at.saturating_add(ahead)), 0);
                    // Faults were repaired when the image was opened for writing.
                    let freed = self.header.cluster_index(host.saturating_add(ahead));
                    lock(&self.freed).extend(freed);
                }
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }

    /// Writes zeroes to what is allocated of a range. The caller holds the range lock.
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
        self.check_writable()?;
        let len = length(&data);
        let content = Content::Data(data);
        // What is in place needs no lock.
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
        self.change_locked(offset, content).await
    }

    async fn change_locked(&self, offset: u64, mut content: Content) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while content.len() > 0 {
            let extent = match self.extent(at, content.len()).await {
                Ok(extent) => extent,
                // What has been reserved is given back when nothing is being written to it.
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
                        let run = match self.reserve(count) {
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

    /// Clusters for new data; refused while it is not known which ones are free.
    fn reserve(&self, count: u32) -> Result<Run> {
        if !self.surveyed.load(Acquire) {
            return Err(Error::from_errno(Errno::IO).reword(
                "It is not known which clusters of the image are free: it has to be opened again",
            ));
        }
        self.allocator.reserve(count)
    }

    /// Writes to clusters that are allocated.
    async fn put_in_place(&self, host: u64, content: Content) -> Result<()> {
        // The clusters may be behind the end of the file, where somebody has cut it off.
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
            // The allocator gives out no cluster that an entry cannot name.
            let entry = self.header.entry(at).unwrap_or_default();
            self.set_entry(first.saturating_add(index), entry);
        }
        run.keep();
        Ok(())
    }

    /// Makes the file so long that it has all clusters before `end`. Nothing else makes it longer, so that it is never cut off.
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
