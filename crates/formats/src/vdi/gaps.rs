//! Closing gaps among the blocks of the file: the last blocks are moved into them, so that all blocks that the header
//! counts are in use again.
//!
//! No request uses the image meanwhile. The copy of a block is durable before the entry names it. The original stays in
//! place until the header no longer counts it.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use oxblk_core::{Preallocation, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vdi;
use super::entry::Entry;
use super::header::BLOCK;

/// Most blocks that are moved when an image is closed.
const MOST_AT_CLOSE: u64 = 64;

impl Vdi {
    /// Writes all metadata to the image and closes gaps, so that no block leaks.
    pub(super) async fn complete(&self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        if !self.surveyed.load(Acquire) {
            return Ok(());
        }
        if let Err(error) = self.fill_gaps(MOST_AT_CLOSE).await {
            self.surveyed.store(false, Release);
            tracing::warn!("vdi: unused blocks stay in the image: {error}");
            return Ok(());
        }
        self.settle_count().await?;
        self.trim().await
    }

    /// Moves the last blocks into all gaps, if there are at most `most` gaps.
    ///
    /// # Errors
    /// The errors of the file. The image is valid even then, but the allocator no longer knows the blocks in use.
    pub(super) async fn fill_gaps(&self, most: u64) -> Result<()> {
        let gaps = self.allocator.gaps();
        if gaps.is_empty() || gaps.len() > most {
            return Ok(());
        }
        let end = self.allocator.end();
        let keep = end.saturating_sub(u32::try_from(gaps.len()).unwrap_or(u32::MAX));
        let mut targets = gaps.iter().take_while(|gap| *gap < keep);
        let mut moved = Vec::new();
        for index in 0..self.map.len() {
            let Some(Entry::At(block)) = self.entry(index) else { continue };
            if !(keep..end).contains(&block) {
                continue;
            }
            let Some(target) = targets.next() else { break };
            let data = self.read_block(self.header.block_offset(block)).await?;
            self.write_block(target, data).await?;
            moved.push((index, target));
        }
        self.link_copies(&moved).await?;
        self.allocator.close_gaps();
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

    /// Sets the entries of copied blocks: pairs of an index in the disk and a block of the file. Durable when this
    /// returns.
    pub(super) async fn link_copies(&self, copies: &[(u32, u32)]) -> Result<()> {
        for (index, block) in copies {
            self.set_entry(*index, Entry::At(*block));
        }
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
