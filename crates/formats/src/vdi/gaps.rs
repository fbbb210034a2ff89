//! Closing gaps among the blocks of the file: the last blocks are moved into them, so that all blocks that the header
//! counts are in use again.
//!
//! No request uses the image meanwhile. The copy of a block is durable before the entry names it. The original stays in
//! place until the header no longer counts it.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::AcqRel;

use oxblk_core::{Preallocation, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vdi;
use super::entry::Entry;
use super::header::BLOCK;
use crate::blocks::BlockImage;
use crate::blocks::Run;
use crate::blocks::survey::each_entry;

/// Most blocks that are moved when an image is closed.
const MOST_AT_CLOSE: u64 = 64;

impl Vdi {
    /// Writes all metadata to the image and closes gaps, so that no block leaks. No request is in flight.
    pub(super) async fn complete_image(&self) -> Result<()> {
        if self.access.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        if !self.allocator.is_known() {
            return Ok(());
        }
        if let Err(error) = self.fill_gaps(MOST_AT_CLOSE).await {
            tracing::warn!("vdi: unused blocks stay in the image: {error}");
            // Entries of blocks that were moved may have changed in memory.
            return self.write_back().await;
        }
        self.settle_count().await?;
        self.trim().await
    }

    /// Moves the last blocks into all gaps, if there are at most `most` gaps. No request is in flight.
    ///
    /// # Errors
    /// The errors of the file. The image is valid even then.
    pub(super) async fn fill_gaps(&self, most: u64) -> Result<()> {
        self.allocator.end_quarantine();
        let gaps = self.allocator.gaps();
        if gaps.is_empty() || gaps.len() > most {
            return Ok(());
        }
        let end = self.allocator.end();
        let keep = end.saturating_sub(u32::try_from(gaps.len()).unwrap_or(u32::MAX));
        let mut last_blocks = Vec::new();
        let loaded = async |_| Ok(());
        let collect = |indices: Range<u32>, number| {
            if let Entry::At(block) = Entry::from_number(number)
                && (keep..end).contains(&block)
            {
                last_blocks.push((indices.start, block));
            }
            ControlFlow::Continue(())
        };
        each_entry(&self.map, loaded, collect).await?;
        let (mut copies, mut originals) = (Vec::new(), Vec::new());
        for (index, block) in last_blocks {
            // The lowest gap.
            let run = self.allocator.reserve(1).await?;
            if run.start >= keep {
                break;
            }
            let data = self.read_block(self.header.block_offset(block)).await?;
            self.write_block(run.start, data).await?;
            copies.push((index, run));
            originals.push(block);
        }
        self.link_copies(copies, originals).await?;
        self.allocator.end_quarantine();
        Ok(())
    }

    /// Reads a block at an offset of the file. Behind the end of the file it reads zeroes.
    pub(super) async fn read_block(&self, from: u64) -> Result<IoBuf> {
        let buf = IoBufMut::new(usize::try_from(BLOCK).unwrap_or(0));
        Ok(self.file()?.read(from, buf).await?.freeze())
    }

    /// Writes a block of the file that is not in use.
    pub(super) async fn write_block(&self, to: u32, data: IoBuf) -> Result<()> {
        self.lengthen(to.saturating_add(1)).await?;
        self.file()?.write(self.header.block_offset(to), data, WriteFlags::empty()).await
    }

    /// Sets the entries of copied blocks: pairs of an index in the disk and a block of the file. Frees `originals`, which
    /// no entry names after that. Durable when this returns. After an error, the entries in memory name the copies even
    /// so, and a later write-back frees the originals.
    pub(super) async fn link_copies(
        &self,
        copies: Vec<(u32, Run)>,
        originals: Vec<u32>,
    ) -> Result<()> {
        for (index, run) in copies {
            self.set_entry(index, Entry::At(run.start));
            run.keep();
        }
        self.freed.add(originals);
        self.write_back().await
    }

    /// Truncates the file after its last block in use, if the space behind consists of blocks that are known to be
    /// free. The header no longer counts these blocks, durably.
    pub(super) async fn trim(&self) -> Result<()> {
        let file = self.file()?;
        let (end, most) = (self.allocator.end(), self.allocator.most());
        let (end_offset, size) = (self.header.block_offset(end), file.size());
        if size <= end_offset || size > self.header.block_offset(most) {
            return Ok(());
        }
        if !file.node().limits().grows {
            // A device has a fixed length.
            return Ok(());
        }
        self.whole_blocks.fetch_min(end, AcqRel);
        file.resize(end_offset, Preallocation::Off).await?;
        self.allocator.note_cut_off();
        Ok(())
    }
}
