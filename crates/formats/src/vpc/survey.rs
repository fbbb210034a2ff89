//! The survey of an image: it checks all entries of the BAT, and collects the blocks in use and the faults.

use std::ops::{ControlFlow, Range};

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Vpc;
use super::entry::Entry;
use super::footer::SECTOR;
use crate::blocks::survey::each_entry;

/// The fault of an entry of the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// An earlier entry refers to the same block.
    Shared,
    /// The block starts inside another block.
    Overlapping,
    /// The block overlaps the footer at the beginning, the header or the BAT.
    OnMetadata,
    /// The block starts after the end of the file.
    Behind,
    /// The block starts inside the file and ends after the end of the file.
    CutOff,
}

/// Entries with the same value and the same fault: `count` entries from `index` on. All refer to `sector` of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) index: u32,
    pub(super) sector: u32,
    pub(super) count: u32,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { fault, index, sector, .. } = self;
        let what = match fault {
            Fault::Shared => "is also used by an earlier block",
            Fault::Overlapping => "overlaps another block",
            Fault::OnMetadata => "overlaps the metadata of the image",
            Fault::Behind => "lies behind the end of the file",
            Fault::CutOff => "ends behind the end of the file",
        };
        write!(f, "block {index} at sector {sector} {what}")
    }
}

/// The result of a survey.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// The sectors at which blocks start, without blocks that only faulty entries refer to. Blocks that are cut off are
    /// included.
    pub(super) starts: RoaringBitmap,
}

impl Vpc {
    /// Loads and checks the complete BAT, and reports faults in the order of the disk. The survey stops if `found`
    /// returns false.
    ///
    /// # Errors
    /// The errors of requests to the image file.
    pub(super) async fn survey(&self, mut found: impl FnMut(Finding) -> bool) -> Result<Survey> {
        let header = &self.metadata.header;
        let file_size = self.file()?.size();
        let place = |sector: u32| {
            let start = u64::from(sector) * SECTOR;
            (start, start.saturating_add(header.stride()))
        };
        let on_metadata = |sector| {
            let (start, end) = place(sector);
            header.overlaps(start, end)
        };
        let mut starts = RoaringBitmap::new();
        let collect = |_: Range<u32>, number| {
            if let Entry::At(sector) = Entry::from_number(number)
                && !on_metadata(sector)
                && place(sector).0 < file_size
            {
                starts.insert(sector);
            }
            ControlFlow::Continue(())
        };
        each_entry(&self.map, async |index| self.load(index).await, collect).await?;
        let overlapping = overlapping(&starts, header.stride() / SECTOR);
        let mut seen = RoaringBitmap::new();
        let examine = |indices: Range<u32>, number| {
            let Entry::At(sector) = Entry::from_number(number) else {
                return ControlFlow::Continue(());
            };
            let (index, count) = (indices.start, indices.end - indices.start);
            let (start, _) = place(sector);
            let before = u64::from(index).saturating_mul(header.block());
            let needed = header.block().min(self.size.saturating_sub(before));
            let fault = if on_metadata(sector) {
                Some(Fault::OnMetadata)
            } else if start >= file_size {
                Some(Fault::Behind)
            } else if overlapping.contains(sector) {
                Some(Fault::Overlapping)
            } else if !seen.insert(sector) {
                Some(Fault::Shared)
            } else {
                let end = self.data_offset(sector).saturating_add(needed);
                (end > file_size).then_some(Fault::CutOff)
            };
            match fault {
                Some(fault) if !found(Finding { fault, index, sector, count }) => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            }
        };
        each_entry(&self.map, async |index| self.load(index).await, examine).await?;
        Ok(Survey { starts: seen })
    }
}

/// Returns the starts of blocks that lie inside an earlier block. `stride` is the length of a block in sectors.
fn overlapping(starts: &RoaringBitmap, stride: u64) -> RoaringBitmap {
    let mut found = RoaringBitmap::new();
    let mut end = 0;
    for start in starts {
        if u64::from(start) < end {
            found.insert(start);
        } else {
            end = u64::from(start).saturating_add(stride);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_start_inside_an_earlier_block_overlap() {
        let starts: RoaringBitmap = [4, 8, 9, 13, 20].into_iter().collect();
        let found: Vec<u32> = overlapping(&starts, 5).into_iter().collect();
        assert_eq!(found, [8, 13]);
    }
}
