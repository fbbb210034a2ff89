//! Moving the L1 table to a bigger place. Core has drained the node.
//!
//! The new table is written and counted, durably, before the header names it, which is one write.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{ChildIdx, Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Qcow2;
use super::layout::{MAX_L1_BYTES, field_offsets};
use super::write_back::ReleaseReason;

/// What a file is written in, in bytes.
const SECTOR: u64 = 512;

impl Qcow2 {
    /// Moves the L1 table to a bigger place if `size` needs more entries than it has.
    pub(super) async fn grow_l1(&self, size: u64) -> Result<()> {
        let grown = self.grow_l1_to(self.geometry.l1_entries_for(size)).await;
        grown.map_err(|error| error.prefix("Failed to grow the L1 table"))
    }

    /// The same for so many entries (`None`: more than can be counted).
    pub(super) async fn grow_l1_to(&self, entries: Option<u64>) -> Result<()> {
        let needed = entries.filter(|entries| entries.saturating_mul(8) <= MAX_L1_BYTES);
        let needed = needed.ok_or_else(|| Error::from_errno(Errno::FBIG))?;
        let old_entries = self.l1_entries.load(Acquire);
        if needed <= old_entries {
            return Ok(());
        }
        self.write_back(true).await?;
        let old_offset = self.l1_offset.load(Acquire);
        let bytes = needed.saturating_mul(8);
        let clusters = self.geometry.clusters_for(bytes);
        let mut run = self.refcounts.reserve_contiguous(clusters).await?;
        run.begin_write();
        let offset = run.start() << self.geometry.cluster_bits;
        let len = usize::try_from(clusters << self.geometry.cluster_bits)
            .map_err(|_| Error::from_errno(Errno::FBIG))?;
        // The rest of the last cluster stays a hole if it is one. The file may end within it.
        let written = match run.is_untouched() {
            true => {
                usize::try_from(bytes.next_multiple_of(SECTOR)).map_or(len, |most| len.min(most))
            }
            false => len,
        };
        let mut table = IoBufMut::zeroed(written);
        for (index, word) in (0..old_entries).zip(table.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.l1_entry(index).0.to_be_bytes());
        }
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(offset, table.freeze(), WriteFlags::empty()).await?;
        let counted = self.count(run, ReleaseReason::Table).await?;
        self.write_back_refcounts().await?;
        file.flush().await?;
        let before = l1_fields(old_entries, old_offset)?;
        let after = l1_fields(needed, offset)?;
        self.exchange_header_field(field_offsets::L1_SIZE, &before, &after).await?;
        counted.keep();
        self.l1_offset.store(offset, Release);
        self.l1_entries.store(needed, Release);
        self.refcounts.allocator.note_metadata(offset, bytes);
        self.refcounts.free_table(old_offset, old_entries.saturating_mul(8)).await
    }
}

/// How the header tells of an L1 table: its entries, then its offset.
fn l1_fields(entries: u64, offset: u64) -> Result<Vec<u8>> {
    let entries = u32::try_from(entries).map_err(|_| Error::from_errno(Errno::FBIG))?;
    Ok([&entries.to_be_bytes()[..], &offset.to_be_bytes()[..]].concat())
}
