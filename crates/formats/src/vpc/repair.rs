//! Repair of an image. No request is in flight.
//!
//! A repair loses no readable data:
//!
//! - If an earlier entry uses the same block, or if the block overlaps another block or metadata, the entry gets its own
//!   copy of the data. If the data consists of zeroes, the entry is set to unallocated instead. The copies are written
//!   after the old end of the file.
//! - If the block of an entry starts after the end of the file, the entry is set to unallocated. A file that ends inside a
//!   block is extended.
//! - The last blocks are moved into gaps, and the file is truncated after its last block and the footer.
//! - A damaged footer is replaced with a copy of the other footer, and a correct checksum is written to the header. At any
//!   time, one of the two footers is valid.
//!
//! Leaks are freed only if the image has no other fault, or all other faults have been repaired.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::Release;

use oxblk_core::check::{self, FindingKind};
use oxblk_core::{Result, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Vpc;
use super::check::Findings;
use super::entry::Entry;
use super::metadata::Copy;
use super::survey::{Fault, Finding};
use crate::blocks::survey::each_entry;
use crate::blocks::{Run, length};

/// Data is copied in steps of this size in bytes.
const STEP: u64 = 1 << 20;

impl Vpc {
    /// Repairs all faults. Returns false and repairs nothing if the blocks of too many entries must be copied or removed.
    pub(super) async fn repair(
        &self,
        findings: &Findings,
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<bool> {
        let Findings { survey, misplaced, misplaced_count, metadata, .. } = findings;
        let file = self.file()?;
        if *misplaced_count > self.max_copies(file.size()) {
            let text = format!(
                "Not repaired: {misplaced_count} entries need blocks of their own, which are more than the file has"
            );
            report_finding(check::Finding::new(FindingKind::Failure, text));
            return Ok(false);
        }
        let row = self.row(survey, file.size());
        self.first_slot.store(row.first, Release);
        // The file may end inside a block that is in use, so the position of the footer is unknown.
        self.end.begin(None);
        let mut used = row.used.clone();
        if !misplaced.is_empty() {
            let behind = file.size().saturating_sub(row.first);
            let slots = behind.div_ceil(self.metadata.header.stride());
            used.insert_range(0..u32::try_from(slots).unwrap_or(u32::MAX));
        }
        let repair = self.allocator.begin_repair(&used, 0);
        self.repair_start(metadata).await?;
        self.place_anew(misplaced, report_finding).await?;
        if !misplaced.is_empty() {
            // With the copies, the row of slots may begin at another offset.
            let survey = self.survey(|_| true).await?;
            let row = self.row(&survey, file.size());
            self.first_slot.store(row.first, Release);
            self.end.begin(None);
            self.allocator.begin_repair(&row.used, 0).done();
        }
        self.fill_gaps().await?;
        self.write_footer_at_end().await?;
        repair.done();
        Ok(true)
    }

    /// Writes the copy of the footer at the beginning if it is not good, and the header if its checksum is wrong.
    async fn repair_start(&self, metadata: &super::Metadata) -> Result<()> {
        let file = self.file()?;
        if metadata.at_start != Copy::Good {
            let bytes = IoBuf::from(metadata.footer.encode());
            file.write(0, bytes, WriteFlags::empty()).await?;
            file.flush().await?;
        }
        if !metadata.header.has_correct_checksum() {
            let bytes = IoBuf::from(metadata.header.encode());
            file.write(metadata.header.offset, bytes, WriteFlags::empty()).await?;
            file.flush().await?;
        }
        Ok(())
    }

    async fn place_anew(
        &self,
        misplaced: &[Finding],
        report_finding: &dyn Fn(check::Finding),
    ) -> Result<()> {
        let mut copies = Vec::new();
        for finding in misplaced {
            let text = format!("Repairing block {}", finding.index);
            report_finding(check::Finding::new(FindingKind::Repair, text));
            let copy = match finding.fault {
                Fault::Behind => None,
                _ => self.copy_block(self.data_offset(finding.sector)).await?,
            };
            match copy {
                Some(run) => copies.push((finding.index, run)),
                None => self.set_entry(finding.index, Entry::Zero),
            }
        }
        self.link_copies(copies, Vec::new()).await
    }

    /// Moves the last blocks of the row into the gaps.
    async fn fill_gaps(&self) -> Result<()> {
        self.allocator.end_quarantine();
        let gaps = self.allocator.gaps();
        if gaps.is_empty() {
            return Ok(());
        }
        let end = self.allocator.end();
        let keep = end.saturating_sub(u32::try_from(gaps.len()).unwrap_or(u32::MAX));
        let mut last_blocks = Vec::new();
        let loaded = async |_| Ok(());
        let collect = |indices: Range<u32>, number| {
            if let Entry::At(sector) = Entry::from_number(number)
                && let Some(slot) = self.slot_at(sector)
                && (keep..end).contains(&slot)
            {
                last_blocks.push((indices.start, sector, slot));
            }
            ControlFlow::Continue(())
        };
        each_entry(&self.map, loaded, collect).await?;
        let (mut copies, mut originals) = (Vec::new(), Vec::new());
        for (index, sector, slot) in last_blocks {
            match self.copy_block(self.data_offset(sector)).await? {
                // The copy is in the lowest gap.
                Some(run) if run.start < keep => copies.push((index, run)),
                Some(_) => break,
                None => self.set_entry(index, Entry::Zero),
            }
            originals.push(slot);
        }
        self.link_copies(copies, originals).await?;
        self.allocator.end_quarantine();
        Ok(())
    }

    /// Copies the data of a block to a free slot. The data starts at the byte offset `from`. Returns `None` if the data
    /// consists of zeroes. Bytes after the end of the file are zeroes.
    async fn copy_block(&self, from: u64) -> Result<Option<Run>> {
        let file = self.file()?;
        let len = self.metadata.header.block().min(file.size().saturating_sub(from));
        let mut copy: Option<Run> = None;
        let mut at = 0;
        while at < len {
            let step = usize::try_from(STEP.min(len - at)).unwrap_or(0);
            let bytes = file.read(from.saturating_add(at), IoBufMut::new(step)).await?.freeze();
            let read = length(&bytes);
            if !oxblk_ring::is_zero(&bytes) {
                let slot = match &copy {
                    Some(run) => run.start,
                    None => copy.insert(self.new_block().await?).start,
                };
                let to = self.slot_offset(slot).saturating_add(self.metadata.header.bitmap());
                file.write(to.saturating_add(at), bytes, WriteFlags::empty()).await?;
            }
            at = at.saturating_add(read.max(1));
        }
        Ok(copy)
    }

    /// Reserves a slot, and writes a block of zeroes to it.
    async fn new_block(&self) -> Result<Run> {
        let run = self.allocator.reserve(1).await?;
        if self.slot_entry(run.start).is_none() {
            return Err(oxblk_core::Error::from_errno(oxblk_core::Errno::NOSPC));
        }
        self.lengthen(run.end()).await?;
        let start = self.slot_offset(run.start);
        self.write_new_bitmap(start).await?;
        let (data, len) =
            (start.saturating_add(self.metadata.header.bitmap()), self.metadata.header.block());
        self.file()?.write_zeroes(data, len, ZeroFlags::MAY_UNMAP).await?;
        Ok(run)
    }

    /// Sets the entries of copied blocks, frees the slots in `originals`, and writes the entries back with a flush. After
    /// this call, no entry refers to the originals. After an error, the entries in memory still refer to the copies, and a
    /// later write-back frees the originals.
    async fn link_copies(&self, copies: Vec<(u32, Run)>, originals: Vec<u32>) -> Result<()> {
        for (index, run) in copies {
            // The slot has an entry: `new_block` has checked it.
            if let Some(entry) = self.slot_entry(run.start) {
                self.set_entry(index, entry);
                run.keep();
            }
        }
        self.freed.add(originals);
        self.write_back().await
    }
}
