//! Moving guest data and L2 tables: copy, count the copy, change every reference, drop the original.

use std::collections::BTreeMap;

use oxblk_core::{ChildIdx, Error, Result, WriteFlags, run_all};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::Qcow2;
use super::super::allocator::Reserved;
use super::super::layout::{L1Entry, L2Kind};
use super::super::write_back::Was;
use super::sources::{EntryAt, Sources, TableAt};

/// Bytes that are copied at once.
const AT_ONCE: u64 = 4 << 20;

/// A cluster, and all entries that refer to it.
type Source = (u64, Vec<EntryAt>);

/// Guest data that is to be moved.
#[derive(Default)]
pub(super) struct DataMoves(Vec<Source>);

impl DataMoves {
    pub(super) fn clusters(&self) -> u64 {
        u64::try_from(self.0.len()).unwrap_or(u64::MAX)
    }
}

/// New words for entries of an L2 table: index, the word that is there, the word to be.
type Patches = Vec<(u64, u64, u64)>;

fn references(entries: &[EntryAt]) -> u64 {
    entries.iter().fold(0, |sum, at| sum.saturating_add(at.times))
}

impl Qcow2 {
    /// Takes those clusters from the start of the window of which every reference is known: guest data, and L2 tables.
    pub(super) async fn choose(
        &self,
        window: &[u64],
        sources: &Sources,
    ) -> Result<(DataMoves, Vec<u64>)> {
        let (mut data, mut tables) = (DataMoves::default(), Vec::new());
        for cluster in window {
            let refcount = self.refcounts.get(*cluster).await?;
            let entries = sources.entries.get(cluster);
            let places = sources.tables.get(cluster);
            match (entries, places) {
                (Some(entries), None) if references(entries) == refcount => {
                    data.0.push((*cluster, entries.clone()));
                }
                (None, Some(places)) if u64::try_from(places.len()) == Ok(refcount) => {
                    tables.push(*cluster);
                }
                _ => break,
            }
        }
        // Places are taken from the front on: what is read one after the other comes to lie so.
        data.0.sort_by_key(|(_, entries)| entries.first().map(|at| at.guest));
        Ok((data, tables))
    }

