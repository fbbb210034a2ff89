//! Taking, applying and removing a snapshot.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Error, ErrorKind, Result};

use super::super::Qcow2;
use super::super::layout::{L1Entry, Snapshot, field_offsets};
use super::copied::Claim;

impl Qcow2 {
    /// Takes a snapshot: a copy of the L1 table, which refers to everything that the active one does.
    pub(super) async fn take_snapshot(&self, new: &SnapshotInfo) -> Result<()> {
        self.check_writable()?;
        self.check_counts_data()?;
        self.write_back(true).await?;
        let mut list = self.snapshot_list().await?;
        self.set_dirty(true).await?;
        self.claim(Claim::Nothing).await?;
        let l1 = self.active_l1();
        let outcome = match self.raise(&l1).await {
            Ok(()) => self.store_new(&mut list, new, &l1).await,
            Err(error) => Err(error),
        };
        self.settle(outcome).await
    }

    async fn store_new(
        &self,
        list: &mut Vec<Snapshot>,
        new: &SnapshotInfo,
        l1: &[L1Entry],
    ) -> Result<()> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let l1_offset = match bytes.is_empty() {
            true => 0,
            false => match self.store_table(bytes).await {
                Ok(offset) => offset,
                Err(error) => return self.drop_reach(l1).await.and(Err(error)),
            },
        };
        list.push(self.entry(list, new, l1_offset, l1.len()));
        let stored = self.store_snapshots(list).await;
        if stored.is_err() {
            // The references that nothing came to hold.
            return self.drop_l1(l1, l1_offset).await.and(stored);
        }
        stored
    }

    fn entry(
        &self,
        list: &[Snapshot],
        new: &SnapshotInfo,
        l1_offset: u64,
        l1_entries: usize,
    ) -> Snapshot {
        let highest = list.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max();
        let mut extra = [new.vm_state_size, self.size()].map(u64::to_be_bytes).concat();
        extra.extend(new.icount.unwrap_or(0).to_be_bytes());
        Snapshot {
            l1_offset,
            l1_entries: u32::try_from(l1_entries).unwrap_or(u32::MAX),
            id: highest.unwrap_or(0).saturating_add(1).to_string(),
            name: new.name.clone(),
            date: new.date,
            vm_clock: new.vm_clock,
            vm_state_size: new.vm_state_size,
            size: Some(self.size()),
            extra,
        }
    }

    /// Clusters can be shared only where they are counted.
    fn check_counts_data(&self) -> Result<()> {
        if self.geometry.data_file { Err(Error::from_errno(95)) } else { Ok(()) }
    }

    /// Makes the active state what a snapshot is.
    pub(super) async fn go_to_snapshot(&self, id: &str) -> Result<()> {
        self.check_writable()?;
        self.check_counts_data()?;
        self.write_back(true).await?;
        let snapshot = find(self.snapshot_list().await?, id)?.1;
        snapshot.check_l1(self.geometry)?;
        let size = snapshot.size.unwrap_or_else(|| self.size());
        let mut l1 = self.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        let needed = self.geometry.l1_entries_for(size).and_then(|n| usize::try_from(n).ok());
        let needed = needed.ok_or_else(|| Error::from_errno(27))?;
        if needed > l1.len() {
            l1.resize(needed, L1Entry::EMPTY);
        }
        self.set_dirty(true).await?;
        let outcome = match self.raise(&l1).await {
            Ok(()) => self.activate(&l1, size).await,
            Err(error) => Err(error),
        };
        self.settle(outcome).await
    }

    /// Makes `l1`, whose references are counted, the active L1 table, and gives the old one up.
    async fn activate(&self, l1: &[L1Entry], size: u64) -> Result<()> {
        let old = (self.active_l1(), self.l1_offset.load(Acquire));
        // Entries of a snapshot may claim anything.
        let entry = |entry: &L1Entry| L1Entry(entry.0 & !(1 << 63));
        let bytes: Vec<u8> = l1.iter().flat_map(|word| entry(word).0.to_be_bytes()).collect();
        let offset = match self.store_table(bytes).await {
            Ok(offset) => offset,
            Err(error) => return self.drop_reach(l1).await.and(Err(error)),
        };
        let entries = u32::try_from(l1.len()).map_err(|_| Error::from_errno(27))?;
        // Size, encryption, L1 entries and L1 offset lie side by side, within one sector.
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(0_u32.to_be_bytes());
        fields.extend(entries.to_be_bytes());
        fields.extend(offset.to_be_bytes());
        self.write_header_field(field_offsets::SIZE, &fields).await?;
        self.l2.clear();
        for (index, word) in (0_u64..).zip(l1) {
            self.l1.get_or_make(index).store(entry(word).0, Release);
        }
        for index in u64::try_from(l1.len()).unwrap_or(0)..self.l1_entries() {
            self.l1.get_or_make(index).store(0, Release);
        }
        self.l1_offset.store(offset, Release);
        self.l1_entries.store(entries.into(), Release);
        self.size.store(size, Release);
        for table in l1.iter().filter_map(|entry| entry.l2_offset(self.geometry).ok().flatten()) {
            self.refcounts.allocator.note_metadata(table, self.geometry.cluster_size());
        }
        self.drop_l1(&old.0, old.1).await
    }

    /// Removes a snapshot.
    pub(super) async fn remove_snapshot(&self, id: &str) -> Result<()> {
        self.check_writable()?;
        self.check_counts_data()?;
        self.write_back(true).await?;
        let mut list = self.snapshot_list().await?;
        let (index, snapshot) = find(list.clone(), id)?;
        snapshot.check_l1(self.geometry)?;
        let l1 = self.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
        list.remove(index);
        self.set_dirty(true).await?;
        let outcome = match self.store_snapshots(&list).await {
            Ok(()) => self.drop_l1(&l1, snapshot.l1_offset).await,
            Err(error) => Err(error),
        };
        self.settle(outcome).await
    }

    /// Ends a change, whether it succeeded or not: refcounts are lowered, entries claim what is true, and the image is
    /// clean.
    async fn settle(&self, outcome: Result<()>) -> Result<()> {
        // The first cycle lowers refcounts, the second writes them.
        let settled = async {
            self.write_back(true).await?;
            self.write_back(true).await?;
            self.claim(Claim::Truth).await?;
            self.set_dirty(false).await
        };
        let settled = settled.await;
        outcome.and(settled)
    }
}

fn find(list: Vec<Snapshot>, id: &str) -> Result<(usize, Snapshot)> {
    let found = list.into_iter().enumerate().find(|(_, snapshot)| snapshot.id == id);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "snapshot not found").errno(2))
}
