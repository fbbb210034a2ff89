//! Requests that the fast path (`map`) cannot forward, and zero writes and discards.
//!
//! A request that allocates blocks of the file locks its range of blocks of the disk. The request holds the lock during the
//! lookup and until the BAT in memory refers to the new blocks. So two allocating writes to the same block run one after the
//! other. Each new block goes through these steps:
//!
//! 1. *reserve*: get a slot that no other request has reserved; make the file long enough, with the footer after the slot;
//! 2. *write*: write the sector bitmap and the data; write zeroes before and after the data where the file may contain old
//!    data;
//! 3. *link*: set the entry in memory. Readers see the new data from this step on. [`super::write_back`] writes the entries
//!    to the file.

use oxblk_core::{BoxFuture, Errno, Error, Result, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vpc;
use crate::blocks::{Content, Extent, Run, extent};

impl Vpc {
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

    /// Makes a range of the disk read as zeroes. Unallocated blocks of the range are allocated, as in QEMU. Where the file
    /// may contain other data, it is overwritten with zeroes.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let flags = flags & ZeroFlags::MAY_UNMAP;
        self.change(offset, Content::Zeroes(len, flags)).await
    }

    /// Passes the discard of the allocated parts of a range to the file. The blocks stay allocated.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.access.check_writable()?;
        let file = self.file()?;
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let extent = self.extent(at, end - at).await?;
            if let Extent::Data { host, len } = extent {
                file.discard(host, len).await?;
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }

    async fn change(&self, offset: u64, content: Content) -> Result<()> {
        self.access.check_writable()?;
        let len = content.len();
        // A write inside one allocated block needs no lock.
        if let Extent::Data { host, len: covered } = self.extent(offset, len).await?
            && covered == len
        {
            return self.put_in_place(offset, host, content).await;
        }
        let last = offset.saturating_add(len).saturating_sub(1);
        let blocks = self.block_of(offset).into()..u64::from(self.block_of(last)).saturating_add(1);
        let _lock = self.guest.lock(blocks).await;
        self.change_locked(offset, content).await
    }

    async fn change_locked(&self, offset: u64, mut content: Content) -> Result<()> {
        let block = self.metadata.header.block();
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while content.len() > 0 {
            let extent = match self.extent(at, (block - at % block).min(content.len())).await {
                Ok(extent) => extent,
                // The parts before the failed lookup are still written.
                Err(error) => return run_all(jobs).await.and(Err(error)),
            };
            let piece = content.split_to(extent.len());
            let first = at;
            at = at.saturating_add(piece.len());
            match extent {
                Extent::Data { host, .. } => {
                    jobs.push(Box::pin(self.put_in_place(first, host, piece)));
                }
                Extent::Unallocated { .. } => match self.allocator.reserve(1).await {
                    Ok(run) => jobs.push(Box::pin(self.fill_and_link(first, piece, run))),
                    Err(error) => return run_all(jobs).await.and(Err(error)),
                },
            }
        }
        run_all(jobs).await
    }

    /// Writes to an allocated block.
    async fn put_in_place(&self, offset: u64, host: u64, content: Content) -> Result<()> {
        let header = &self.metadata.header;
        let start = host.saturating_sub(offset % header.block()).saturating_sub(header.bitmap());
        self.fill_bitmap(self.block_of(offset), start).await?;
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

    /// Writes `content` and the rest of its block to the slot of `run`, and sets the entry of the block. The content lies
    /// in one block.
    async fn fill_and_link(&self, offset: u64, content: Content, run: Run) -> Result<()> {
        let header = &self.metadata.header;
        let Some(entry) = self.slot_entry(run.start) else {
            return Err(Error::from_errno(Errno::NOSPC));
        };
        self.lengthen(run.end()).await?;
        let start = self.slot_offset(run.start);
        let data = start.saturating_add(header.bitmap());
        let host = data.saturating_add(offset % header.block());
        let end = host.saturating_add(content.len());
        let bitmap: BoxFuture<'_, Result<()>> = Box::pin(self.write_new_bitmap(start));
        let mut jobs = vec![bitmap];
        if run.fresh {
            if let Content::Data(_) = content {
                jobs.push(Box::pin(self.put(host, content)));
            }
        } else {
            let zeroes = |len| Content::Zeroes(len, ZeroFlags::MAY_UNMAP);
            let tail = self.slot_offset(run.end()).saturating_sub(end);
            jobs.push(Box::pin(self.put(data, zeroes(host - data))));
            jobs.push(Box::pin(self.put(host, content)));
            jobs.push(Box::pin(self.put(end, zeroes(tail))));
        }
        run_all(jobs).await?;
        point();
        let index = self.block_of(offset);
        self.full.insert(index);
        self.set_entry(index, entry);
        run.keep();
        Ok(())
    }
}
