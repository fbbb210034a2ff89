//! Making the disk smaller. `oxblk_core` has drained the node.
//!
//! One write to the header makes the shrink effective: the header gets the new size and a new L1 table. The new L1 table
//! does not map the part behind the new end. Before this write, the image writes copies of the L1 table, of the L2 table in
//! which the disk ends, and of the last cluster (of the last two only if they contain something behind the new end). The
//! copies contain nothing behind the new end. After the write to the header, the old tables and clusters are freed. So a
//! crash or a failure leaves the old disk or the new one, and leaks clusters at worst.
//!
//! A raw data file is truncated directly after the write to the header. If the truncation fails, the header gets the old size
//! back. A crash between the two steps leaves the data file longer than the disk.
//!
//! If there is no free space for the copies, the part behind the new end is cleared in place before the size changes. A
//! failure may then leave the old size and a partly cleared end of the disk.

use std::collections::BTreeMap;

use oxblk_core::{
    ChildIdx, DebugEvent, Errno, Error, ErrorKind, Preallocation, Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::clusters::Counted;
use super::clusters::ReleaseReason;
use super::image_state::header::stop_on_failure;
use super::layout::{ExtendedEntry, L1Entry, L2Entry, field_offsets};

/// New copies of the last L2 table and of the last cluster, if they are needed. The copies are written and have refcounts.
/// They contain nothing behind the new end.
#[derive(Default)]
struct TruncatedCopies<'a> {
    /// The new L2 table that replaces the table in which the disk ends: its L1 index and its offset.
    table: Option<(usize, u64)>,
    held: Vec<Counted<'a>>,
    /// Entries of the old table that the new table does not contain. The clusters of these entries are freed later.
    dropped: Vec<L2Entry>,
}

impl Qcow2 {
    /// Makes a disk of `old` bytes `size` bytes long. `size` is less than `old`.
    pub(super) async fn shrink(&self, old: u64, size: u64) -> Result<()> {
        match self.shrink_at_once(size).await {
            Err(error)
                if error.kind() == ErrorKind::NoSpace
                    && self.image_state.check_usable().is_ok() =>
            {
                self.shrink_in_place(old, size).await
            }
            outcome => outcome,
        }
    }

    async fn shrink_at_once(&self, size: u64) -> Result<()> {
        self.metadata.write_back(true).await?;
        let (l1, l1_offset) = (self.mapping.active_l1(), self.mapping.l1_offset());
        let kept = self.geometry.l1_entries_for(size).and_then(|kept| usize::try_from(kept).ok());
        let kept = kept.unwrap_or(l1.len());
        let mut new: Vec<L1Entry> = l1.iter().copied().take(kept).collect();
        let copies = self.copy_truncated_table(size, new.last().copied()).await?;
        if let Some((index, offset)) = copies.table
            && let Some(entry) = new.get_mut(index)
        {
            *entry = L1Entry::new(offset);
        }
        new.resize(l1.len(), L1Entry::EMPTY);
        let bytes: Vec<u8> = new.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let offset = match bytes.is_empty() {
            true => l1_offset,
            false => {
                self.image_state.event(DebugEvent::L1ShrinkWriteTable).await;
                self.metadata.store_table(bytes).await?
            }
        };
        let entries = u32::try_from(l1.len()).map_err(|_| Error::from_errno(Errno::FBIG))?;
        let before =
            self.image_state.active_fields(self.image_state.size_in_header(), entries, l1_offset);
        let after = self.image_state.active_fields(size, entries, offset);
        let place = field_offsets::SIZE;
        let mut written = self.image_state.exchange_header_field(place, &before, &after).await;
        if written.is_ok()
            && let Err(error) = self.shrink_raw_data(size).await
        {
            // Memory still has the old size. If the header cannot be restored, the image accepts no further requests.
            let back = self.image_state.exchange_header_field(place, &after, &before);
            stop_on_failure(back, self.image_state.disabled()).await?;
            written = Err(error);
        }
        if written.is_err() {
            if offset != l1_offset {
                self.clusters.drop_l1_clusters(l1.len(), offset);
            }
            return written;
        }
        self.mapping.replace_l1(new.iter().copied(), offset, entries.into());
        self.image_state.set_size(size);
        self.bitmaps.resize_bitmaps(size);
        if let Some((_, table)) = copies.table {
            self.clusters.note_metadata(table, self.geometry.cluster_size());
        }
        let replaced = copies.table.and_then(|(index, _)| l1.get(index)).copied();
        copies.held.into_iter().for_each(Counted::keep);
        self.clusters.drop_entries(&copies.dropped, ReleaseReason::CutOff);
        if offset != l1_offset {
            self.clusters.drop_l1_clusters(l1.len(), l1_offset);
        }
        let removed: Vec<L1Entry> = l1.into_iter().skip(kept).collect();
        // The disk is already smaller. Clusters that cannot be freed are leaked.
        if let Err(error) = self.free_removed_tables(replaced, &removed, size).await {
            tracing::warn!(
                "qcow2: clusters behind the new end of the disk could not be freed: {error}"
            );
        }
        Ok(())
    }

