//! Choosing the clusters that move, and moving guest data and L2 tables.
//!
//! Each move copies the cluster, raises the refcount of the copy, changes every reference, and then drops the references
//! to the original.

use oxblk_core::{Result, WriteFlags, run_all};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::clusters::Counted;
use super::super::clusters::ReleaseReason;
use super::super::clusters::Reserved;
use super::super::layout::{L1Entry, L2Kind};
use super::Compaction;
use super::changes::Changes;
use super::referrers::{EntryAt, Referrers, TableAt, references};

/// Maximum number of bytes that are copied in one batch.
const AT_ONCE: u64 = 4 << 20;

/// A cluster, and all entries that refer to it.
type Source = (u64, Vec<EntryAt>);

/// The clusters of a window that can move, because every reference to these clusters is known.
#[derive(Default)]
pub(super) struct Chosen {
    /// Guest data, in the order of the new locations.
    data: Vec<Source>,
    /// Clusters with compressed data, last first.
    pub(super) packed: Vec<u64>,
    /// Clusters of L2 tables, last first.
    pub(super) tables: Vec<u64>,
}

impl Chosen {
    /// Removes the guest data and the L2 tables that do not lie behind the cluster `stays`.
    pub(super) fn keep_behind(&mut self, stays: u64) {
        self.data.retain(|(cluster, _)| *cluster > stays);
        self.tables.retain(|cluster| *cluster > stays);
    }
}

impl Compaction<'_> {
    /// Chooses the clusters that can move. Begins with the last cluster of the file, and stops at the first cluster with
    /// unknown references.
    pub(super) async fn choose(&self, referrers: &mut Referrers) -> Result<Chosen> {
        let mut chosen = Chosen::default();
        for cluster in &referrers.window {
            let refcount = self.clusters.get(*cluster).await?;
            let entries = referrers.entries.get(cluster).map_or(0, |entries| references(entries));
            let tables = referrers.tables.get(cluster).map_or(0, Vec::len);
            let packed = referrers.shared.get(cluster).copied().unwrap_or(0);
            let tables = u64::try_from(tables).unwrap_or(u64::MAX);
            match (entries, tables, packed) {
                (1.., 0, 0) if entries == refcount => {
                    let entries = referrers.entries.remove(cluster).unwrap_or_default();
                    chosen.data.push((*cluster, entries));
                }
                (0, 1.., 0) if tables == refcount => chosen.tables.push(*cluster),
                (0, 0, 1..) if packed == refcount => chosen.packed.push(*cluster),
                _ => break,
            }
        }
        // Free clusters are taken in ascending order. So data that is adjacent on the guest's disk usually becomes adjacent in
        // the file.
        chosen.data.sort_by_key(|(_, entries)| entries.first().map(|at| at.guest));
        Ok(chosen)
    }

    /// Reserves a free cluster in front of `cluster`. Returns `None` if there is none.
    async fn reserve_below(&self, cluster: u64) -> Result<Option<Reserved<'_>>> {
        self.clusters.rewind();
        let run = self.clusters.reserve(1).await?;
        if run.start() < cluster {
            return Ok(Some(run));
        }
        run.give_back();
        Ok(None)
    }

    /// Copies data clusters to lower clusters until no free lower cluster is left. Returns whether all clusters were copied.
    pub(super) async fn move_data<'a>(
        &'a self,
        chosen: &Chosen,
        changes: &mut Changes<'a>,
    ) -> Result<bool> {
        let bits = self.geometry.cluster_bits;
        let at_once = usize::try_from(AT_ONCE / self.geometry.cluster_size()).unwrap_or(1).max(1);
        for batch in chosen.data.chunks(at_once) {
            let mut runs = Vec::new();
            for source in batch {
                match self.reserve_below(source.0).await? {
                    Some(run) => runs.push((source, run)),
                    None => break,
                }
            }
            let complete = runs.len() == batch.len();
            run_all(runs.iter_mut().map(|(source, run)| self.copy_data(source, run))).await?;
            for ((cluster, entries), run) in runs {
                let new = run.start();
                let more = references(entries).saturating_sub(1);
                changes.own_references(self.clusters.count(run, ReleaseReason::Data).await?);
                changes.own_references(
                    self.clusters.count_again(new, more, ReleaseReason::Data).await?,
                );
                changes.add_moved(entries, new << bits, *cluster);
            }
            if !complete {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn copy_data(&self, source: &Source, run: &mut Reserved<'_>) -> Result<()> {
        let (cluster, entries) = source;
        // If all entries have the zero flag, there is nothing to copy. If any entry reads the data, the data must be copied.
        let reads = |at: &&EntryAt| {
            let kind = at.entry.kind(self.geometry, self.image_state.version());
            !matches!(kind, Ok(L2Kind::Zero { .. }))
        };
        let Some(first) = entries.iter().find(reads) else { return Ok(()) };
        let bits = self.geometry.cluster_bits;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let data = self.data.read_data(first.guest, cluster << bits, IoBufMut::new(len)).await?;
        run.begin_write();
        self.data.write_data(first.guest, run.start() << bits, data.freeze()).await
    }

    /// Moves L2 tables to lower clusters until no free lower cluster is left. Returns the number of tables that moved.
    pub(super) async fn move_tables(&self, tables: &[u64], referrers: &Referrers) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let file = self.image_state.file()?;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut placed: Vec<(u64, u64, &[TableAt])> = Vec::new();
        let mut counted = Vec::new();
        for cluster in tables {
            let places = referrers.tables.get(cluster).map_or(&[][..], Vec::as_slice);
            let Some(mut run) = self.reserve_below(*cluster).await? else { break };
            let table = file.read(cluster << bits, IoBufMut::new(len)).await?;
            run.begin_write();
            let new = run.start();
            file.write(new << bits, table.freeze(), WriteFlags::empty()).await?;
            let more = u64::try_from(places.len()).unwrap_or(0).saturating_sub(1);
            let first = self.clusters.count(run, ReleaseReason::Table).await?;
            let rest = self.clusters.count_again(new, more, ReleaseReason::Table).await?;
            counted.push([first, rest]);
            self.clusters.note_metadata(new << bits, self.geometry.cluster_size());
            placed.push((*cluster, new, places));
        }
        self.clusters.write_back_refcounts().await?;
        file.flush().await?;
        for ((_, new, places), counted) in placed.iter().zip(counted) {
            // From here on, an entry on disk may refer to the copy, even if the write of the entry fails.
            counted.into_iter().for_each(Counted::keep);
            for at in *places {
                self.replace_l1_entry(at, at.entry.moved_to(new << bits)).await?;
            }
        }
        // Write and flush the new L1 entries before the references to the old tables are dropped.
        self.metadata.write_back(true).await?;
        for (cluster, _, places) in &placed {
            let times = u64::try_from(places.len()).unwrap_or(u64::MAX);
            self.clusters.drop_references(*cluster, 1, times, ReleaseReason::Table);
        }
        Ok(u64::try_from(placed.len()).unwrap_or(u64::MAX))
    }

    /// Replaces an L1 entry, in memory for the active table and on disk for a snapshot.
    async fn replace_l1_entry(&self, at: &TableAt, entry: L1Entry) -> Result<()> {
        let Some(l1) = at.l1 else {
            self.mapping.set_l1_entry(at.index, entry);
            return Ok(());
        };
        let place = l1.saturating_add(at.index.saturating_mul(8));
        let word = IoBuf::from(entry.0.to_be_bytes().to_vec());
        let file = self.image_state.file()?;
        file.write(place, word, WriteFlags::empty()).await
    }
}