    /// A free cluster in front of `cluster`.
    async fn reserve_below(&self, cluster: u64) -> Result<Option<Reserved<'_>>> {
        let run = self.reserve(1).await?;
        if run.start() < cluster {
            return Ok(Some(run));
        }
        run.give_back();
        Ok(None)
    }

    /// Moves data clusters, and gives how many found a place in front of theirs.
    pub(super) async fn move_data(&self, moves: &DataMoves) -> Result<u64> {
        let at_once = usize::try_from(AT_ONCE / self.geometry.cluster_size()).unwrap_or(1).max(1);
        let mut placed: Vec<(&Source, u64)> = Vec::new();
        'batches: for batch in moves.0.chunks(at_once) {
            let mut runs = Vec::new();
            for source in batch {
                match self.reserve_below(source.0).await? {
                    Some(run) => runs.push((source, run)),
                    None => break,
                }
            }
            let complete = runs.len() == batch.len();
            run_all(runs.iter_mut().map(|(source, run)| self.copy_data(source, run))).await?;
            for (source, run) in runs {
                for _ in 0..references(&source.1) {
                    self.refcounts.add(run.start(), 1).await?;
                }
                placed.push((source, run.start()));
                run.keep();
            }
            if !complete {
                break 'batches;
            }
        }
        let file = self.children.require(ChildIdx::FILE)?;
        self.refcounts.write_back().await?;
        file.flush().await?;
        self.patch_tables(&placed).await?;
        file.flush().await?;
        for ((cluster, entries), _) in &placed {
            for _ in 0..references(entries) {
                self.drop_clusters(*cluster, 1, Was::Discarded);
            }
        }
        Ok(u64::try_from(placed.len()).unwrap_or(u64::MAX))
    }

    async fn copy_data(&self, source: &Source, run: &mut Reserved<'_>) -> Result<()> {
        let (cluster, entries) = source;
        let Some(first) = entries.first() else { return Ok(()) };
        if let Ok(L2Kind::Zero { .. }) = first.entry.kind(self.geometry, self.version) {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let data = self.read_data(first.guest, cluster << bits, IoBufMut::new(len)).await?;
        run.begin_write();
        self.write_data(first.guest, run.start() << bits, data.freeze()).await
    }

    /// Has the entries refer to the new places, on disk.
    async fn patch_tables(&self, placed: &[(&Source, u64)]) -> Result<()> {
        let mut patches: BTreeMap<u64, Patches> = BTreeMap::new();
        for ((_, entries), new) in placed {
            for at in entries {
                let moved = at.entry.moved_to(new << self.geometry.cluster_bits);
                patches.entry(at.table).or_default().push((at.index, at.entry.0, moved.0));
            }
        }
        let mut writes = patches.into_iter().map(|(table, patches)| self.patch(table, patches));
        loop {
            let some: Vec<_> = writes.by_ref().take(16).collect();
            if some.is_empty() {
                return Ok(());
            }
            run_all(some).await?;
        }
    }

    async fn patch(&self, table: u64, patches: Patches) -> Result<()> {
        let file = self.children.require(ChildIdx::FILE)?;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let size = self.geometry.l2_entry_size();
        let mut bytes = file.read(table, IoBufMut::new(len)).await?;
        for (index, old, new) in patches {
            let at = usize::try_from(index.saturating_mul(size)).unwrap_or(usize::MAX);
            let word = bytes.get_mut(at..at.saturating_add(8));
            match word {
                Some(word) if *word == old.to_be_bytes() => {
                    word.copy_from_slice(&new.to_be_bytes());
                }
                _ => return Err(Error::corrupt("L2 table changed meanwhile").at(table)),
            }
        }
        file.write(table, bytes.freeze(), WriteFlags::empty()).await
    }

    /// Moves L2 tables, and gives how many found a place in front of theirs.
    pub(super) async fn move_tables(&self, tables: &[u64], sources: &Sources) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let file = self.children.require(ChildIdx::FILE)?;
        let len = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let mut placed: Vec<(u64, u64, &[TableAt])> = Vec::new();
        for cluster in tables {
            let places = sources.tables.get(cluster).map_or(&[][..], Vec::as_slice);
            let Some(mut run) = self.reserve_below(*cluster).await? else { break };
            let table = file.read(cluster << bits, IoBufMut::new(len)).await?;
            run.begin_write();
            let new = run.start();
            file.write(new << bits, table.freeze(), WriteFlags::empty()).await?;
            for _ in places {
                self.refcounts.add(new, 1).await?;
            }
            run.keep();
            self.refcounts.allocator.note_metadata(new << bits, self.geometry.cluster_size());
            placed.push((*cluster, new, places));
        }
        self.refcounts.write_back().await?;
        file.flush().await?;
        for (_, new, places) in &placed {
            for at in *places {
                self.repoint(at, at.entry.moved_to(new << bits)).await?;
            }
        }
        // Slices are found by their tables' places.
        self.write_back(true).await?;
        for (cluster, _, places) in &placed {
            for _ in *places {
                self.drop_clusters(*cluster, 1, Was::Table);
            }
        }
        Ok(u64::try_from(placed.len()).unwrap_or(u64::MAX))
    }

    /// Gives an L1 entry another value.
    async fn repoint(&self, at: &TableAt, entry: L1Entry) -> Result<()> {
        let Some(l1) = at.l1 else {
            self.set_l1_entry(at.index, entry);
            return Ok(());
        };
        let place = l1.saturating_add(at.index.saturating_mul(8));
        let word = IoBuf::from(entry.0.to_be_bytes().to_vec());
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(place, word, WriteFlags::empty()).await
    }
}
