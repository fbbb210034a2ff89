//! The refcount table: its offset and size, its entries, and reading the table.

use std::collections::HashSet;
use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{DebugEvent, Edge, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut, MutexGuard};

use super::{Clusters, RefcountTable};
use crate::qcow2::image_state::run_options::Modes;
use crate::qcow2::layout::{Header, RefcountTableEntry};

impl Clusters {
    /// Host offset of a refcount block, 0 if there is none.
    pub(in crate::qcow2) fn block_offset(&self, block: u64) -> u64 {
        self.table
            .get(block)
            .map_or(0, |entry| RefcountTableEntry(entry.load(Acquire)).raw_offset())
    }

    /// The refcount blocks with these numbers, each as (number, offset).
    ///
    /// # Errors
    /// When a block is missing, is not aligned, or is listed under two numbers.
    pub(in crate::qcow2) fn places_of(&self, blocks: Vec<u64>) -> Result<Vec<(u64, u64)>> {
        let place = |block| match self.block_offset(block) {
            0 => Err(Error::corrupt(format!("refcount block {block} is missing"))),
            offset if self.geometry.is_aligned(offset) => Ok((block, offset)),
            offset => Err(Error::corrupt(format!("refcount block {block} unaligned")).at(offset)),
        };
        let places = blocks.into_iter().map(place).collect::<Result<Vec<_>>>()?;
        let mut known = HashSet::with_capacity(places.len());
        match places.iter().find(|(_, offset)| !known.insert(*offset)) {
            Some((_, offset)) => {
                Err(Error::corrupt("refcount block is used twice: the image needs a check")
                    .at(*offset))
            }
            None => Ok(places),
        }
    }

    /// The numbers of all existing refcount blocks.
    pub(in crate::qcow2) fn blocks(&self) -> Vec<u64> {
        let entries = self.table_entries.load(Acquire);
        (0..entries).filter(|block| self.block_offset(*block) != 0).collect()
    }

    pub(super) async fn publish_block(&self, block: u64, cluster: u64) -> Result<()> {
        let offset = self.host(cluster);
        self.write_table_entry(block, offset).await?;
        self.adopt_block(block, offset);
        Ok(())
    }

    /// Writes an entry of the refcount table, without a flush.
    pub(super) async fn write_table_entry(&self, block: u64, offset: u64) -> Result<()> {
        let place = self.table_entry_place(block)?;
        let entry = IoBuf::from(offset.to_be_bytes().to_vec());
        self.file()?.write(place, entry, WriteFlags::empty()).await
    }

    /// The file offset of an entry of the refcount table.
    ///
    /// # Errors
    /// `Corrupt` if the table overlaps with protected metadata, so that the table must not be written.
    pub(super) fn table_entry_place(&self, block: u64) -> Result<u64> {
        let table = self.table_place();
        let start = self.geometry.cluster_index(table.offset);
        let clusters = start..start.saturating_add(table.clusters);
        self.overlaps.check(
            Modes::REFCOUNT_TABLE,
            clusters,
            self.image_state.modes() & Modes::EVERYTHING,
        )?;
        Ok(self.table_offset.load(Acquire).saturating_add(block.saturating_mul(8)))
    }

    pub(super) fn adopt_block(&self, block: u64, offset: u64) {
        self.allocator.note_metadata(offset, self.geometry.cluster_size());
        self.table.get_or_make(block).store(offset, Release);
    }

    /// Replaces the refcount table in memory with the table on disk to which `header` refers. The caller ensures that no
    /// refcount slice is dirty.
    pub(in crate::qcow2) async fn reload(&self, header: &Header) -> Result<()> {
        for index in 0..self.table_entries.load(Acquire) {
            if let Some(entry) = self.table.get(index) {
                entry.store(0, Release);
            }
        }
        self.cache.clear();
        let clusters = u64::from(header.refcount_table_clusters);
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        self.table_offset.store(header.refcount_table_offset, Release);
        self.table_entries.store(bytes / 8, Release);
        let file = self.file()?;
        self.read_table(&file, header.refcount_table_offset, bytes).await
    }

    pub(super) async fn read_table(&self, file: &Edge, offset: u64, bytes: u64) -> Result<()> {
        self.allocator.note_metadata(offset, bytes);
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("refcount table too large"))?;
        self.image_state.event(DebugEvent::ReftableLoad).await;
        let table = file.read(offset, IoBufMut::new(len)).await?;
        for (index, word) in (0_u64..).zip(table.chunks_exact(8)) {
            let entry = word.try_into().map_or(0, u64::from_be_bytes);
            if entry != 0 {
                self.table.get_or_make(index).store(entry, Release);
                self.allocator.note_metadata(
                    RefcountTableEntry(entry).raw_offset(),
                    self.geometry.cluster_size(),
                );
            }
        }
        Ok(())
    }

    /// Whether the table has this offset and this size, and is the same on disk and in memory.
    pub(in crate::qcow2) async fn is_as_on_disk(&self, offset: u64, clusters: u64) -> Result<bool> {
        let bytes = clusters.saturating_mul(self.geometry.cluster_size());
        if self.table_offset.load(Acquire) != offset
            || self.table_entries.load(Acquire) != bytes / 8
        {
            return Ok(false);
        }
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("refcount table too large"))?;
        let table = self.file()?.read(offset, IoBufMut::new(len)).await?;
        let entries =
            table.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes));
        Ok((0..).zip(entries).all(|(index, entry)| {
            self.table.get(index).map_or(0, |own| own.load(Acquire)) == entry
        }))
    }

    /// The current place of the table.
    pub(in crate::qcow2) fn table_place(&self) -> RefcountTable {
        let bytes = self.table_entries.load(Acquire).saturating_mul(8);
        RefcountTable {
            offset: self.table_offset.load(Acquire),
            clusters: self.geometry.clusters_for(bytes),
        }
    }

    /// Takes the lock of the refcount table. While this lock is held, the table does not move and no refcount block is created.
    pub(in crate::qcow2) async fn lock_table(&self) -> MutexGuard<'_, ()> {
        self.growing.lock().await
    }

    pub(super) fn host(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }
}
