//! Images with extended L2 entries, that is, with subclusters.
//!
//! | file | concern |
//! |---|---|
//! | `lookup` | extents of subclusters |
//! | `write` | writes that allocate clusters or subclusters, and copy-on-write |
//! | `zero` | zero writes and discards |
//!
//! The unit of allocation is the cluster, but each subcluster has its own state in the bitmap of the L2 entry. A write
//! changes only the subclusters that it touches. If the cluster is shared or compressed, the write goes to a new
//! cluster, and the data of the other subclusters is copied there.
//!
//! In a cluster that the image owns, data is written first and the bitmap changes afterwards. The write-back flushes
//! the data before it writes the entry, so that a crash leaves the old contents.
//!
//! Code in this module reads and changes entries only while it holds the guest range lock on their clusters. Lookups
//! hold no lock. For them, the two words of an entry change atomically (see [`super::lookup`]).

mod lookup;
mod write;
mod zero;

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_core::Result;
use oxblk_ring::perturb::point;

use super::Qcow2;
use super::cache::Change;
use super::counted::Counted;
use super::dropped::ReleaseReason;
use super::layout::{ExtendedEntry, L2Entry, L2Kind, Subclusters};

/// Loads the entry at word `index` of a slice.
fn load(words: &[AtomicU64], index: usize) -> Option<ExtendedEntry> {
    let [entry, bitmap] = words.get(index..index.checked_add(2)?)? else { return None };
    Some(ExtendedEntry {
        entry: L2Entry(entry.load(Acquire)),
        bitmap: Subclusters(bitmap.load(Acquire)),
    })
}

/// Stores the entry at word `index` of a slice.
fn store(change: &mut Change<'_>, index: usize, new: ExtendedEntry) {
    change.replace(index, new.entry.0);
    point();
    change.replace(index.saturating_add(1), new.bitmap.0);
}

/// Whether both entries are equal apart from the copied flag.
fn same_place(a: L2Entry, b: L2Entry) -> bool {
    a.with_copied(false) == b.with_copied(false)
}

impl Qcow2 {
    /// The entry of a guest offset, and its kind. The caller holds the range lock.
    async fn extended_entry(&self, offset: u64) -> Result<(ExtendedEntry, L2Kind)> {
        let Some(slice) = self.pin_slice(offset).await? else {
            return Ok((ExtendedEntry::EMPTY, L2Kind::Unallocated));
        };
        let (_, index) = self.slice_of(offset);
        let found = load(slice.words(), index).unwrap_or_default();
        drop(slice);
        match found.kind(self.geometry) {
            Ok(kind) if !self.is_misplaced(offset, kind) => Ok((found, kind)),
            _ => Err(self.bad_entry(offset, found.entry.0).await),
        }
    }

    /// Replaces the entries of `count` guest clusters from `guest` on by the results of `change`. The clusters that the
    /// old entries referred to are passed to the write-back, which lowers their refcounts. If this fails, the same
    /// happens to the clusters of `counted` that no entry refers to. The caller holds the range lock.
    pub(super) async fn link_extended(
        &self,
        guest: u64,
        count: u64,
        mut counted: Option<Counted<'_>>,
        change: impl Fn(u64, ExtendedEntry) -> ExtendedEntry,
    ) -> Result<()> {
        let mut index = 0_u64;
        while index < count {
            let at = guest.saturating_add(index << self.geometry.cluster_bits);
            self.ensure_table(self.l1_index(at)).await?;
            let Some(slice) = self.pin_slice(at).await? else { continue };
            let (_, first) = self.slice_of(at);
            let mut dropped = Vec::new();
            let before = index;
            let mut changing = slice.begin_change();
            for word in (first..slice.words().len()).step_by(2) {
                let Some(old) = load(slice.words(), word).filter(|_| index < count) else { break };
                let new = change(index, old);
                store(&mut changing, word, new);
                if !same_place(old.entry, new.entry) {
                    dropped.push(old.entry);
                }
                index = index.saturating_add(1);
            }
            drop(changing);
            point();
            if let Some(counted) = &mut counted {
                counted.keep_first(index.saturating_sub(before));
            }
            self.drop_entries(&dropped, ReleaseReason::Data);
        }
        Ok(())
    }
}
