//! Zero clusters of snapshots, replaced for an image that becomes one of version 2.
//!
//! A snapshot gets an L1 table of its own, with new L2 tables in the place of those that have zero clusters. Then the
//! snapshot table that names it takes the place of the old one, as with any change of snapshots. L2 tables that
//! snapshots share are replaced by ones that they share.

use std::collections::BTreeMap;

use futures_util::stream::StreamExt as _;
use oxblk_core::{ChildIdx, Error, Result, WriteFlags, ZeroFlags};

use super::super::Qcow2;
use super::super::allocator::Reserved;
use super::super::layout::{CryptMethod, L1Entry, L2Entry, L2Kind, Snapshot};
use super::super::write_back::ReleaseReason;
use super::references::Pass;

/// L2 tables that have been replaced: from where, to where.
type Replaced = BTreeMap<u64, u64>;

impl Qcow2 {
    /// Whether all snapshots can be told of in version 2, with a disk of `size` bytes.
    pub(in super::super) async fn snapshots_fit_version_2(&self, size: u64) -> Result<bool> {
        let list = self.snapshot_list().await?;
        Ok(list.iter().all(|snapshot| {
            snapshot.size.is_none_or(|own| own == size)
                && u32::try_from(snapshot.vm_state_size).is_ok()
        }))
    }

    /// Leaves no zero cluster in any snapshot: they become data if a backing file could show through, else nothing.
    pub(in super::super) async fn expand_snapshots(&self, over_backing: bool) -> Result<()> {
        let mut list = self.snapshot_list().await?;
        let mut to_do = Vec::new();
        for (index, snapshot) in list.iter().enumerate() {
            snapshot.check_l1(self.geometry)?;
            let l1 = self.read_inactive_l1(snapshot.l1_offset, snapshot.l1_entries).await?;
            if self.has_zero_clusters(&l1).await? {
                to_do.push((index, l1));
            }
        }
        if to_do.is_empty() {
            return Ok(());
        }
        if over_backing && self.header().crypt_method != CryptMethod::None {
            return Err(Error::unsupported(
                "Cannot downgrade an encrypted image with zero clusters in its snapshots",
            ));
        }
        let mut replaced = Replaced::new();
        for (index, l1) in to_do {
            self.expand_snapshot(&mut list, index, &l1, over_backing, &mut replaced).await?;
        }
        Ok(())
    }

    async fn has_zero_clusters(&self, l1: &[L1Entry]) -> Result<bool> {
        let mut tables = Box::pin(self.l2_tables(l1));
        while let Some(table) = tables.next().await {
            let (_, _, entries) = table?;
            if entries.iter().any(|entry| self.is_zero_cluster(*entry)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_zero_cluster(&self, entry: L2Entry) -> bool {
        matches!(entry.kind(self.geometry, self.version), Ok(L2Kind::Zero { .. }))
    }

    async fn expand_snapshot(
        &self,
        list: &mut [Snapshot],
        index: usize,
        old: &[L1Entry],
        over_backing: bool,
        replaced: &mut Replaced,
    ) -> Result<()> {
        let (l1, held) = self.without_zero_clusters(old, over_backing, replaced).await?;
        let mut new = Vec::new();
        for run in held {
            // There has to be a place for their refcounts; what is counted here is taken back below.
            self.refcounts.add(run.start(), 1).await?;
            new.push(run.start());
            run.keep();
        }
        self.write_back(true).await?;
        let (reach, left) =
            (self.reach(&l1, Pass::Share).await?, self.reach(old, Pass::Leave).await?);
        self.children.require(ChildIdx::FILE)?.flush().await?;
        self.raise_reach(&reach).await?;
        for cluster in new {
            self.drop_clusters(cluster, 1, ReleaseReason::Data);
        }
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let offset = match self.store_table(bytes).await {
            Ok(offset) => offset,
            Err(error) => return Err(self.undo_raise(&reach, error).await),
        };
        let Some(snapshot) = list.get_mut(index) else { return Ok(()) };
        let old_offset = std::mem::replace(&mut snapshot.l1_offset, offset);
        if let Err(error) = self.store_snapshots(list).await {
            self.drop_l1_clusters(l1.len(), offset);
            return Err(self.undo_raise(&reach, error).await);
        }
        self.lower_reach(&left).await?;
        self.drop_l1_clusters(old.len(), old_offset);
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        self.write_back(true).await
    }

    /// An L1 table that shows the same without zero clusters. What it needs is written and not counted yet.
    async fn without_zero_clusters<'a>(
        &'a self,
        old: &[L1Entry],
        over_backing: bool,
        replaced: &mut Replaced,
    ) -> Result<(Vec<L1Entry>, Vec<Reserved<'a>>)> {
        let bits = self.geometry.cluster_bits;
        let file = self.children.require(ChildIdx::FILE)?;
        let mut held = Vec::new();
        let mut l1: Vec<L1Entry> = old.to_vec();
        let mut tables = Box::pin(self.l2_tables(old));
        while let Some(table) = tables.next().await {
            let (index, offset, mut entries) = table?;
            let Some(entry) = usize::try_from(index).ok().and_then(|at| l1.get_mut(at)) else {
                continue;
            };
            let place = match replaced.get(&offset) {
                Some(place) => *place,
                None if !entries.iter().any(|entry| self.is_zero_cluster(*entry)) => continue,
                None => {
                    for entry in &mut entries {
                        if self.is_zero_cluster(*entry) {
                            *entry = L2Entry::EMPTY;
                            if over_backing {
                                let data = self.zero_data_cluster(&mut held).await?;
                                *entry = L2Entry::data(data << bits).with_copied(false);
                            }
                        }
                    }
                    let mut run = self.refcounts.reserve_contiguous(1).await?;
                    run.begin_write();
                    let place = run.start() << bits;
                    held.push(run);
                    let bytes: Vec<u8> =
                        entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
                    file.write(place, bytes.into(), WriteFlags::empty()).await?;
                    replaced.insert(offset, place);
                    place
                }
            };
            *entry = L1Entry(place);
        }
        Ok((l1, held))
    }

    async fn zero_data_cluster<'a>(&'a self, held: &mut Vec<Reserved<'a>>) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let mut run = self.refcounts.reserve_contiguous(1).await?;
        run.begin_write();
        let cluster = run.start();
        let file = self.children.require(ChildIdx::FILE)?;
        file.write_zeroes(cluster << self.geometry.cluster_bits, size, ZeroFlags::empty()).await?;
        held.push(run);
        Ok(cluster)
    }
}
