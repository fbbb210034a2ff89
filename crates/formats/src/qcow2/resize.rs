//! Change of the virtual size. Core has drained the node.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::{ChildIdx, Error, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::layout::{L1Entry, MAX_L1_BYTES, field_offsets};
use super::write_back::Was;

impl Qcow2 {
    /// Sets the virtual size to `size` bytes.
    pub(super) async fn resize_image(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        self.check_resizable()?;
        self.check_bitmaps_can_follow(size)?;
        let old = self.size();
        // It would become part of the disk, or lie where nobody looks for it.
        self.forget_vm_state().await?;
        if size < old {
            return self.shrink(old, size, preallocation).await;
        }
        self.grow_data(old, size).await?;
        self.grow_l1(size).await?;
        self.write_back(true).await?;
        self.write_header_field(field_offsets::SIZE, &size.to_be_bytes()).await?;
        self.size.store(size, Release);
        self.hide_backing(old, size).await?;
        // A data file that is what the guest reads has everything in its place.
        let preallocation = match preallocation {
            Preallocation::Off if self.has_raw_data() => Preallocation::Metadata,
            preallocation => preallocation,
        };
        if preallocation == Preallocation::Off {
            return Ok(());
        }
        let allocated = self.preallocate(old, size, preallocation).await;
        if allocated.is_err() {
            // Nobody is left with a larger disk than there is room for. What keeps it so is told by `allocated`.
            let _ = self.shrink(size, old, Preallocation::Off).await;
        }
        allocated.map_err(|error| error.prefix("Could not preallocate the new space"))
    }

    /// Version 2 does not tell how large the disk was when a snapshot was taken.
    pub(super) fn check_resizable(&self) -> Result<()> {
        if self.snapshot_table().count > 0 && self.header().version < 3 {
            return Err(Error::unsupported("Can't resize a v2 image which has snapshots"));
        }
        Ok(())
    }

    /// Makes a data file as long as the disk. What it has behind the old end is cut off first, unless it is said to be what
    /// a guest reads.
    async fn grow_data(&self, old: u64, size: u64) -> Result<()> {
        if !self.geometry.data_file {
            return Ok(());
        }
        let data = self.children.require(ChildIdx::DATA)?;
        if data.size() > old && !self.has_raw_data() {
            data.resize(old, Preallocation::Off).await?;
        }
        data.resize(size, Preallocation::Off).await
    }

    /// Space that is added reads as zeroes, even where the backing file goes on.
    async fn hide_backing(&self, old: u64, size: u64) -> Result<()> {
        let backing = self.children.get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        let end = backing.min(size);
        if old >= end {
            return Ok(());
        }
        let block = self.geometry.subcluster_size();
        let whole = old.checked_next_multiple_of(block).unwrap_or(u64::MAX).min(size);
        if old < whole {
            let len = usize::try_from(whole - old).unwrap_or(0);
            self.write_guest(old, IoBuf::zeroes(len)).await?;
        }
        let last = self.cluster_end(end).min(size);
        if whole < last {
            match self.zero_guest(whole, last - whole, ZeroFlags::MAY_UNMAP).await {
                Err(error) if error.kind() == oxblk_core::ErrorKind::Unsupported => {
                    self.write_zero_data(whole, last).await?;
                }
                outcome => outcome?,
            }
        }
        self.write_back(true).await
    }

    async fn write_zero_data(&self, from: u64, to: u64) -> Result<()> {
        let zeroes = IoBuf::zeroes(1 << 20);
        let mut at = from;
        while at < to {
            let len = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.write_guest(at, zeroes.slice(..len)).await?;
            at = at.saturating_add(u64::try_from(len).unwrap_or(0));
        }
        Ok(())
    }

    /// The header comes first: a crash leaves clusters that are in use but out of reach, nothing else.
    async fn shrink(&self, old: u64, size: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Off {
            return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
        }
        self.write_back(true).await?;
        self.write_header_field(field_offsets::SIZE, &size.to_be_bytes()).await?;
        self.size.store(size, Release);
        // All that the L1 table reaches: VM state behind the disk has lost its place, too.
        let reach = self.geometry.cluster_size() << self.geometry.l2_bits();
        let from = self.cluster_end(size);
        let to = self.cluster_end(old).max(self.l1_entries().saturating_mul(reach));
        if from < to {
            self.forget_guest(from, to).await?;
        }
        self.drop_tables_from(self.geometry.l1_entries_for(size).unwrap_or(0));
        self.zero_tail(size).await?;
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        self.write_back(true).await?;
        if let Some(data) = self.children.get(ChildIdx::DATA) {
            data.resize(size, Preallocation::Off).await?;
        }
        self.trim_file().await
    }

    /// Gives up the L2 tables of the L1 entries from `index` on, which have no entries left.
    fn drop_tables_from(&self, index: u64) {
        for index in index..self.l1_entries() {
            if let Ok(Some(table)) = self.l1_entry(index).l2_offset(self.geometry) {
                self.set_l1_entry(index, L1Entry::EMPTY);
                self.drop_clusters(self.geometry.cluster_index(table), 1, Was::Table);
            }
        }
    }

    /// What the last cluster holds past the end must not come back when the image grows again.
    async fn zero_tail(&self, size: u64) -> Result<()> {
        // A data file is cut off there.
        let end = self.end_of_data(self.cluster_end(size));
        if size == end || self.reads_as_zero(size, end).await? {
            return Ok(());
        }
        let len = usize::try_from(end - size).unwrap_or(0);
        self.write_guest(size, IoBuf::zeroes(len)).await
    }

    /// Moves the L1 table to a bigger place if `size` needs more entries than it has.
    async fn grow_l1(&self, size: u64) -> Result<()> {
        self.grow_l1_to(self.geometry.l1_entries_for(size)).await
    }

    /// The same for so many entries (`None`: more than can be counted). Core has drained the node.
    pub(super) async fn grow_l1_to(&self, entries: Option<u64>) -> Result<()> {
        let needed = entries.filter(|entries| entries.saturating_mul(8) <= MAX_L1_BYTES);
        let needed =
            needed.ok_or_else(|| Error::from_errno(27).prefix("Failed to grow the L1 table"))?;
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
        let (start, offset) = (run.start(), run.start() << self.geometry.cluster_bits);
        let len = usize::try_from(clusters << self.geometry.cluster_bits)
            .map_err(|_| Error::from_errno(27))?;
        let mut table = IoBufMut::zeroed(len);
        for (index, word) in (0..old_entries).zip(table.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.l1_entry(index).0.to_be_bytes());
        }
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(offset, table.freeze(), WriteFlags::empty()).await?;
        self.refcounts.add(start, clusters).await?;
        run.keep();
        self.write_back_refcounts().await?;
        file.flush().await?;
        let entries = u32::try_from(needed).map_err(|_| Error::from_errno(27))?;
        let mut pointer = entries.to_be_bytes().to_vec();
        pointer.extend_from_slice(&offset.to_be_bytes());
        self.write_header_field(field_offsets::L1_SIZE, &pointer).await?;
        self.l1_offset.store(offset, Release);
        self.l1_entries.store(needed, Release);
        self.refcounts.allocator.note_metadata(offset, bytes);
        let old_bytes = old_entries.saturating_mul(8);
        if old_bytes > 0 {
            self.drop_clusters(
                old_offset >> self.geometry.cluster_bits,
                self.geometry.clusters_for(old_bytes),
                Was::Table,
            );
        }
        Ok(())
    }
}
