//! The survey: checks all entries of the block map, and collects the blocks in use and the faults.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Vdi;
use super::entry::Entry;

/// The fault of an entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// An earlier entry names the same block.
    Shared,
    /// The entry names a block that the image cannot have.
    TooLarge,
    /// The block lies behind the end of the file, completely or in part.
    CutOff,
}

/// A faulty entry: the index of the block in the disk, and the block of the file that the entry names. `count` entries
/// from `index` on have the same fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) index: u32,
    pub(super) block: u32,
    pub(super) count: u32,
}

/// The result of a survey.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Blocks of the file that entries name, without those that are too large.
    pub(super) used: RoaringBitmap,
    /// Number of entries that name these blocks.
    pub(super) mapped: u32,
}

impl Survey {
    /// The block after the last one in use.
    pub(super) fn end(&self) -> u32 {
        self.used.max().map_or(0, |last| last.saturating_add(1))
    }
}

impl Vdi {
    /// Loads and checks the complete map, and reports faults in the order of the disk. The survey stops if `found`
    /// returns false.
    ///
    /// # Errors
    /// The errors of the file.
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
                // In a chunk of equal entries, the first entry is handled alone, and the others together.
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
