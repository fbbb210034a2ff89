//! Creating, applying and deleting a snapshot.
//!
//! Each operation has three steps. First, it raises the refcounts of all clusters that gain a reference. Second, one write
//! to the header, or to one sector of the L1 table, makes the change effective. Third, it lowers the refcounts of all
//! clusters that lost a reference. In images of version 3, the dirty bit is set during the operation. So after a crash, the
//! image is repaired when it is opened for writing next.

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Errno, Error, ErrorKind, Result};

use super::super::layout::{L1Entry, Snapshot, field_offsets};
use super::super::metadata::Metadata;
use super::ImageSnapshots;
use super::copied::Unshared;
use super::references::{CountPurpose, Reachable};

/// Number of bytes that a disk writes atomically.
const SECTOR: usize = 512;

/// Guard of a change in progress. If the future of the change is dropped before the change ends, the image stays dirty and
/// is repaired when it is opened for writing next.
struct UnfinishedChange<'a>(Option<&'a Metadata>);

impl UnfinishedChange<'_> {
    fn end<T>(mut self, outcome: T) -> T {
        self.0 = None;
        outcome
    }
}

impl Drop for UnfinishedChange<'_> {
    fn drop(&mut self) {
        if let Some(metadata) = self.0 {
            metadata.set_unfinished();
        }
    }
}

impl ImageSnapshots {
    /// Creates a snapshot: a copy of the active L1 table that refers to the same L2 tables.
    pub(in crate::qcow2) async fn take_snapshot(&self, new: &SnapshotInfo) -> Result<()> {
        self.image_state.check_writable()?;
        self.check_counts_data()?;
        self.metadata.write_back(true).await?;
        let list = self.metadata.snapshot_list().await?;
        self.metadata.set_dirty(true).await?;
        let unfinished = UnfinishedChange(Some(&self.metadata));
        let outcome = self.snapshot_active_state(list, new).await;
        // All clusters that the active L1 table reaches are shared now, so no entry needs the copied flag.
        unfinished.end(self.finish_change(outcome, Unshared::default()).await)
    }

    async fn snapshot_active_state(
        &self,
        mut list: Vec<Snapshot>,
        new: &SnapshotInfo,
    ) -> Result<()> {
        let reachable =
            self.count_reachable(&self.mapping.active_l1(), CountPurpose::Raise).await?;
        self.clear_l1_copied_flags().await?;
        self.raise_reachable(&reachable).await?;
        let l1 = self.mapping.active_l1();
        self.store_new(&mut list, new, &l1, &reachable).await?;
        if new.vm_state_size > 0
            // Only the snapshot needs the VM state. If the active L1 table still mapped the VM state, the next snapshot
            // would contain it too.
            && let Err(error) = self.free_vm_state().await
        {
            tracing::warn!("qcow2: the active VM state could not be freed: {error}");
        }
        Ok(())
    }

