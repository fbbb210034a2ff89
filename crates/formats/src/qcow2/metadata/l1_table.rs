//! Replacing the L1 table by a larger copy. `oxblk_core` has drained the node.
//!
//! The new table and its refcounts are written and flushed. Then one write to the header makes the new table the active one. So
//! a crash leaves the old table or the new one, and leaks clusters at worst.

use oxblk_core::{DebugEvent, Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Metadata;
use crate::qcow2::clusters::ReleaseReason;
use crate::qcow2::layout::{MAX_L1_BYTES, field_offsets};

/// Unit to which the written part of a new table is rounded up, in bytes.
const SECTOR: u64 = 512;

impl Metadata {
    /// Replaces the L1 table by a larger one if a disk of `size` bytes needs more entries than the old table has.
    ///
    /// # Errors
    /// The errors of [`Self::grow_l1_to`].
    pub(in crate::qcow2) async fn grow_l1(&self, size: u64) -> Result<()> {
        let grown = self.grow_l1_to(self.geometry.l1_entries_for(size)).await;
        grown.map_err(|error| error.prefix("Failed to grow the L1 table"))
    }

    /// Replaces the L1 table by a larger one if it has fewer than `entries` entries. `None` stands for a number that
    /// overflows.
    ///
    /// # Errors
    /// `EFBIG` if the table would be too large, and the errors of requests to the image file.
    pub(in crate::qcow2) async fn grow_l1_to(&self, entries: Option<u64>) -> Result<()> {
        let needed = entries.filter(|entries| entries.saturating_mul(8) <= MAX_L1_BYTES);
        let needed = needed.ok_or_else(|| Error::from_errno(Errno::FBIG))?;
        let old_entries = self.mapping.l1_entries();
        if needed <= old_entries {
            return Ok(());
        }
        self.write_back(true).await?;
        let old_offset = self.mapping.l1_offset();
        let bytes = needed.saturating_mul(8);
        let clusters = self.geometry.clusters_for(bytes);
        self.image_state.event(DebugEvent::L1GrowAllocTable).await;
        let mut run = self.clusters.reserve_contiguous(clusters).await?;
        run.begin_write();
        let offset = run.start() << self.geometry.cluster_bits;
        let len = usize::try_from(clusters << self.geometry.cluster_bits)
            .map_err(|_| Error::from_errno(Errno::FBIG))?;
        // If the clusters were never written, the part of the last cluster behind the table is not written. The file may
        // end there.
        let written = match run.is_untouched() {
            true => {
                usize::try_from(bytes.next_multiple_of(SECTOR)).map_or(len, |most| len.min(most))
            }
            false => len,
        };
        let mut table = IoBufMut::zeroed(written);
        for (index, word) in (0..old_entries).zip(table.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.mapping.l1_entry(index).0.to_be_bytes());
        }
        let file = self.image_state.file()?;
        self.image_state.event(DebugEvent::L1GrowWriteTable).await;
        file.write(offset, table.freeze(), WriteFlags::empty()).await?;
        let counted = self.clusters.count(run, ReleaseReason::Table).await?;
        self.clusters.write_back_refcounts().await?;
        file.flush().await?;
        let before = l1_fields(old_entries, old_offset)?;
        let after = l1_fields(needed, offset)?;
        self.image_state.event(DebugEvent::L1GrowActivateTable).await;
        self.image_state.exchange_header_field(field_offsets::L1_SIZE, &before, &after).await?;
        counted.keep();
        self.mapping.set_l1_place(offset, needed);
        self.clusters.note_metadata(offset, bytes);
        self.clusters.free_table(old_offset, old_entries.saturating_mul(8)).await
    }
}

/// The fields of the header that describe the L1 table: number of entries, then offset.
fn l1_fields(entries: u64, offset: u64) -> Result<Vec<u8>> {
    let entries = u32::try_from(entries).map_err(|_| Error::from_errno(Errno::FBIG))?;
    Ok([&entries.to_be_bytes()[..], &offset.to_be_bytes()[..]].concat())
}
