//! Requests that the fast path cannot answer: requests that allocate blocks, and requests over several extents.
//!
//! A request that allocates locks the range of its blocks before it looks them up, and holds the lock until the map
//! names the new blocks. So two writers of one block run one after the other. Each run of blocks goes through these
//! steps:
//!
//! 1. *reserve*: get blocks of the file that no other request has; make the file long enough;
//! 2. *write*: write the data, and zeroes around it where the file may contain other data;
//! 3. *link*: set the entries in memory. Readers see the new data from here on. [`super::write_back`] writes the entries to
//!    the file.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use oxblk_core::{BoxFuture, Errno, Error, Preallocation, Result, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vdi;
use super::entry::Entry;
use super::extent::block_of;
use super::header::BLOCK;
use crate::blocks::{Content, Extent, Run, extent};

impl Vdi {
    /// Reads `buf.len()` bytes of the disk at `offset`.
    pub(super) async fn read_guest(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let file = self.file()?;
        let extent = async |at, len| self.extent(at, len).await;
        extent::read(&file, offset, buf, extent).await
    }

    /// Writes `data` to the disk at `offset`.
    pub(super) async fn write_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.change(offset, Content::Data(data)).await
    }

    /// Makes a range of the disk read as zeroes. Its blocks are allocated, as in QEMU. Zeroes are written where the
    /// file may contain other data.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let flags = flags & ZeroFlags::MAY_UNMAP;
        self.change(offset, Content::Zeroes(len, flags)).await
    }

    /// Returns the space of the allocated parts of a range to the host. The blocks stay allocated.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.access.check_writable()?;
        let file = self.file()?;
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let extent = self.extent(at, end - at).await?;
            if let Extent::Data { host, len } = extent {
                let len = len.min(file.size().saturating_sub(host));
                if len > 0 {
                    file.discard(host, len).await?;
                }
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }

    async fn change(&self, offset: u64, content: Content) -> Result<()> {
        self.access.check_writable()?;
        let len = content.len();
        // A write to allocated blocks needs no lock.
        if let Extent::Data { host, len: covered } = self.extent(offset, len).await?
            && covered == len
        {
            return self.put_in_place(host, content).await;
        }
        let last = offset.saturating_add(len).saturating_sub(1);
        let blocks = u64::from(block_of(offset))..u64::from(block_of(last)).saturating_add(1);
        let _lock = self.guest.lock(blocks).await;
        self.change_locked(offset, content).await
    }

    async fn change_locked(&self, offset: u64, mut content: Content) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while content.len() > 0 {
            let extent = match self.extent(at, content.len()).await {
                Ok(extent) => extent,
                // Reserved blocks return to the allocator once no write to them is in flight.
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
                        let end = block_of(from.saturating_add(piece.len()).saturating_sub(1));
                        let count = end.saturating_sub(block_of(from)).saturating_add(1);
                        let run = match self.allocator.reserve(count).await {
                            Ok(run) => run,
                            Err(error) => return run_all(jobs).await.and(Err(error)),
                        };
                        let room = u64::from(run.count).saturating_mul(BLOCK) - from % BLOCK;
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

    /// Writes to blocks that are allocated.
    async fn put_in_place(&self, host: u64, content: Content) -> Result<()> {
        // The blocks may lie behind the end of the file, if the file was truncated by another program.
        let end = host.saturating_add(content.len()).saturating_sub(self.header.data_offset);
        self.lengthen(block_of(end.saturating_add(BLOCK - 1))).await?;
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
        let start = self.header.block_offset(run.start);
        let host = start.saturating_add(offset % BLOCK);
        let end = host.saturating_add(content.len());
        if run.fresh {
            if let Content::Data(_) = content {
                self.put(host, content).await?;
            }
        } else {
            let flags = ZeroFlags::MAY_UNMAP;
            let head = Content::Zeroes(host - start, flags);
            let tail = self.header.block_offset(run.end()).saturating_sub(end);
            let tail = Content::Zeroes(tail, flags);
            run_all([self.put(start, head), self.put(host, content), self.put(end, tail)]).await?;
        }
        point();
        let first = block_of(offset);
        for index in 0..run.count {
            let at = run.start.saturating_add(index);
            self.set_entry(first.saturating_add(index), Entry::At(at));
        }
        run.keep();
        Ok(())
    }

    /// Extends the file so that it contains all blocks before `end`. All extensions go through the `growing` lock, so
    /// no extension truncates the file.
    pub(super) async fn lengthen(&self, end: u32) -> Result<()> {
        if self.whole_blocks.load(Acquire) >= end {
            return Ok(());
        }
        let _turn = self.growing.lock().await;
        if self.whole_blocks.load(Acquire) >= end {
            return Ok(());
        }
        let (file, needed) = (self.file()?, self.header.block_offset(end));
        if file.size() < needed {
            if !file.node().limits().grows {
                return Err(Error::from_errno(Errno::NOSPC));
            }
            file.resize(needed, Preallocation::Off).await?;
        }
        self.whole_blocks.fetch_max(end, AcqRel);
        Ok(())
    }
}
