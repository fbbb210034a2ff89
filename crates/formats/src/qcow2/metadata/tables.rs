//! Making new L2 tables, copying the L2 tables that are shared with a snapshot before a change, and writing other tables to
//! new clusters.
//!
//! A new L2 table is written to the file before the L1 entry in memory refers to it. So the slices of the table can be
//! loaded from the file. The next write-back cycle writes the L1 entry, after the contents and the refcount of the table.

use oxblk_core::{DebugEvent, Errno, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Metadata;
use crate::qcow2::clusters::{Counted, ReleaseReason};
use crate::qcow2::layout::L1Entry;

impl Metadata {
    /// Makes sure that the L2 table of a guest cluster exists before clusters are reserved for its data. So in a new image
    /// a table lies in front of the first data that it maps, as in images that QEMU writes. Returns how many of the `count`
    /// clusters from `guest` on this table maps.
    pub(in crate::qcow2) async fn table_before_data(&self, guest: u64, count: u64) -> Result<u64> {
        self.ensure_table(self.mapping.l1_index(guest)).await?;
        let entries = self.geometry.l2_entries();
        Ok(count.min(entries - self.geometry.cluster_index(guest) % entries))
    }

    /// Makes sure that the L2 table of an L1 index exists and is not shared with a snapshot.
    ///
    /// # Errors
    /// `EIO` if the L1 table has no such index, `Corrupt` if the offset in the L1 entry is not aligned, and the errors of
    /// requests to the image file.
    pub(super) async fn ensure_table(&self, index: u64) -> Result<()> {
        if self.mapping.l1_entry(index).copied() {
            return Ok(());
        }
        let _guard = self.tables.lock().await;
        let entry = self.mapping.l1_entry(index);
        if entry.copied() {
            return Ok(());
        }
        if index >= self.mapping.l1_entries() {
            return Err(Error::from_errno(Errno::IO).prefix("L1 index out of range"));
        }
        let Ok(shared) = entry.l2_offset(self.geometry) else {
            return Err(self.image_state.mark_corrupt("L2 table offset unaligned", entry.0).await);
        };
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let file = self.image_state.file()?;
        let contents = match shared {
            Some(table) => {
                self.image_state.event(DebugEvent::L2AllocCowRead).await;
                file.read(table, IoBufMut::new(size)).await?.freeze()
            }
            None => IoBuf::zeroes(size),
        };
        let mut run = self.reserve_to_use(1).await?;
        run.begin_write();
        let offset = run.start() << self.geometry.cluster_bits;
        self.image_state.event(DebugEvent::L2AllocWrite).await;
        file.write(offset, contents, WriteFlags::empty()).await?;
        let counted = self.clusters.count(run, ReleaseReason::Table).await?;
        self.clusters.note_metadata(offset, self.geometry.cluster_size());
        self.mapping.set_l1_entry(index, L1Entry::new(offset));
        counted.keep();
        if let Some(table) = shared {
            self.clusters.drop_clusters(
                table >> self.geometry.cluster_bits,
                1,
                ReleaseReason::Table,
            );
        }
        Ok(())
    }

    /// Writes a table to new contiguous clusters and flushes it. Returns the offset of the table.
    pub(in crate::qcow2) async fn store_table(&self, bytes: Vec<u8>) -> Result<u64> {
        let (offset, counted) = self.store_unreferenced_table(bytes).await?;
        counted.keep();
        Ok(offset)
    }

    /// The same as [`Self::store_table`], but the clusters are freed unless the caller calls [`Counted::keep`] on the
    /// returned references.
    pub(in crate::qcow2) async fn store_unreferenced_table(
        &self,
        mut bytes: Vec<u8>,
    ) -> Result<(u64, Counted<'_>)> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let clusters = self.geometry.clusters_for(len);
        bytes.resize(usize::try_from(clusters << self.geometry.cluster_bits).unwrap_or(0), 0);
        let mut run = self.clusters.reserve_contiguous(clusters).await?;
        run.begin_write();
        let offset = run.start() << self.geometry.cluster_bits;
        let file = self.image_state.file()?;
        file.write(offset, bytes.into(), WriteFlags::empty()).await?;
        let counted = self.clusters.count(run, ReleaseReason::Table).await?;
        self.clusters.note_metadata(offset, len);
        self.clusters.write_back_refcounts().await?;
        file.flush().await?;
        Ok((offset, counted))
    }
}
