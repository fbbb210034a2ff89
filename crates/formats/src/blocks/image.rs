//! Requests to an image with a block map. vdi and parallels share this implementation.
//!
//! A format implements the required methods of [`BlockImage`]: the size and the offsets of its blocks, and the meaning of
//! its entries. The provided methods load the map, forward reads and writes to the file, and allocate blocks.
//!
//! A request that allocates blocks of the file locks its range of blocks of the disk. The request holds the lock during the
//! lookup and until the map refers to the new blocks. So two allocating writes to one block run one after the other. Each
//! run of blocks goes through these steps:
//!
//! 1. *reserve*: reserve blocks of the file, and make the file long enough;
//! 2. *write*: write the data, and zeroes around the data where the file may contain other data;
//! 3. *link*: set the entries in memory. Readers see the new data from this step on. The format's write-back writes the
//!    entries to the file.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

use oxblk_core::{
    BoxFuture, ChildIdx, Edge, Errno, Error, MapOp, Result, Step, WriteFlags, ZeroFlags, run_all,
};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBufMut, Mutex as AsyncMutex, RangeLock};

use super::{Allocator, Content, ENTRY_BYTES, EntryMap, Extent, Run};
use crate::file_len;

/// The parts of an open image that its requests use.
pub(crate) struct Parts<'a> {
    pub(crate) map: &'a EntryMap,
    pub(crate) allocator: &'a Arc<Allocator>,
    /// The file contains all blocks before the block with this number completely.
    pub(crate) whole: &'a AtomicU32,
    /// Range lock on the blocks of the disk that are being allocated or freed.
    pub(crate) guest: &'a RangeLock,
    /// Held while the file is made longer.
    pub(crate) growing: &'a AsyncMutex<()>,
}

/// An open image with a block map.
pub(crate) trait BlockImage {
    /// The name of the map in messages.
    const MAP_NAME: &'static str;

    /// The parts of the image.
    fn parts(&self) -> Parts<'_>;

    /// The file that contains the image.
    fn file(&self) -> Result<Arc<Edge>>;

    /// Refuses a change of a read-only image.
    fn check_writable(&self) -> Result<()>;

    /// Size of a block in bytes.
    fn block_size(&self) -> u64;

    /// Byte offset of a block in the file. Block 0 is the first block of the data area.
    fn block_offset(&self, block: u32) -> u64;

    /// Byte offset of an entry of the map in the file.
    fn entry_offset(&self, index: u32) -> u64;

    /// Looks up the extent at the start of `offset..offset + len` (`len` > 0) in memory. Returns `None` if the map has no
    /// loaded entry for `offset`. Takes no lock.
    fn lookup(&self, offset: u64, len: u64) -> Option<Extent>;

    /// Makes entry `index` refer to `block` of the file, in memory.
    fn link(&self, index: u32, block: u32);

    /// Prepares an allocation. The default does nothing. The caller holds the range lock.
    async fn before_allocation(&self) -> Result<()> {
        Ok(())
    }

    /// The block of the disk that contains `offset`. This is also the number of whole blocks in `offset` bytes of the data
    /// area.
    fn block_of(&self, offset: u64) -> u32 {
        u32::try_from(offset / self.block_size()).unwrap_or(u32::MAX)
    }

    /// The blocks of the disk that a range of bytes (`len` > 0) touches.
    fn blocks_of(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let last = offset.saturating_add(len).saturating_sub(1);
        u64::from(self.block_of(offset))..u64::from(self.block_of(last)).saturating_add(1)
    }

    /// The result of `Driver::map`.
    fn step(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let child = ChildIdx::FILE;
        match (self.lookup(offset, len), op) {
            (Some(Extent::Unallocated { len }), MapOp::Read) => Step::Zero { len },
            (Some(Extent::Data { host, len }), MapOp::Read) => {
                Step::Forward { child, offset: host, len }
            }
            (Some(Extent::Data { host, len }), MapOp::Write) => {
                // Extending the file needs a lock, so the slow path extends it.
                if self.parts().whole.load(Acquire) < self.whole_blocks_until(host, len) {
                    return Step::Slow;
                }
                Step::Forward { child, offset: host, len }
            }
            (Some(Extent::Unallocated { .. }), MapOp::Write) | (None, _) => Step::Slow,
        }
    }

    /// The number of blocks of the file up to the end of a range of the data area.
    fn whole_blocks_until(&self, host: u64, len: u64) -> u32 {
        let end = host.saturating_add(len).saturating_sub(self.block_offset(0));
        self.block_of(end.saturating_add(self.block_size() - 1))
    }

