//! What the whole block map says: which blocks of the file are in use, and what is wrong.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Vdi;
use super::entry::Entry;

/// What is wrong with an entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// An entry before it names the same block.
    Shared,
    /// It names a block that the image cannot have.
    TooLarge,
    /// The block lies behind the end of the file, in part or as a whole.
    CutOff,
}

/// A faulty entry: the block of the disk, and the block of the file that its entry names. So are the entries that follow it, as
/// many as `count` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) index: u32,
    pub(super) block: u32,
    pub(super) count: u32,
}

/// What the map says.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Blocks of the file that entries name, but for those that are too large.
    pub(super) used: RoaringBitmap,
    /// Entries that name them.
    pub(super) mapped: u32,
}

impl Survey {
    /// The block behind the last one in use.
    pub(super) fn end(&self) -> u32 {
        self.used.max().map_or(0, |last| last.saturating_add(1))
    }
}

impl Vdi {
    /// Goes through the map, loading all of it, and reports what is wrong in the order of the disk. `found` says whether to go on.
    ///
    /// # Errors
    /// As the file reports.
    pub(super) async fn survey(&self, mut found: impl FnMut(Finding) -> bool) -> Result<Survey> {
        let whole = self.whole_blocks.load(Acquire);
        let mut survey = Survey::default();
        let mut start = 0;
        while start < self.map.len() {
            self.load(start).await?;
            let range = self.map.chunk_of(start);
            let mut index = range.start;
            start = range.end;
            while index < range.end {
                // The first entry of a chunk tells what the others are.
                let alike = match self.uniform(index) {
                    Some((entry, count)) if entry == Entry::Zero || index > range.start => count,
                    _ => 1,
                };
                let entry = self.entry(index);
                let first = index;
                index = index.saturating_add(alike.max(1));
                let Some(Entry::At(block)) = entry else { continue };
                let fault = if block >= self.map.len() {
                    Some(Fault::TooLarge)
                } else {
                    survey.mapped = survey.mapped.saturating_add(alike);
                    match survey.used.insert(block) {
                        false => Some(Fault::Shared),
                        true => (block >= whole).then_some(Fault::CutOff),
                    }
                };
                if fault.is_some_and(|fault| {
                    !found(Finding { fault, index: first, block, count: alike })
                }) {
                    return Ok(survey);
                }
            }
        }
        Ok(survey)
    }
}
