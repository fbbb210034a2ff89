//! Filling gaps (unused blocks) of the file: the last blocks are moved into the gaps, and the number of allocated blocks in
//! the header is lowered. If all gaps are filled, the image has no leaks.
//!
//! No request is in flight. The copy of a block is flushed before an entry refers to it. The original is not overwritten before
//! the changed entry has been flushed.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::AcqRel;

use oxblk_core::{Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vdi;
use super::entry::Entry;
use super::header::BLOCK;
use crate::blocks::BlockImage;
use crate::blocks::Run;
use crate::blocks::survey::each_entry;
use crate::file_len;

/// If an image has more gaps than this, no gap is filled when the image is closed.
const MAX_AT_CLOSE: u64 = 64;

impl Vdi {
    /// Writes all metadata to the image, fills a small number of gaps, and truncates the file. Does nothing if the image is
    /// read-only. No request is in flight.
    pub(super) async fn complete_image(&self) -> Result<()> {
        if self.access.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        if !self.allocator.is_known() {
            return Ok(());
        }
        if let Err(error) = self.fill_gaps(MAX_AT_CLOSE).await {
            tracing::warn!("vdi: unused blocks stay in the image: {error}");
            // Some entries of moved blocks may have changed in memory only.
            return self.write_back().await;
        }
        self.write_block_count().await?;
        self.trim().await
    }

    /// If there are at most `max_gaps` gaps, moves the last blocks into the gaps. No request is in flight.
    ///
    /// # Errors
    /// The errors of requests to the image file. The image is consistent after an error too.
    pub(super) async fn fill_gaps(&self, max_gaps: u64) -> Result<()> {
        self.allocator.end_quarantine();
        let gaps = self.allocator.gaps();
        if gaps.is_empty() || gaps.len() > max_gaps {
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
            // The allocator returns the lowest gap.
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

    /// Reads the block at offset `from` of the file. Bytes after the end of the file are zeroes.
    pub(super) async fn read_block(&self, from: u64) -> Result<IoBuf> {
        let buf = IoBufMut::new(usize::try_from(BLOCK).unwrap_or(0));
        Ok(self.file()?.read(from, buf).await?.freeze())
    }

    /// Writes a block of the file that is not in use.
    pub(super) async fn write_block(&self, to: u32, data: IoBuf) -> Result<()> {
        self.lengthen(to.saturating_add(1)).await?;
        self.file()?.write(self.header.block_offset(to), data, WriteFlags::empty()).await
    }

    /// Sets the entries of copied blocks, frees `originals`, and writes the entries back with a flush. Each element of
    /// `copies` is the index of a block of the disk and its new block of the file. After this call, no entry refers to the
    /// originals. After an error, the entries in memory still refer to the copies, and a later write-back frees the
    /// originals.
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

    /// Truncates the file after its last block in use. If the file contains bytes after the blocks that this driver has
    /// allocated, the file is not truncated, because the use of these bytes is unknown. The caller has lowered the number
    /// of allocated blocks in the header and flushed.
    pub(super) async fn trim(&self) -> Result<()> {
        let file = self.file()?;
        let (end, max_end) = (self.allocator.end(), self.allocator.max_end());
        let (end_offset, size) = (self.header.block_offset(end), file.size());
        if size <= end_offset || size > self.header.block_offset(max_end) {
            return Ok(());
        }
        if !file.node().limits().grows {
            // A device has a fixed length.
            return Ok(());
        }
        self.whole_blocks.fetch_min(end, AcqRel);
        if file_len::truncate(&file, end_offset).await? {
            self.allocator.note_truncated();
        }
        Ok(())
    }
}
