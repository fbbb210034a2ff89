//! The order in which the header and the block map reach the disk.
//!
//! The steps of a write-back:
//!
//! 1. *copy*: copy the changed sectors of the map. All data that these entries name has been written;
//! 2. *count*: write a number of allocated blocks to the header that covers all blocks that the copies name;
//! 3. *flush*: make data and count durable;
//! 4. *entries*: write the copies;
//! 5. *flush*: from here on, the old places of blocks that were moved are free.
//!
//! If an entry changes after its sector was copied, the next write-back writes it.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Vdi;
use super::header::ALLOCATED_OFFSET;
use crate::blocks::BlockImage;

/// Value for an unknown count; larger than any count.
const NOT_KNOWN: u64 = u64::MAX;

impl Vdi {
    /// Makes all changes durable that had completed before the call.
    pub(super) async fn write_back(&self) -> Result<()> {
        let _turn = self.writing_back.lock().await;
        let file = self.file()?;
        // The entries of these blocks have changed already and are marked as dirty.
        let freed = self.freed.take();
        let sectors = self.dirty.take();
        if sectors.is_empty() && freed.blocks.is_empty() {
            return file.flush().await;
        }
        point();
        let copy = |entries: Range<u32>| {
            let offset = self.entry_offset(entries.start);
            (offset, IoBuf::from(self.map.encode(entries)))
        };
        let copies = sectors.runs(self.map.len()).into_iter().map(copy).collect();
        point();
        let end = self.allocator.end();
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, copies, end).await;
        writing.done();
        outcome?;
        sectors.written();
        freed.free(&self.allocator);
        Ok(())
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

    /// Writes the number of allocated blocks to the header.
    async fn write_count(&self, file: &Edge, count: u32) -> Result<()> {
        let bytes = IoBuf::from(count.to_le_bytes().to_vec());
        // A write that fails may have reached the disk even so.
        self.allocated_on_disk.store(NOT_KNOWN, Release);
        file.write(ALLOCATED_OFFSET, bytes, WriteFlags::empty()).await?;
        self.allocated_on_disk.store(count.into(), Release);
        Ok(())
    }

    /// The number of allocated blocks in the header on disk; `None` if a write of it has failed.
    pub(super) fn count_on_disk(&self) -> Option<u32> {
        u32::try_from(self.allocated_on_disk.load(Acquire)).ok()
    }

    /// Writes the number of blocks in use to the header, after the map is durable. No request is in flight.
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