    /// Writes a copy of the L2 table in which a disk of `size` bytes ends, without the entries behind the end. `entry` refers
    /// to the old table. If nothing lies behind the end, makes no copy.
    async fn copy_truncated_table(
        &self,
        size: u64,
        entry: Option<L1Entry>,
    ) -> Result<TruncatedCopies<'_>> {
        let mut copies = TruncatedCopies::default();
        let Some((entry, last)) = entry.zip(size.checked_sub(1)) else { return Ok(copies) };
        let Ok(offset) = entry.l2_offset(self.geometry) else {
            return Err(self.image_state.mark_corrupt("L2 table offset unaligned", entry.0).await);
        };
        let file = self.image_state.file()?;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut table = match offset {
            Some(offset) => file.read(offset, IoBufMut::new(len)).await?,
            None => IoBufMut::zeroed(len),
        };
        let entry_size = usize::try_from(self.geometry.l2_entry_size()).unwrap_or(8);
        let of_last = self.geometry.cluster_index(last) & (self.geometry.l2_entries() - 1);
        let of_last = usize::try_from(of_last).unwrap_or(usize::MAX);
        let mut changed = false;
        for entry in table.chunks_exact_mut(entry_size).skip(of_last.saturating_add(1)) {
            if entry.iter().any(|byte| *byte != 0) {
                copies.dropped.push(first_word(entry));
                entry.fill(0);
                changed = true;
            }
        }
        if let Some((cluster, counted)) = self.copy_truncated_cluster(size).await? {
            let place = table.chunks_exact_mut(entry_size).nth(of_last);
            let place = place.ok_or_else(|| Error::corrupt("L2 entry out of range"))?;
            copies.dropped.push(first_word(place));
            let new = ExtendedEntry::whole(L2Entry::data(cluster << self.geometry.cluster_bits));
            let words = [new.entry.0.to_be_bytes(), new.bitmap.0.to_be_bytes()].concat();
            place.copy_from_slice(words.get(..entry_size).unwrap_or_default());
            copies.held.push(counted);
            changed = true;
        }
        if !changed {
            return Ok(copies);
        }
        let mut run = self.clusters.reserve(1).await?;
        run.begin_write();
        let place = run.start() << self.geometry.cluster_bits;
        file.write(place, table.freeze(), WriteFlags::empty()).await?;
        copies.held.push(self.clusters.count(run, ReleaseReason::Table).await?);
        copies.table =
            Some((usize::try_from(self.mapping.l1_index(last)).unwrap_or(usize::MAX), place));
        Ok(copies)
    }

    /// Writes a copy of the cluster in which a disk of `size` bytes ends, with zeroes behind the end. Makes no copy if the
    /// cluster reads as zeroes there. A data file is truncated instead.
    async fn copy_truncated_cluster(&self, size: u64) -> Result<Option<(u64, Counted<'_>)>> {
        let (start, end) = (self.geometry.cluster_start(size), self.geometry.cluster_end(size));
        if size == end || self.geometry.data_file || self.reads_as_zero(size, end).await? {
            return Ok(None);
        }
        let len = usize::try_from(end - start).unwrap_or(0);
        let mut data = self.read_guest(start, IoBufMut::new(len)).await?;
        let rest = data.get_mut(usize::try_from(size - start).unwrap_or(0)..).unwrap_or_default();
        if oxblk_ring::is_zero(rest) {
            return Ok(None);
        }
        rest.fill(0);
        let mut run = self.clusters.reserve(1).await?;
        run.begin_write();
        let cluster = run.start();
        self.data.write_data(start, cluster << self.geometry.cluster_bits, data.freeze()).await?;
        Ok(Some((cluster, self.clusters.count(run, ReleaseReason::CutOff).await?)))
    }

    /// Truncates a raw data file to the size that is already in the header.
    ///
    /// # Errors
    /// The errors of truncating the data file. An error of the flush is only logged: the data is lost already, so the header
    /// must not get the old size back. After a power cut, the data file may then be longer than the disk. The next growth
    /// zeroes the added part.
    async fn shrink_raw_data(&self, size: u64) -> Result<()> {
        let Some(data) = self
            .image_state
            .children()
            .get(ChildIdx::DATA)
            .filter(|_| self.image_state.has_raw_data())
        else {
            return Ok(());
        };
        data.resize(size, Preallocation::Off).await?;
        if let Err(error) = data.flush().await {
            tracing::warn!("qcow2: the truncation of the data file may not be durable: {error}");
        }
        Ok(())
    }

    /// Frees the L2 table that was replaced, and the L2 tables behind the new end with the clusters that they map. Then
    /// truncates the data file and the image file.
    async fn free_removed_tables(
        &self,
        replaced: Option<L1Entry>,
        removed: &[L1Entry],
        size: u64,
    ) -> Result<()> {
        self.image_state.event(DebugEvent::L1ShrinkFreeL2Clusters).await;
        let file = self.image_state.file()?;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let entry_size = usize::try_from(self.geometry.l2_entry_size()).unwrap_or(8);
        let table_of = |entry: &L1Entry| entry.l2_offset(self.geometry).ok().flatten();
        if let Some(table) = replaced.as_ref().and_then(table_of) {
            self.clusters.drop_clusters(
                self.geometry.cluster_index(table),
                1,
                ReleaseReason::Table,
            );
        }
        let mut outcome = Ok(());
        // The number of L1 entries that refer to a table. Each table is read once.
        let mut tables: BTreeMap<u64, u64> = BTreeMap::new();
        for table in removed.iter().filter_map(table_of) {
            let times = tables.entry(table).or_default();
            *times = times.saturating_add(1);
        }
        for (table, times) in tables {
            match file.read(table, IoBufMut::new(len)).await {
                Ok(words) => {
                    let entries: Vec<L2Entry> =
                        words.chunks_exact(entry_size).map(first_word).collect();
                    self.clusters.drop_entries_of(&entries, times, ReleaseReason::CutOff);
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
            let cluster = self.geometry.cluster_index(table);
            self.clusters.drop_references(cluster, 1, times, ReleaseReason::Table);
            self.metadata.write_back_if_needed().await?;
        }
        // The first cycle lowers refcounts, the second writes them.
        self.metadata.write_back(true).await?;
        self.metadata.write_back(true).await?;
        if let Some(data) = self.image_state.children().get(ChildIdx::DATA)
            && data.size() > size
        {
            data.resize(size, Preallocation::Off).await?;
        }
        outcome.and(self.clusters.trim_file().await)
    }

    async fn shrink_in_place(&self, old: u64, size: u64) -> Result<()> {
        // Only this step may need free space.
        let last = if self.geometry.data_file { old } else { u64::MAX };
        self.zero_if_needed(size, self.geometry.cluster_end(size).min(last)).await?;
        self.clear_guest(self.geometry.cluster_end(size), self.geometry.cluster_end(old)).await?;
        // The first cycle lowers refcounts, the second writes them.
        self.metadata.write_back(true).await?;
        self.metadata.write_back(true).await?;
        let in_header = self.image_state.size_in_header();
        self.write_size(size).await?;
        if let Err(error) = self.shrink_raw_data(size).await {
            stop_on_failure(self.write_size(in_header), self.image_state.disabled()).await?;
            return Err(error);
        }
        let kept = self.geometry.l1_entries_for(size).unwrap_or(u64::MAX);
        let removed: Vec<L1Entry> =
            (kept..self.mapping.l1_entries()).map(|at| self.mapping.l1_entry(at)).collect();
        (kept..self.mapping.l1_entries())
            .for_each(|at| self.mapping.set_l1_entry(at, L1Entry::EMPTY));
        self.mapping.clear();
        if let Err(error) = self.free_removed_tables(None, &removed, size).await {
            tracing::warn!(
                "qcow2: clusters behind the new end of the disk could not be freed: {error}"
            );
        }
        Ok(())
    }

    /// Makes a part of one cluster read as zeroes. Writes nothing if this part reads as zeroes already.
    pub(super) async fn zero_if_needed(&self, from: u64, to: u64) -> Result<()> {
        if from >= to || self.reads_as_zero(from, to).await? {
            return Ok(());
        }
        let len = usize::try_from(to - from).unwrap_or(0);
        if oxblk_ring::is_zero(&self.read_guest(from, IoBufMut::new(len)).await?) {
            return Ok(());
        }
        self.write_guest(from, IoBuf::zeroes(len)).await
    }

    /// Writes the new size to the header, then sets the size in memory and in the bitmaps.
    pub(super) async fn write_size(&self, size: u64) -> Result<()> {
        let (before, after) = (self.image_state.size_in_header().to_be_bytes(), size.to_be_bytes());
        self.image_state.exchange_header_field(field_offsets::SIZE, &before, &after).await?;
        self.image_state.set_size(size);
        self.bitmaps.resize_bitmaps(size);
        Ok(())
    }
}

/// The first word of an L2 entry: the word with the host offset.
fn first_word(entry: &[u8]) -> L2Entry {
    let word = entry.first_chunk().map_or(0, |word| u64::from_be_bytes(*word));
    L2Entry(word)
}
