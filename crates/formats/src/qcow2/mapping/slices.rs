//! Slices of L2 tables: their numbers, their offsets in the file, and their cache.

use oxblk_core::{DebugEvent, Error, Result};
use oxblk_ring::IoBufMut;
use oxblk_ring::perturb::point;

use super::Mapping;
use crate::slice_cache::{DirtyCopy, Pinned};

impl Mapping {
    /// The number of the slice with the L2 entry of a guest offset, and the index of the entry's first word in that slice.
    #[inline]
    pub(in crate::qcow2) fn slice_of(&self, offset: u64) -> (u64, usize) {
        let words = self.geometry.l2_entry_words();
        let word = (offset >> self.geometry.cluster_bits).wrapping_mul(words);
        let within = word & (self.slice_words - 1);
        (word / self.slice_words, usize::try_from(within).unwrap_or(0))
    }

    /// Host offset of a slice; `None` if its L2 table does not exist.
    pub(in crate::qcow2) async fn slice_place(&self, slice: u64) -> Result<Option<u64>> {
        let per_table = self.geometry.cluster_size() / 8 / self.slice_words;
        let index = slice / per_table;
        match self.l1_entry(index).l2_offset(self.geometry) {
            Ok(table) => Ok(table.map(|table| {
                let within = (slice % per_table).saturating_mul(self.slice_words).saturating_mul(8);
                table.saturating_add(within)
            })),
            Err(_) => {
                let entry = self.l1_entry(index).raw_offset();
                let text = format!("L2 table offset {entry:#x} unaligned (L1 index: {index:#x})");
                Err(self.image_state.mark_corrupt(&text, entry).await)
            }
        }
    }

    /// Reads a slice from the file. The caller prevents other tasks from loading the same slice concurrently.
    ///
    /// The table's offset is looked up only here, because no task can change the entries of a slice while the slice is being
    /// loaded. An offset from an earlier lookup may be stale, if the table at that offset is shared with a snapshot. Since that
    /// lookup, another task may have copied the table and changed the copy, and the changed slice may have left the cache.
    pub(in crate::qcow2) async fn read_slice(&self, slice: u64, offset: u64) -> Result<IoBufMut> {
        let place = self.slice_place(slice).await?;
        let place =
            place.ok_or_else(|| Error::corrupt("the L2 table no longer exists").at(offset))?;
        point();
        let len = usize::try_from(self.slice_words.saturating_mul(8)).unwrap_or(0);
        self.image_state.event(DebugEvent::L2Load).await;
        self.image_state.file()?.read(place, IoBufMut::new(len)).await
    }

    /// Pins a cached slice.
    pub(in crate::qcow2) fn pin(&self, slice: u64) -> Option<Pinned<'_>> {
        self.l2.pin(slice)
    }

    /// Pins a slice. Loads the slice with `load` if it is not cached. `None`: all cached slices are dirty or pinned.
    pub(in crate::qcow2) async fn load<L>(
        &self,
        slice: u64,
        load: impl Fn() -> L,
    ) -> Result<Option<Pinned<'_>>>
    where
        L: Future<Output = Result<IoBufMut>>,
    {
        self.l2.get(slice, load).await
    }

    /// Returns copies of the dirty slices for a write-back, and marks the slices clean.
    pub(in crate::qcow2) fn take_dirty_slices(&self) -> Vec<DirtyCopy<'_>> {
        self.l2.take_dirty()
    }

    /// Drops all cached slices that are neither dirty nor pinned. Returns whether these were all slices.
    pub(in crate::qcow2) fn clear(&self) -> bool {
        self.l2.clear()
    }

    /// Sets the maximum number of cached slices.
    pub(in crate::qcow2) fn set_limit(&self, slices: usize) {
        self.l2.set_limit(slices);
    }

    /// Bytes of a slice.
    pub(in crate::qcow2) fn slice_bytes(&self) -> u64 {
        self.slice_words.saturating_mul(8)
    }
}
