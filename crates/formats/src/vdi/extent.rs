//! Translation of disk offsets to extents by the block map.
//!
//! [`Vdi::lookup`] answers from memory, without a lock; [`Vdi::extent`] first loads missing parts of the map.

use oxblk_core::ChildIdx;
use oxblk_core::{Error, Result, Status, StatusFlags, Want};
use oxblk_ring::IoBufMut;

use super::Vdi;
use super::entry::Entry;
use super::header::{BLOCK, ImageType};
use crate::blocks::{ENTRY_BYTES, Extent, extent};

/// Most blocks whose entries one lookup examines.
const MAX_RUN: u32 = 1 << 20;

/// The block of the disk that contains `offset`. The disk has less than 2^32 blocks.
pub(super) fn block_of(offset: u64) -> u32 {
    u32::try_from(offset / BLOCK).unwrap_or(u32::MAX)
}

impl Vdi {
    /// Looks up the extent at the start of `offset..offset + len` (`len` > 0) in memory; `None` if the map is not
    /// loaded there. Takes no lock.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Option<Extent> {
        let (first, within) = (block_of(offset), offset % BLOCK);
        let entry = self.entry(first)?;
        let mut covered = BLOCK - within;
        let mut blocks = 1_u32;
        while covered < len && blocks < MAX_RUN {
            let next = first.saturating_add(blocks);
            let step = match (entry, self.uniform(next)) {
                (Entry::Zero, Some((Entry::Zero, count))) => count.max(1),
                _ if self.continues(entry, blocks, next) => 1,
                _ => break,
            };
            blocks = blocks.saturating_add(step);
            covered = covered.saturating_add(u64::from(step).saturating_mul(BLOCK));
        }
        let len = covered.min(len);
        Some(match entry {
            Entry::Zero => Extent::Unallocated { len },
            Entry::At(block) => {
                Extent::Data { host: self.header.block_offset(block).saturating_add(within), len }
            }
        })
    }

    fn continues(&self, first: Entry, blocks: u32, next: u32) -> bool {
        match (first, self.entry(next)) {
            (Entry::Zero, Some(Entry::Zero)) => true,
            (Entry::At(block), Some(Entry::At(other))) => block.checked_add(blocks) == Some(other),
            _ => false,
        }
    }

    /// The extent at the start of `offset..offset + len`. Loads the map if necessary.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        if let Some(extent) = self.lookup(offset, len) {
            return Ok(extent);
        }
        self.load(block_of(offset)).await?;
        self.lookup(offset, len)
            .ok_or_else(|| Error::corrupt("the block map has no such entry").at(offset))
    }

    /// Loads the chunk of the map with the entry of `block`.
    pub(super) async fn load(&self, block: u32) -> Result<()> {
        if !self.map.is_loaded(block) {
            let bytes = self.read_map_chunk(block).await?;
            self.map.load(block, &bytes);
        }
        Ok(())
    }

    /// Reads the chunk of the map with the entry of `block` from the file.
    pub(super) async fn read_map_chunk(&self, block: u32) -> Result<IoBufMut> {
        let range = self.map.chunk_of(block);
        let entries = u64::from(range.end.saturating_sub(range.start));
        let len = usize::try_from(entries.saturating_mul(ENTRY_BYTES)).unwrap_or(0);
        let offset = self.entry_offset(range.start);
        let read = self.file()?.read(offset, IoBufMut::new(len)).await;
        read.map_err(|error| error.prefix("Could not read the block map"))
    }

    /// Byte offset of an entry in the file.
    pub(super) fn entry_offset(&self, index: u32) -> u64 {
        self.header.map_offset.saturating_add(u64::from(index).saturating_mul(ENTRY_BYTES))
    }

    /// The status of the start of `offset..offset + len`. An allocated block is data. For a static image, the file is
    /// queried too, because it knows which parts were never written.
    pub(super) async fn status(&self, offset: u64, len: u64, _want: Want) -> Result<Status> {
        let extent = async |at, len| self.extent(at, len).await;
        Ok(match extent::joined(offset, len, extent).await? {
            Extent::Unallocated { len } => Status::zero(len),
            Extent::Data { host, len } => {
                let mut status = Status::stored(len, ChildIdx::FILE, host);
                if self.header.image_type != ImageType::Static {
                    status.flags -= StatusFlags::RECURSE;
                }
                status
            }
        })
    }
}
