//! The order in which the header and the block map reach the disk.
//!
//! A write-back goes through
//!
//! 1. *copy*: the sectors of the map that changed, as they are now. All data that they name has been written;
//! 2. *count*: the header counts as many blocks as the copies name, or more;
//! 3. *flush*: data and count are durable;
//! 4. *entries*: the copies are written;
//! 5. *flush*.
//!
//! An entry that is set later than its sector was copied is written by the next one.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::header::{ALLOCATED_OFFSET, ENTRY_BYTES, SECTOR};
use super::{Vdi, lock};

/// Entries in a sector of the map.
const PER_SECTOR: u32 = 128;
/// Most sectors that are written at once.
const MAX_SECTORS: u32 = 512;
/// Stands for a count that is not known: more than a count can be.
const NOT_KNOWN: u64 = u64::MAX;

/// Sectors that are being written; those of a write-back that fails or is cancelled are dirty again.
struct Cycle<'a> {
    image: &'a Vdi,
    sectors: BTreeSet<u32>,
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        if !self.sectors.is_empty() {
            lock(&self.image.dirty).append(&mut self.sectors);
        }
    }
}

/// Runs of sectors: the first, and how many.
fn runs(sectors: &BTreeSet<u32>) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for sector in sectors {
        match runs.last_mut() {
            Some((first, count))
                if first.saturating_add(*count) == *sector && *count < MAX_SECTORS =>
            {
                *count = count.saturating_add(1);
            }
            _ => runs.push((*sector, 1)),
        }
    }
    runs
}

impl Vdi {
    /// Notes that entries of the map have changed. They are set already.
    pub(super) fn mark_dirty(&self, first: u32, count: u32) {
        let last = first.saturating_add(count).saturating_sub(1);
        lock(&self.dirty).extend(first / PER_SECTOR..=last / PER_SECTOR);
    }

    /// Makes everything durable that had completed before the call.
    pub(super) async fn write_back(&self) -> Result<()> {
        let _turn = self.writing_back.lock().await;
        let file = self.file()?;
        let sectors = std::mem::take(&mut *lock(&self.dirty));
        let mut cycle = Cycle { image: self, sectors };
        if cycle.sectors.is_empty() {
            return file.flush().await;
        }
        point();
        let copies = self.copy(&cycle.sectors);
        point();
        let end = self.allocator.end();
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, copies, end).await;
        writing.done();
        outcome?;
        cycle.sectors.clear();
        Ok(())
    }

    /// The entries of sectors, with the places in the file where they belong.
    fn copy(&self, sectors: &BTreeSet<u32>) -> Vec<(u64, IoBuf)> {
        let copy = |(sector, count): (u32, u32)| {
            let first = sector.saturating_mul(PER_SECTOR);
            let end = first.saturating_add(count.saturating_mul(PER_SECTOR));
            let bytes = self.map.encode(first..end.min(self.map.len()));
            (self.entry_offset(first), IoBuf::from(bytes))
        };
        runs(sectors).into_iter().map(copy).collect()
    }

    async fn write_ordered(&self, file: &Edge, copies: Vec<(u64, IoBuf)>, end: u32) -> Result<()> {
        if self.count_on_disk().is_none_or(|count| count < end) {
            self.write_count(file, end).await?;
        }
        file.flush().await?;
        let write = |(offset, bytes)| file.write(offset, bytes, WriteFlags::empty());
        run_all(copies.into_iter().map(write)).await?;
        file.flush().await
    }

    /// Has the header count `count` blocks.
    async fn write_count(&self, file: &Edge, count: u32) -> Result<()> {
        let bytes = IoBuf::from(count.to_le_bytes().to_vec());
        // A write that fails may have been carried out all the same.
        self.allocated_on_disk.store(NOT_KNOWN, Release);
        file.write(ALLOCATED_OFFSET, bytes, WriteFlags::empty()).await?;
        self.allocated_on_disk.store(count.into(), Release);
        Ok(())
    }

    /// How many blocks are allocated, as the header says it on disk; `None` after a write of it has failed.
    pub(super) fn count_on_disk(&self) -> Option<u32> {
        u32::try_from(self.allocated_on_disk.load(Acquire)).ok()
    }

    /// Has the header count the blocks that are in use, after the map has become durable. No request is under way.
    pub(super) async fn settle_count(&self) -> Result<()> {
        let (file, end) = (self.file()?, self.allocator.end());
        if self.count_on_disk() == Some(end) {
            return Ok(());
        }
        let _turn = self.writing_back.lock().await;
        let writing = self.barrier.pass().await;
        let outcome = async {
            self.write_count(&file, end).await?;
            file.flush().await
        }
        .await;
        writing.done();
        outcome
    }
}

const _: () = assert!(PER_SECTOR as u64 * ENTRY_BYTES == SECTOR);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_sectors_are_written_together() {
        let sectors = [1, 2, 3, 7].into();
        assert_eq!(runs(&sectors), [(1, 3), (7, 1)]);
        let many: BTreeSet<u32> = (0..MAX_SECTORS + 1).collect();
        assert_eq!(runs(&many), [(0, MAX_SECTORS), (MAX_SECTORS, 1)]);
    }
}
