//! Taking, applying and removing a snapshot.

use std::sync::atomic::Ordering::{Acquire, Release};

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{ChildIdx, Error, ErrorKind, Result};

use super::super::Qcow2;
use super::super::layout::{L1Entry, Snapshot, field_offsets};
use super::copied::Alone;
use super::references::{Pass, Reach};

impl Qcow2 {
    /// Takes a snapshot: a copy of the L1 table, which refers to everything that the active one does.
    pub(super) async fn take_snapshot(&self, new: &SnapshotInfo) -> Result<()> {
        self.check_writable()?;
        self.check_counts_data()?;
        self.write_back(true).await?;
        let list = self.snapshot_list().await?;
        self.set_dirty(true).await?;
        let outcome = self.share_active(list, new).await;
        // Nothing is alone with its cluster any more.
        self.settle(outcome, Alone::default()).await
    }

    async fn share_active(&self, mut list: Vec<Snapshot>, new: &SnapshotInfo) -> Result<()> {
        let reach = self.reach(&self.active_l1(), Pass::Share).await?;
        self.disown_tables().await?;
        self.raise_reach(&reach).await?;
        let l1 = self.active_l1();
        self.store_new(&mut list, new, &l1, &reach).await?;
        if new.vm_state_size > 0 {
            // Nobody needs it any more but the snapshot: the next would keep and then copy it.
            self.forget_vm_state().await?;
        }
        Ok(())
    }

    async fn store_new(
        &self,
        list: &mut Vec<Snapshot>,
        new: &SnapshotInfo,
        l1: &[L1Entry],
        reach: &Reach,
    ) -> Result<()> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let l1_offset = match bytes.is_empty() {
            true => 0,
            false => match self.store_table(bytes).await {
                Ok(offset) => offset,
                Err(error) => return self.lower_reach(reach).await.and(Err(error)),
            },
        };
        list.push(self.entry(list, new, l1_offset, l1.len()));
        let stored = self.store_snapshots(list).await;
        if stored.is_err() {
            // The references that nothing came to hold.
            self.lower_reach(reach).await?;
            self.drop_l1_clusters(l1.len(), l1_offset);
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
        let outcome = self.share_snapshot(&l1, size).await;
        // The snapshot goes on referring to all that is active now.
        self.settle(outcome, Alone::default()).await
    }

    async fn share_snapshot(&self, l1: &[L1Entry], size: u64) -> Result<()> {
        let reach = self.reach(l1, Pass::Share).await?;
        self.children.require(ChildIdx::FILE)?.flush().await?;
        self.raise_reach(&reach).await?;
        self.activate(l1, size, &reach).await
    }

    /// Makes an L1 table of `entries` entries that refer to nothing the active one, and gives the old one up. Core has
    /// drained the node, and nothing is dirty.
    pub(in super::super) async fn activate_nothing(&self, entries: usize) -> Result<()> {
        let l1 = vec![L1Entry::EMPTY; entries];
        let nothing = self.reach(&l1, Pass::Leave).await?;
        self.activate(&l1, self.size(), &nothing).await
    }

    /// Makes `l1`, whose references are counted, the active L1 table, and gives the old one up.
    async fn activate(&self, l1: &[L1Entry], size: u64, reach: &Reach) -> Result<()> {
        let old = (self.active_l1(), self.l1_offset.load(Acquire));
        // Entries of a snapshot may claim anything.
        let entry = |entry: &L1Entry| L1Entry(entry.0 & !(1 << 63));
        let bytes: Vec<u8> = l1.iter().flat_map(|word| entry(word).0.to_be_bytes()).collect();
        let offset = match self.store_table(bytes).await {
            Ok(offset) => offset,
            Err(error) => return self.lower_reach(reach).await.and(Err(error)),
        };
        let entries = u32::try_from(l1.len()).map_err(|_| Error::from_errno(27))?;
        // Size, encryption, L1 entries and L1 offset lie side by side, within one sector.
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(self.header().crypt_method.number().to_be_bytes());
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
        self.drop_l1(&old.0, old.1).await.map(drop)
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
        let reach = self.reach(&l1, Pass::Leave).await?;
        self.set_dirty(true).await?;
        match self.store_without(&list, &reach).await {
            Ok(alone) => {
                self.drop_l1_clusters(l1.len(), snapshot.l1_offset);
                self.settle(Ok(()), alone).await
            }
            Err(error) => self.settle(Err(error), Alone::default()).await,
        }
    }

    async fn store_without(&self, list: &[Snapshot], reach: &Reach) -> Result<Alone> {
        self.store_snapshots(list).await?;
        let alone = self.lower_reach(reach).await?;
        self.children.require(ChildIdx::FILE)?.flush().await?;
        Ok(Alone::new(alone))
    }

    /// Ends a change: refcounts are lowered, entries claim what is true, and the image is clean. After a success only
    /// entries of clusters that are `alone` now can claim too little, after a failure any can.
    async fn settle(&self, outcome: Result<()>, alone: Alone) -> Result<()> {
        let succeeded = outcome.is_ok();
        let settled = async {
            // The first cycle lowers refcounts, the second writes them.
            self.write_back(true).await?;
            self.write_back(true).await?;
            if succeeded {
                self.claim_alone(alone).await?;
            } else {
                self.claim_truth().await?;
            }
            self.set_dirty(false).await
        };
        let settled = settled.await;
        outcome.and(settled)
    }
}

pub(super) fn find(list: Vec<Snapshot>, id: &str) -> Result<(usize, Snapshot)> {
    let found = list.into_iter().enumerate().find(|(_, snapshot)| snapshot.id == id);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "snapshot not found").errno(2))
}
