//! Mapping of disk offsets to extents with the BAT.
//!
//! [`Vpc::lookup`] uses only the BAT in memory and takes no lock. [`Vpc::extent`] loads missing parts of the BAT first.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{ChildIdx, Error, Result, Status, StatusFlags};
use oxblk_ring::IoBufMut;

use super::Vpc;
use super::entry::Entry;
use super::footer::SECTOR;
use crate::blocks::{ENTRY_BYTES, Extent, extent};

/// A lookup ends when it has covered this many blocks.
const MAX_RUN: u32 = 1 << 20;

impl Vpc {
    /// The block of the disk that contains `offset`. The disk has fewer than 2^32 blocks.
    pub(super) fn block_of(&self, offset: u64) -> u32 {
        u32::try_from(offset / self.metadata.header.block()).unwrap_or(u32::MAX)
    }

    /// Byte offset of the data of a block that starts at this sector of the file.
    pub(super) fn data_offset(&self, sector: u32) -> u64 {
        u64::from(sector) * SECTOR + self.metadata.header.bitmap()
    }

    /// Looks up the extent at the start of `offset..offset + len` (`len` > 0) in memory. Returns `None` if the BAT has no
    /// loaded entry for `offset`. Takes no lock. An extent of data lies in one block, because sector bitmaps separate the
    /// data of adjacent blocks.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Option<Extent> {
        let block = self.metadata.header.block();
        let (first, within) = (self.block_of(offset), offset % block);
        let mut covered = block - within;
        if let Entry::At(sector) = self.entry(first)? {
            let host = self.data_offset(sector).saturating_add(within);
            return Some(Extent::Data { host, len: covered.min(len) });
        }
        let mut blocks = 1_u32;
        while covered < len && blocks < MAX_RUN {
            let next = first.saturating_add(blocks);
            let step = match self.map.uniform(next) {
                Some((number, count)) if Entry::from_number(number) == Entry::Zero => count.max(1),
                None if self.entry(next) == Some(Entry::Zero) => 1,
                _ => break,
            };
            blocks = blocks.saturating_add(step);
            covered = covered.saturating_add(u64::from(step).saturating_mul(block));
        }
        Some(Extent::Unallocated { len: covered.min(len) })
    }

    /// Whether the file is known to contain this extent of data.
    pub(super) fn is_inside(&self, host: u64, len: u64) -> bool {
        host.saturating_add(len) <= self.file_len.load(Acquire)
    }

    /// The extent at the start of `offset..offset + len`. Loads the chunk of the BAT if it is not loaded.
    ///
    /// # Errors
    /// `Corrupt` if the extent does not lie completely inside the file, and the errors of requests to the image file.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let extent = match self.lookup(offset, len) {
            Some(extent) => extent,
            None => {
                self.load(self.block_of(offset)).await?;
                let extent = self.lookup(offset, len);
                extent.ok_or_else(|| Error::corrupt("the BAT has no such entry").at(offset))?
            }
        };
        if let Extent::Data { host, len } = extent
            && !self.is_inside(host, len)
        {
            let block = self.block_of(offset);
            let text = format!("Image is corrupt: block {block} lies behind the end of the file");
            return Err(Error::corrupt(text).at(offset));
        }
        Ok(extent)
    }

    /// Loads the chunk of the BAT with the entry of `block`.
    pub(super) async fn load(&self, block: u32) -> Result<()> {
        if !self.map.is_loaded(block) {
            let bytes = self.read_bat_chunk(block).await?;
            self.map.load(block, &bytes);
        }
        Ok(())
    }

    /// Reads the chunk of the BAT with the entry of `block` from the file.
    pub(super) async fn read_bat_chunk(&self, block: u32) -> Result<IoBufMut> {
        let range = self.map.chunk_of(block);
        let entries = u64::from(range.end.saturating_sub(range.start));
        let len = usize::try_from(entries.saturating_mul(ENTRY_BYTES)).unwrap_or(0);
        let offset = self.entry_offset(range.start);
        let read = self.file()?.read(offset, IoBufMut::new(len)).await;
        read.map_err(|error| error.prefix("Could not read the BAT"))
    }

    /// Byte offset of an entry in the file.
    pub(super) fn entry_offset(&self, index: u32) -> u64 {
        let table = self.metadata.header.table_offset();
        table.saturating_add(u64::from(index).saturating_mul(ENTRY_BYTES))
    }

    /// The block status at `offset`, for at most `len` bytes. Allocated blocks are reported as data.
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Status> {
        let extent = async |at, len| self.extent(at, len).await;
        Ok(match extent::joined(offset, len, extent).await? {
            Extent::Unallocated { len } => Status::zero(len),
            Extent::Data { host, len } => {
                let mut status = Status::stored(len, ChildIdx::FILE, host);
                status.flags -= StatusFlags::RECURSE;
                status
            }
        })
    }
}
