//! Writing tables back, in an order that survives a crash at any point.
//!
//! One cycle runs at a time (lock `writing_back`). The steps of a cycle are:
//!
//! 1. take the freed clusters, the changed L1 entries with their values, and copies of the dirty L2 slices, in that order. So
//!    the copies contain the L2 entries that belong to the freed clusters and to the L1 entries. The data of every entry in the
//!    copies has been written;
//! 2. if there are copies or L1 entries to write, make sure that the header has the need-check flag;
//! 3. in this case, also flush the file, so that data and new tables are on disk;
//! 4. write the copies; flush if L1 entries follow;
//! 5. write the L1 entries;
//! 6. flush if the caller requests it or clusters have been freed. After this flush, the freed clusters are quarantined.
//!
//! If a cycle fails or is cancelled, it restores its input: the slices and L1 entries are dirty again, and the freed
//! clusters wait for the next cycle. The next cycle waits until the I/O of a cancelled cycle has ended (see
//! `write_barrier`).

use std::collections::BTreeMap;

use oxblk_core::{DebugEvent, Edge, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::header::ENTRY_BYTES;
use super::{Qed, lock};
use crate::slice_cache::DirtyCopy;

/// The tables that one cycle writes. If this value is dropped before [`Self::written`], the slices and L1 entries are
/// marked dirty again.
struct Cycle<'a> {
    image: &'a Qed,
    /// The changed L1 entries, with the values that they had when the cycle began. A newer value may refer to a table that this
    /// cycle does not write.
    l1: BTreeMap<u64, u64>,
    copies: Vec<DirtyCopy<'a>>,
}

impl<'a> Cycle<'a> {
    fn begin(image: &'a Qed) -> Self {
        let l1 = image.take_l1_dirty();
        point();
        Self { image, l1, copies: image.l2.take_dirty() }
    }

    fn is_empty(&self) -> bool {
        self.l1.is_empty() && self.copies.is_empty()
    }

    /// Ends the cycle after all of its input has been written.
    fn written(mut self) {
        self.l1.clear();
        self.copies.drain(..).for_each(DirtyCopy::written);
    }
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        lock(&self.image.l1_dirty).extend(std::mem::take(&mut self.l1).into_keys());
    }
}

impl Qed {
    /// Runs one cycle. With `durable`, all changes that completed before the call have been flushed when this function returns.
    pub(super) async fn write_back(&self, durable: bool) -> Result<()> {
        let _guard = self.writing_back.lock().await;
        let file = self.file()?;
        // No entry in memory refers to these clusters.
        let freed = self.freed.take();
        point();
        let cycle = Cycle::begin(self);
        if cycle.is_empty() && freed.blocks.is_empty() {
            return if durable { flush(&file).await } else { Ok(()) };
        }
        self.check_running()?;
        let writing = self.barrier.pass().await;
        let last = durable || !freed.blocks.is_empty();
        let outcome = self.write_ordered(&file, &cycle, last).await;
        writing.done();
        outcome?;
        cycle.written();
        freed.free(&self.allocator);
        Ok(())
    }

    async fn write_ordered(&self, file: &Edge, cycle: &Cycle<'_>, last_flush: bool) -> Result<()> {
        if !cycle.is_empty() {
            self.set_need_check().await?;
            file.flush().await?;
            self.write_slices(file, &cycle.copies).await?;
        }
        if !cycle.l1.is_empty() {
            if !cycle.copies.is_empty() {
                file.flush().await?;
            }
            self.write_l1(file, &cycle.l1).await?;
        }
        if last_flush { flush(file).await } else { Ok(()) }
    }

    async fn write_slices(&self, file: &Edge, copies: &[DirtyCopy<'_>]) -> Result<()> {
        let mut writes = Vec::with_capacity(copies.len());
        for copy in copies {
            // A slice whose table was removed has no offset in the file, and is not written.
            if let Some(place) = self.slice_place(copy.slice)? {
                let bytes = IoBuf::from(copy.bytes.clone());
                writes.push(file.write(place, bytes, WriteFlags::empty()));
            }
        }
        if !writes.is_empty() {
            file.debug_event(DebugEvent::L2Update).await;
        }
        run_all(writes).await
    }

    async fn write_l1(&self, file: &Edge, entries: &BTreeMap<u64, u64>) -> Result<()> {
        let table = self.header().header.l1_offset;
        file.debug_event(DebugEvent::L1Update).await;
        let writes = entries.iter().map(|(index, entry)| {
            let place = table.saturating_add(index.saturating_mul(ENTRY_BYTES));
            let bytes = IoBuf::from(entry.to_le_bytes().to_vec());
            file.write(place, bytes, WriteFlags::empty())
        });
        run_all(writes).await
    }
}

/// Ends a write-back with a flush.
async fn flush(file: &Edge) -> Result<()> {
    file.debug_event(DebugEvent::FlushToDisk).await;
    file.flush().await
}
