//! Extended L2 entries in slices, and extents of subclusters. An extent of subclusters may end at any subcluster, also inside
//! a cluster.

use std::sync::atomic::{AtomicU64, Ordering::Acquire};

use oxblk_ring::perturb::point;

use super::Mapping;
use super::extent::{Extent, Miss};
use crate::qcow2::layout::{ExtendedEntry, L2Entry, L2Kind, SUBCLUSTERS, Subcluster, Subclusters};
use crate::slice_cache::Change;

/// Loads the entry at word `index` of a slice. `None` if the slice ends before the end of the entry.
pub(in crate::qcow2) fn load_entry(words: &[AtomicU64], index: usize) -> Option<ExtendedEntry> {
    let [entry, bitmap] = words.get(index..index.checked_add(2)?)? else { return None };
    Some(ExtendedEntry {
        entry: L2Entry(entry.load(Acquire)),
        bitmap: Subclusters(bitmap.load(Acquire)),
    })
}

/// Stores the entry at word `index` of a slice.
pub(in crate::qcow2) fn store_entry(change: &mut Change<'_>, index: usize, new: ExtendedEntry) {
    change.replace(index, new.entry.0);
    point();
    change.replace(index.saturating_add(1), new.bitmap.0);
}

/// Whether both entries are equal apart from the copied flag.
pub(in crate::qcow2) fn same_host(a: L2Entry, b: L2Entry) -> bool {
    a.with_copied(false) == b.with_copied(false)
}

impl Mapping {
    /// The extent that starts at `offset`. The L2 entry of `offset` begins at word `index` of the slice. The extent does not
    /// extend past the end of the slice or of the range.
    pub(super) fn scan_subclusters(
        &self,
        words: &[AtomicU64],
        index: usize,
        offset: u64,
        len: u64,
    ) -> Result<Extent, Miss> {
        let size = self.geometry.cluster_size();
        let within = self.geometry.offset_in_cluster(offset);
        let (first, place) = self.stored(words, index).unwrap_or(Err(Miss::Absent))?;
        if self.is_misplaced(offset, place) {
            return Err(Miss::Bad(first.entry.0));
        }
        let place = match place {
            L2Kind::Compressed { host, len: stored } => {
                return Ok(Extent::Compressed { host, stored, len: len.min(size - within) });
            }
            L2Kind::Data { host } => Some(host),
            L2Kind::Unallocated | L2Kind::Zero { .. } => None,
        };
        let bits = self.geometry.subcluster_bits();
        let subcluster = u32::try_from(within >> bits).unwrap_or(0);
        let (what, count) = first.bitmap.run(subcluster);
        let mut reached = subcluster.saturating_add(count);
        let mut covered = (u64::from(reached) << bits).saturating_sub(within);
        let mut next = index;
        let mut next_place = place;
        while reached == SUBCLUSTERS && covered < len {
            next = next.saturating_add(2);
            next_place = next_place.map(|host| host.saturating_add(size));
            let Some(Ok((entry, kind))) = self.stored(words, next) else { break };
            let goes_on = match kind {
                L2Kind::Data { host } => next_place == Some(host),
                L2Kind::Unallocated => next_place.is_none(),
                L2Kind::Compressed { .. } | L2Kind::Zero { .. } => false,
            };
            let (same, count) = entry.bitmap.run(0);
            let owned = entry.entry.copied() == first.entry.copied();
            if !goes_on || same != what || (what == Subcluster::Data && !owned) {
                break;
            }
            covered = covered.saturating_add(u64::from(count) << bits);
            reached = count;
        }
        let len = covered.min(len);
        let host = place.map(|host| host.saturating_add(within));
        Ok(match (what, host) {
            (Subcluster::Data, Some(host)) => {
                Extent::Data { host, len, owned: first.entry.copied() }
            }
            (Subcluster::Zero, host) => Extent::Zero { len, host, owned: false },
            (Subcluster::Unallocated | Subcluster::Data, host) => Extent::Unallocated { len, host },
        })
    }

    fn stored(
        &self,
        words: &[AtomicU64],
        index: usize,
    ) -> Option<Result<(ExtendedEntry, L2Kind), Miss>> {
        let entry = load_entry(words, index)?;
        Some(match entry.kind(self.geometry) {
            Ok(kind) => Ok((entry, kind)),
            Err(_) => Err(Miss::Bad(entry.entry.0)),
        })
    }
}