    async fn store_new(
        &self,
        list: &mut Vec<Snapshot>,
        new: &SnapshotInfo,
        l1: &[L1Entry],
        reachable: &Reachable,
    ) -> Result<()> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let l1_offset = match bytes.is_empty() {
            true => 0,
            false => match self.metadata.store_table(bytes).await {
                Ok(offset) => offset,
                Err(error) => return Err(self.undo_raise(reachable, error).await),
            },
        };
        list.push(self.entry(list, new, l1_offset, l1.len()));
        match self.metadata.store_snapshots(list).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.clusters.drop_l1_clusters(l1.len(), l1_offset);
                Err(self.undo_raise(reachable, error).await)
            }
        }
    }

    /// Lowers the refcounts that were raised for new references, because these references were not written. Returns
    /// `error`, the reason. If a refcount cannot be lowered, its cluster leaks.
    pub(super) async fn undo_raise(&self, reachable: &Reachable, error: Error) -> Error {
        // If it is unknown to which table the header refers, the references may exist.
        if self.image_state.check_usable().is_ok()
            && let Err(failed) = self.lower_reachable(reachable).await
        {
            tracing::warn!("qcow2: clusters leak: {failed}");
        }
        error
    }

    fn entry(
        &self,
        list: &[Snapshot],
        new: &SnapshotInfo,
        l1_offset: u64,
        l1_entries: usize,
    ) -> Snapshot {
        let highest = list.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max();
        let mut extra = [new.vm_state_size, self.image_state.size()].map(u64::to_be_bytes).concat();
        extra.extend(new.icount.unwrap_or(0).to_be_bytes());
        Snapshot {
            l1_offset,
            l1_entries: u32::try_from(l1_entries).unwrap_or(u32::MAX),
            id: highest.unwrap_or(0).saturating_add(1).to_string(),
            name: new.name.clone(),
            date: new.date,
            vm_clock: new.vm_clock,
            vm_state_size: new.vm_state_size,
            size: Some(self.image_state.size()),
            extra,
        }
    }

    /// Refuses images with a data file: clusters of a data file have no refcounts, so snapshots cannot share them.
    fn check_counts_data(&self) -> Result<()> {
        if self.geometry.data_file { Err(Error::from_errno(Errno::OPNOTSUPP)) } else { Ok(()) }
    }

    /// Applies a snapshot: a copy of its L1 table becomes the active L1 table.
    pub(in crate::qcow2) async fn apply_snapshot(&self, id: &str) -> Result<()> {
        self.image_state.check_writable()?;
        self.check_counts_data()?;
        self.metadata.write_back(true).await?;
        let snapshot = find(self.metadata.snapshot_list().await?, id)?.1;
        snapshot.check_l1(self.geometry)?;
        let size = snapshot.size.unwrap_or_else(|| self.image_state.size());
        if size != self.image_state.size() {
            self.bitmaps.check_usable_bitmaps_can_resize(size)?;
        }
        let mut l1 =
            self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        let needed = self.geometry.l1_entries_for(size).and_then(|n| usize::try_from(n).ok());
        let needed = needed.ok_or_else(|| Error::from_errno(Errno::FBIG))?;
        if needed > l1.len() {
            l1.resize(needed, L1Entry::EMPTY);
        }
        self.metadata.set_dirty(true).await?;
        let unfinished = UnfinishedChange(Some(&self.metadata));
        let outcome = self.activate_snapshot(&l1, size).await;
        // The snapshot still refers to all clusters that the active L1 table reaches, so no entry needs the copied flag.
        unfinished.end(self.finish_change(outcome, Unshared::default()).await)
    }

    async fn activate_snapshot(&self, l1: &[L1Entry], size: u64) -> Result<()> {
        let reachable = self.count_reachable(l1, CountPurpose::Raise).await?;
        self.image_state.file()?.flush().await?;
        self.raise_reachable(&reachable).await?;
        self.activate(l1, size, &reachable).await
    }

    /// Makes an empty L1 table of `entries` entries the active L1 table, and drops the references of the old table. The
    /// caller ensures that the node is drained and that no metadata is dirty.
    pub(in crate::qcow2) async fn activate_empty_l1(&self, entries: usize) -> Result<()> {
        let l1 = vec![L1Entry::EMPTY; entries];
        let nothing = self.count_reachable(&l1, CountPurpose::Drop).await?;
        self.activate(&l1, self.image_state.size(), &nothing).await
    }

    /// Makes `l1` the active L1 table, and drops the references of the old table. The refcounts already include the
    /// references of `l1`.
    async fn activate(&self, l1: &[L1Entry], size: u64, reachable: &Reachable) -> Result<()> {
        let old = (self.mapping.active_l1(), self.mapping.l1_offset());
        // The copied flags of a snapshot are not reliable, so they are cleared.
        let entry = |entry: &L1Entry| L1Entry(entry.0 & !(1 << 63));
        let bytes: Vec<u8> = l1.iter().flat_map(|word| entry(word).0.to_be_bytes()).collect();
        let entries = u32::try_from(l1.len()).map_err(|_| Error::from_errno(Errno::FBIG))?;
        let offset = match self.write_and_activate_l1(&old, &bytes, size).await {
            Ok(offset) => offset,
            Err(error) => return Err(self.undo_raise(reachable, error).await),
        };
        self.mapping.replace_l1(l1.iter().map(entry), offset, entries.into());
        self.image_state.set_size(size);
        self.bitmaps.resize_bitmaps(size);
        for table in l1.iter().filter_map(|entry| entry.l2_offset(self.geometry).ok().flatten()) {
            self.clusters.note_metadata(table, self.geometry.cluster_size());
        }
        // The new table is active. If dropping the old references fails, clusters are leaked.
        let dropped = match offset == old.1 {
            true => self.drop_reachable(&old.0).await,
            false => self.drop_l1(&old.0, old.1).await.map(drop),
        };
        if let Err(error) = dropped {
            self.note_leaks(&error);
        }
        Ok(())
    }

    /// Writes an L1 table with these bytes. Then changes the header, so that it refers to this table instead of the `old`
    /// table, and contains the disk size `size`. Returns the offset of the table. If there is no free space for a new
    /// table, the old table is overwritten if that is safe.
    async fn write_and_activate_l1(
        &self,
        old: &(Vec<L1Entry>, u64),
        bytes: &[u8],
        size: u64,
    ) -> Result<u64> {
        let offset = match self.metadata.store_table(bytes.to_vec()).await {
            Ok(offset) => offset,
            Err(error) if error.kind() == ErrorKind::NoSpace && size == self.image_state.size() => {
                return self.overwrite_l1(old, bytes, error).await;
            }
            Err(error) => return Err(error),
        };
        let count = |len: usize| u32::try_from(len).map_err(|_| Error::from_errno(Errno::FBIG));
        let entries = bytes.len() / 8;
        let before = self.image_state.active_fields(
            self.image_state.size_in_header(),
            count(old.0.len())?,
            old.1,
        );
        let after = self.image_state.active_fields(size, count(entries)?, offset);
        let written =
            self.image_state.exchange_header_field(field_offsets::SIZE, &before, &after).await;
        if let Err(error) = written {
            self.clusters.drop_l1_clusters(entries, offset);
            return Err(error);
        }
        Ok(offset)
    }

    /// Overwrites the active L1 table with these bytes if only one of its sectors changes: after a crash, the disk has
    /// either the old table or the new one. Otherwise returns `error`.
    async fn overwrite_l1(
        &self,
        old: &(Vec<L1Entry>, u64),
        bytes: &[u8],
        error: Error,
    ) -> Result<u64> {
        let before: Vec<u8> = old.0.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let mut sectors = before.chunks(SECTOR).zip(bytes.chunks(SECTOR)).zip(0_u64..);
        let changed = sectors.find(|((before, after), _)| before != after);
        let others = sectors.any(|((before, after), _)| before != after);
        if before.len() != bytes.len() || others {
            return Err(error);
        }
        if let Some(((before, after), index)) = changed {
            let place = old.1.saturating_add(index.saturating_mul(SECTOR as u64));
            // The raised refcounts must be durable before the sector refers to their clusters.
            self.clusters.write_back_refcounts().await?;
            self.image_state.file()?.flush().await?;
            // The sector is exchanged like a header field, because it defines the contents of the disk.
            self.image_state.exchange_header_field(place, before, after).await?;
        }
        Ok(old.1)
    }

    /// Drops the references to all clusters that an old L1 table reaches, but not to the clusters of the table itself.
    async fn drop_reachable(&self, l1: &[L1Entry]) -> Result<()> {
        let reachable = self.count_reachable(l1, CountPurpose::Drop).await?;
        self.lower_reachable(&reachable).await.map(drop)
    }

    /// Deletes a snapshot.
    pub(in crate::qcow2) async fn remove_snapshot(&self, id: &str) -> Result<()> {
        self.image_state.check_writable()?;
        self.check_counts_data()?;
        self.metadata.write_back(true).await?;
        let mut list = self.metadata.snapshot_list().await?;
        let (index, snapshot) = find(list.clone(), id)?;
        snapshot.check_l1(self.geometry)?;
        let l1 = self.metadata.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        list.remove(index);
        let reachable = self.count_reachable(&l1, CountPurpose::Drop).await?;
        self.metadata.set_dirty(true).await?;
        let unfinished = UnfinishedChange(Some(&self.metadata));
        if let Err(error) = self.metadata.store_snapshots(&list).await {
            return unfinished.end(self.finish_change(Err(error), Unshared::default()).await);
        }
        // The snapshot is deleted. If dropping its references fails, clusters are leaked.
        let unshared = match self.lower_durably(&reachable).await {
            Ok(unshared) => {
                self.clusters.drop_l1_clusters(l1.len(), snapshot.l1_offset);
                unshared
            }
            Err(error) => {
                self.note_leaks(&error);
                Unshared::default()
            }
        };
        unfinished.end(self.finish_change(Ok(()), unshared).await)
    }

    async fn lower_durably(&self, reachable: &Reachable) -> Result<Unshared> {
        let unshared = self.lower_reachable(reachable).await?;
        self.image_state.file()?.flush().await?;
        Ok(Unshared::new(unshared))
    }

    /// Records that a change succeeded, but that a later step failed, so that clusters may be leaked.
    fn note_leaks(&self, error: &Error) {
        tracing::warn!("qcow2: the image needs a repair when it is opened next: {error}");
        self.metadata.set_unfinished();
    }

    /// Ends a change: lowers refcounts, corrects copied flags, and clears the dirty bit. After a success, only entries that
    /// refer to the clusters `unshared` may lack the copied flag. After a failure, any entry may lack it. If a step of this
    /// function fails, the change is still in effect, and the image stays dirty. The image is then repaired when it is
    /// opened for writing next.
    async fn finish_change(&self, outcome: Result<()>, unshared: Unshared) -> Result<()> {
        if self.image_state.check_usable().is_err() {
            // The image is corrupt, or it is unknown to which table the header refers. So the image accepts no more writes.
            return outcome;
        }
        let succeeded = outcome.is_ok();
        let finished = async {
            // The first write-back cycle lowers refcounts in memory, and the second one writes them.
            self.metadata.write_back(true).await?;
            self.metadata.write_back(true).await?;
            if succeeded {
                self.set_copied_flags(unshared).await?;
            } else {
                self.correct_copied_flags().await?;
            }
            if self.metadata.is_unfinished() {
                Ok(())
            } else {
                self.metadata.set_dirty(false).await
            }
        };
        if let Err(error) = finished.await {
            self.note_leaks(&error);
        }
        outcome
    }
}

pub(super) fn find(list: Vec<Snapshot>, id: &str) -> Result<(usize, Snapshot)> {
    let found = list.into_iter().enumerate().find(|(_, snapshot)| snapshot.id == id);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "snapshot not found").errno(Errno::NOENT))
}
