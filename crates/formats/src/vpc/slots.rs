//! The places of new blocks in the file.
//!
//! The blocks of most images lie in a row, each directly after the previous block. The places in this row are called slots.
//! The allocator allocates slots. So it can also allocate a slot that a crash has left unused. If the distances between the
//! blocks of an image are not multiples of the length of a block, the row of slots begins after the last block.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{ChildIdx, Edge};
use roaring::RoaringBitmap;

use super::Vpc;
use super::entry::Entry;
use super::footer::SECTOR;
use super::metadata::{Copy, last_sector};
use super::survey::Survey;

/// The row of slots of an image.
#[derive(Debug)]
pub(super) struct Row {
    /// Byte offset of slot 0.
    pub(super) first: u64,
    /// The slots in use.
    pub(super) used: RoaringBitmap,
    /// All blocks of the image are in slots.
    pub(super) is_complete: bool,
}

impl Vpc {
    /// Computes the row of slots from the blocks in use.
    pub(super) fn row(&self, survey: &Survey, file_size: u64) -> Row {
        let header = &self.metadata.header;
        let stride = u32::try_from(header.stride() / SECTOR).unwrap_or(u32::MAX).max(1);
        let (Some(first), Some(last)) = (survey.starts.min(), survey.starts.max()) else {
            let mut first = header.metadata_end();
            if self.metadata.footer.is_by_xen() && self.metadata.at_end == Copy::Good {
                // XenServer has further metadata between the BAT and the footer.
                first = first.max(last_sector(file_size));
            }
            return Row { first, used: RoaringBitmap::new(), is_complete: true };
        };
        let mut used = RoaringBitmap::new();
        for start in &survey.starts {
            let distance = start.saturating_sub(first);
            if !distance.is_multiple_of(stride) {
                let end = (u64::from(last) * SECTOR).saturating_add(header.stride());
                let first = end.max(header.metadata_end());
                return Row { first, used: RoaringBitmap::new(), is_complete: false };
            }
            used.insert(distance / stride);
        }
        Row { first: u64::from(first) * SECTOR, used, is_complete: true }
    }

    /// Byte offset of a slot; also the end of the previous slot.
    pub(super) fn slot_offset(&self, slot: u32) -> u64 {
        let ahead = u64::from(slot).saturating_mul(self.metadata.header.stride());
        self.first_slot.load(Acquire).saturating_add(ahead)
    }

    /// The entry of a block in this slot. `None` if an entry cannot contain the sector number of the slot.
    pub(super) fn slot_entry(&self, slot: u32) -> Option<Entry> {
        let sector = u32::try_from(self.slot_offset(slot) / SECTOR).ok()?;
        (sector != u32::MAX).then_some(Entry::At(sector))
    }

    /// The slot that starts at this sector, if a slot starts there.
    pub(super) fn slot_at(&self, sector: u32) -> Option<u32> {
        let first = self.first_slot.load(Acquire);
        let distance = (u64::from(sector) * SECTOR).checked_sub(first)?;
        let stride = self.metadata.header.stride();
        u32::try_from(distance / stride).ok().filter(|_| distance.is_multiple_of(stride))
    }

    /// Tells the allocator which slots are in use, so that slots can be allocated.
    pub(super) fn allow_allocations(&self, file: &Edge, survey: &Survey) {
        let row = self.row(survey, file.size());
        self.first_slot.store(row.first, Release);
        self.file_len.store(file.size(), Release);
        self.full.clear();
        let last = last_sector(file.size());
        let is_at_end = match self.end.footer() {
            0 => self.metadata.at_end == Copy::Good,
            known => known == last,
        };
        let unused_from = if is_at_end { last } else { file.size() };
        self.end.begin(is_at_end.then_some(last));
        if !is_at_end && self.metadata.at_end != Copy::Different {
            self.end.touch();
        }
        self.allocator.set_used(&row.used, self.fresh_from(file, unused_from), 0);
    }

    /// The first slot that lies completely behind `end`, the end of the blocks in the file. `None` if the file cannot grow.
    fn fresh_from(&self, file: &Edge, end: u64) -> Option<u32> {
        let behind = end.saturating_sub(self.first_slot.load(Acquire));
        let fresh = behind.div_ceil(self.metadata.header.stride());
        file.node().limits().grows.then(|| u32::try_from(fresh).unwrap_or(u32::MAX))
    }

    /// Stores the size of the file, and whether the file can grow. No request is in flight.
    pub(super) fn file_changed(&self) {
        if let Some(file) = self.children.get(ChildIdx::FILE) {
            let last = last_sector(file.size());
            let end = if self.end.footer() == last { last } else { file.size() };
            self.allocator.set_fresh(self.fresh_from(&file, end));
            self.file_len.store(file.size(), Release);
        }
    }
}