    /// The extent at the start of `offset..offset + len`. Loads the chunk of the map if it is not loaded.
    async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        if let Some(extent) = self.lookup(offset, len) {
            return Ok(extent);
        }
        self.load(self.block_of(offset)).await?;
        self.lookup(offset, len).ok_or_else(|| {
            Error::corrupt(format!("the {} has no such entry", Self::MAP_NAME)).at(offset)
        })
    }

    /// Loads the chunk of the map with the entry of `block`.
    async fn load(&self, block: u32) -> Result<()> {
        let map = self.parts().map;
        if !map.is_loaded(block) {
            let bytes = self.read_map_chunk(block).await?;
            map.load(block, &bytes);
        }
        Ok(())
    }

    /// Reads the chunk of the map with the entry of `block` from the file.
    async fn read_map_chunk(&self, block: u32) -> Result<IoBufMut> {
        let range = self.parts().map.chunk_of(block);
        let entries = u64::from(range.end.saturating_sub(range.start));
        let len = usize::try_from(entries.saturating_mul(ENTRY_BYTES)).unwrap_or(0);
        let read = self.file()?.read(self.entry_offset(range.start), IoBufMut::new(len)).await;
        read.map_err(|error| error.prefix(format!("Could not read the {}", Self::MAP_NAME)))
    }

    /// Reads `buf.len()` bytes of the disk at `offset`.
    async fn read_guest(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let file = self.file()?;
        let extent = async |at, len| self.extent(at, len).await;
        super::extent::read(&file, offset, buf, extent).await
    }

    /// Writes `content` to the disk at `offset`, and allocates the blocks that it needs.
    async fn change(&self, offset: u64, content: Content) -> Result<()> {
        self.check_writable()?;
        let len = content.len();
        // A write to allocated blocks that are contiguous in the file needs no lock.
        if let Extent::Data { host, len: covered } = self.extent(offset, len).await?
            && covered == len
        {
            return self.put_in_place(host, content).await;
        }
        let blocks = self.blocks_of(offset, len);
        if blocks.end > u64::from(self.parts().map.len()) {
            // The map is shorter than the disk.
            return Err(Error::from_errno(Errno::INVAL));
        }
        let _lock = self.parts().guest.lock(blocks).await;
        self.before_allocation().await?;
        self.change_locked(offset, content).await
    }

    /// The same as [`Self::change`], for callers that hold the range lock.
    async fn change_locked(&self, offset: u64, mut content: Content) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while content.len() > 0 {
            let extent = match self.extent(at, content.len()).await {
                Ok(extent) => extent,
                // The parts before the failed lookup are still written.
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
                        let blocks = self.blocks_of(from, piece.len());
                        let count = blocks.end.saturating_sub(blocks.start);
                        let count = u32::try_from(count).unwrap_or(u32::MAX);
                        let run = match self.parts().allocator.reserve(count).await {
                            Ok(run) => run,
                            Err(error) => return run_all(jobs).await.and(Err(error)),
                        };
                        let size = self.block_size();
                        let space = u64::from(run.count).saturating_mul(size) - from % size;
                        let part = piece.split_to(space);
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
        // The blocks may lie behind the end of the file, for example if another program has truncated the file.
        self.lengthen(self.whole_blocks_until(host, content.len())).await?;
        self.put(host, content).await
    }

    /// Writes to the file.
    async fn put(&self, host: u64, content: Content) -> Result<()> {
        let file = self.file()?;
        match content {
            Content::Data(data) => file.write(host, data, WriteFlags::empty()).await,
            Content::Zeroes(0, _) => Ok(()),
            Content::Zeroes(len, flags) => file.write_zeroes(host, len, flags).await,
        }
    }

    /// Writes to reserved blocks, and makes the map refer to them.
    async fn fill_and_link(&self, offset: u64, content: Content, run: Run) -> Result<()> {
        self.lengthen(run.end()).await?;
        let start = self.block_offset(run.start);
        let host = start.saturating_add(offset % self.block_size());
        let end = host.saturating_add(content.len());
        if run.fresh {
            if let Content::Data(_) = content {
                self.put(host, content).await?;
            }
        } else {
            let flags = ZeroFlags::MAY_UNMAP;
            let head = Content::Zeroes(host - start, flags);
            let tail = self.block_offset(run.end()).saturating_sub(end);
            let tail = Content::Zeroes(tail, flags);
            run_all([self.put(start, head), self.put(host, content), self.put(end, tail)]).await?;
        }
        point();
        let first = self.block_of(offset);
        for index in 0..run.count {
            self.link(first.saturating_add(index), run.start.saturating_add(index));
        }
        run.keep();
        Ok(())
    }

    /// Extends the file so that it contains all blocks before `end`. This function holds the `growing` lock while it
    /// changes the file size, so it never truncates a file that another task has just extended.
    async fn lengthen(&self, end: u32) -> Result<()> {
        let Parts { whole, growing, .. } = self.parts();
        if whole.load(Acquire) >= end {
            return Ok(());
        }
        let _lock = growing.lock().await;
        if whole.load(Acquire) >= end {
            return Ok(());
        }
        let (file, needed) = (self.file()?, self.block_offset(end));
        file_len::extend(&file, needed).await?;
        whole.fetch_max(end, AcqRel);
        Ok(())
    }
}
