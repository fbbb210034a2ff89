//! The order in which the BAT reaches the disk.
//!
//! The steps of a write-back:
//!
//! 1. *copy*: copy the changed sectors of the BAT. The data of all blocks to which the copied entries refer has been written;
//! 2. *flush*: flush the data;
//! 3. *entries*: write the copies;
//! 4. *flush*: flush the file. After this flush, the old slots of moved blocks are freed.
//!
//! If an entry changes after its sector was copied, the next write-back writes the new value.

use std::ops::Range;

use oxblk_core::{DebugEvent, Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Vpc;

impl Vpc {
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
        let writing = self.barrier.pass().await;
        let outcome = write_ordered(&file, copies).await;
        writing.done();
        outcome?;
        sectors.written();
        freed.free(&self.allocator);
        Ok(())
    }
}

async fn write_ordered(file: &Edge, copies: Vec<(u64, IoBuf)>) -> Result<()> {
    file.flush().await?;
    let write = |(offset, bytes)| file.write(offset, bytes, WriteFlags::empty());
    run_all(copies.into_iter().map(write)).await?;
    file.debug_event(DebugEvent::FlushToDisk).await;
    file.flush().await
}
