//! The survey of an image: it checks all entries of the block map, and collects the blocks in use and the faults.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::Acquire;

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Vdi;
use super::entry::Entry;
use crate::blocks::BlockImage;
use crate::blocks::survey::{each_entry, end_of};

/// The fault of an entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// An earlier entry refers to the same block.
    Shared,
    /// The block number in the entry is not lower than the number of blocks of the disk.
    TooLarge,
    /// The block lies after the end of the file, completely or in part.
    CutOff,
}

/// Entries with the same value and the same fault: `count` entries from `index` on. All refer to `block` of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) index: u32,
    pub(super) block: u32,
    pub(super) count: u32,
}

/// The result of a survey.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Blocks of the file to which entries refer, without block numbers that are too large.
    pub(super) used: RoaringBitmap,
    /// Number of entries that refer to the blocks in `used`.
    pub(super) mapped: u32,
}

impl Survey {
    /// The block after the last block in use.
    pub(super) fn end(&self) -> u32 {
        end_of(&self.used)
    }
}

impl Vdi {
    /// Loads and checks the complete map, and reports faults in the order of the block map. The survey stops if `found`
    /// returns false.
    ///
    /// # Errors
    /// The errors of requests to the image file.
    pub(super) async fn survey(&self, mut found: impl FnMut(Finding) -> bool) -> Result<Survey> {
        let whole = self.whole_blocks.load(Acquire);
        let mut survey = Survey::default();
        let examine = |indices: Range<u32>, number| {
            let Entry::At(block) = Entry::from_number(number) else {
                return ControlFlow::Continue(());
            };
            let (index, count) = (indices.start, indices.end - indices.start);
            let fault = if block >= self.map.len() {
                Some(Fault::TooLarge)
            } else {
                survey.mapped = survey.mapped.saturating_add(count);
                match survey.used.insert(block) {
                    false => Some(Fault::Shared),
                    true => (block >= whole).then_some(Fault::CutOff),
                }
            };
            match fault {
                Some(fault) if !found(Finding { fault, index, block, count }) => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            }
        };
        each_entry(&self.map, async |index| self.load(index).await, examine).await?;
        Ok(survey)
    }
}
