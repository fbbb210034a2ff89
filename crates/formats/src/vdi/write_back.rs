//! The order in which the header and the block map reach the disk.
//!
//! The steps of a write-back:
//!
//! 1. *copy*: copy the changed sectors of the map. The data of all blocks to which the copied entries refer has been written;
//! 2. *count*: if necessary, raise the number of allocated blocks in the header so that it includes all blocks in the copies;
//! 3. *flush*: flush the data and the header;
//! 4. *entries*: write the copies;
//! 5. *flush*: flush the file. After this flush, the old blocks of moved data are freed.
//!
//! If an entry changes after its sector was copied, the next write-back writes the new value.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{DebugEvent, Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Vdi;
use super::header::ALLOCATED_OFFSET;
use crate::blocks::BlockImage;

/// Value of `allocated_on_disk` if the number in the header is unknown. It is larger than every valid number.
const NOT_KNOWN: u64 = u64::MAX;

impl Vdi {
    /// Writes and flushes all changes that completed before the call.
    pub(super) async fn write_back(&self) -> Result<()> {
        let _guard = self.writing_back.lock().await;
        let file = self.file()?;
        // The entries of these blocks have already been changed and marked as dirty.
        let freed = self.freed.take();
        let sectors = self.dirty.take();
        if sectors.is_empty() && freed.blocks.is_empty() {
            file.debug_event(DebugEvent::FlushToDisk).await;
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
        file.debug_event(DebugEvent::FlushToDisk).await;
        file.flush().await
    }

    /// Writes the number of allocated blocks to the header.
    async fn write_count(&self, file: &Edge, count: u32) -> Result<()> {
        let bytes = IoBuf::from(count.to_le_bytes().to_vec());
        // If the write fails or is cancelled, the number on disk is unknown.
        self.allocated_on_disk.store(NOT_KNOWN, Release);
        file.write(ALLOCATED_OFFSET, bytes, WriteFlags::empty()).await?;
        self.allocated_on_disk.store(count.into(), Release);
        Ok(())
    }

    /// The number of allocated blocks in the header on disk. `None` if the last write of this number has failed or was
    /// cancelled.
    pub(super) fn count_on_disk(&self) -> Option<u32> {
        u32::try_from(self.allocated_on_disk.load(Acquire)).ok()
    }

    /// Lowers or raises the number of allocated blocks in the header to the end of the blocks in use, and flushes. The map
    /// has been flushed, and no request is in flight.
    pub(super) async fn write_block_count(&self) -> Result<()> {
        let (file, end) = (self.file()?, self.allocator.end());
        if self.count_on_disk() == Some(end) {
            return Ok(());
        }
        let _guard = self.writing_back.lock().await;
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
