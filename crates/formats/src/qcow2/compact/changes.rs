//! Making L2 entries on disk refer to the copies of moved clusters, and dropping the references to the originals.

use std::collections::BTreeMap;

use oxblk_core::{Error, Result, WriteFlags, run_all};
use oxblk_ring::IoBufMut;

use super::super::clusters::Counted;
use super::super::clusters::ReleaseReason;
use super::super::layout::L2Entry;
use super::Compaction;
use super::referrers::{EntryAt, references};

/// Maximum number of L2 tables that are changed concurrently.
const MAX_TABLES: usize = 16;

/// New words for entries of an L2 table: index, old word, new word.
type Patches = Vec<(u64, u64, u64)>;

/// Copies that are written and have refcounts, but to which no L2 entry refers yet. If [`Changes`] is dropped, the references
/// to the copies are dropped.
#[derive(Default)]
pub(super) struct Changes<'a> {
    tables: BTreeMap<u64, Patches>,
    /// The references to the copies.
    counted: Vec<Counted<'a>>,
    /// Clusters that lose references: first cluster, number of clusters, number of references that each cluster loses.
    old: Vec<(u64, u64, u64)>,
    /// Number of clusters that become free.
    free: u64,
}

impl<'a> Changes<'a> {
    /// Takes ownership of the references to a copy, until the entries are changed.
    pub(super) fn own_references(&mut self, counted: Counted<'a>) {
        self.counted.push(counted);
    }

    /// Plans to replace these entries with `new`. After the entries are written, each of the `count` clusters from `first` on
    /// loses [`references`]`(entries)` references.
    pub(super) fn add(&mut self, entries: &[EntryAt], new: L2Entry, first: u64, count: u64) {
        for at in entries {
            self.tables.entry(at.table).or_default().push((at.index, at.entry.0, new.0));
        }
        self.old.push((first, count, references(entries)));
    }

    /// Plans to make these entries refer to the copy of `cluster` at byte offset `host`. Each entry keeps its other bits.
    pub(super) fn add_moved(&mut self, entries: &[EntryAt], host: u64, cluster: u64) {
        for at in entries {
            let moved = at.entry.moved_to(host);
            self.tables.entry(at.table).or_default().push((at.index, at.entry.0, moved.0));
        }
        self.old.push((cluster, 1, references(entries)));
        self.note_free(1);
    }

    /// Notes that `clusters` more clusters become free.
    pub(super) fn note_free(&mut self, clusters: u64) {
        self.free = self.free.saturating_add(clusters);
    }

    /// Number of clusters that become free.
    pub(super) fn free(&self) -> u64 {
        self.free
    }
}

impl Compaction<'_> {
    /// Flushes the copies and their refcounts. Then writes and flushes the L2 entries that refer to the copies. Then passes
    /// the references to the originals to the write-back. The write-back lowers the refcounts of the originals.
    pub(super) async fn write_changes(&self, changes: Changes<'_>) -> Result<()> {
        let file = self.image_state.file()?;
        self.clusters.write_back_refcounts().await?;
        file.flush().await?;
        // From here on, entries on disk may refer to the copies, even if one of the following writes fails.
        changes.counted.into_iter().for_each(Counted::keep);
        let mut writes = changes.tables.into_iter().map(|(table, to)| self.patch(table, to));
        loop {
            let some: Vec<_> = writes.by_ref().take(MAX_TABLES).collect();
            if some.is_empty() {
                break;
            }
            run_all(some).await?;
        }
        file.flush().await?;
        for (first, count, references) in changes.old {
            self.clusters.drop_references(first, count, references, ReleaseReason::Discarded);
        }
        Ok(())
    }

    async fn patch(&self, table: u64, patches: Patches) -> Result<()> {
        let file = self.image_state.file()?;
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
}
