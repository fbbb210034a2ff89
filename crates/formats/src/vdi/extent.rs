//! Mapping of disk offsets to extents with the block map.
//!
//! [`BlockImage::lookup`] uses only the map in memory and takes no lock. [`BlockImage::extent`] loads missing parts of the map
//! first.

use std::sync::Arc;

use oxblk_core::{ChildIdx, Edge, Result, Status, StatusFlags, Want};

use super::Vdi;
use super::entry::Entry;
use super::header::{BLOCK, ImageType};
use crate::blocks::{BlockImage, ENTRY_BYTES, Extent, Parts, extent};

/// A lookup ends when it has covered this many blocks.
const MAX_RUN: u32 = 1 << 20;

impl BlockImage for Vdi {
    const MAP_NAME: &'static str = "block map";

    fn parts(&self) -> Parts<'_> {
        Parts {
            map: &self.map,
            allocator: &self.allocator,
            whole: &self.whole_blocks,
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
        BLOCK
    }

    fn block_offset(&self, block: u32) -> u64 {
        self.header.block_offset(block)
    }

    fn entry_offset(&self, index: u32) -> u64 {
        self.header.map_offset.saturating_add(u64::from(index).saturating_mul(ENTRY_BYTES))
    }

    fn lookup(&self, offset: u64, len: u64) -> Option<Extent> {
        let (first, within) = (self.block_of(offset), offset % BLOCK);
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

    fn link(&self, index: u32, block: u32) {
        self.set_entry(index, Entry::At(block));
    }
}

impl Vdi {
    fn continues(&self, first: Entry, blocks: u32, next: u32) -> bool {
        match (first, self.entry(next)) {
            (Entry::Zero, Some(Entry::Zero)) => true,
            (Entry::At(block), Some(Entry::At(other))) => block.checked_add(blocks) == Some(other),
            _ => false,
        }
    }

    /// The block status at `offset`, for at most `len` bytes. Allocated blocks are reported as data. For a static image,
    /// `RECURSE` stays set: the caller also queries the file, because the file system knows which parts were never written.
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
