//! Changing L2 entries of one word in cached slices.
//!
//! Callers hold the guest range lock on the clusters of these entries. A slice is marked dirty before the references of its old
//! entries are dropped. So a write-back cycle that lowers the refcounts of these references also writes the slice.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{ChildIdx, Result};
use oxblk_ring::perturb::point;

use super::Metadata;
use crate::qcow2::clusters::{Counted, ReleaseReason};
use crate::qcow2::layout::{ExtendedEntry, L2Entry, L2Kind};

/// Maximum number of guest clusters that one step changes.
const AT_ONCE: u64 = 1 << 16;

impl Metadata {
    /// Sets the L2 entries of `count` guest clusters from `guest` on to the results of `entry`. Passes the references of
    /// replaced entries to the write-back. The write-back lowers the refcounts of the clusters. On an error, also passes
    /// the clusters of `counted` that no entry refers to yet.
    pub(in crate::qcow2) async fn link(
        &self,
        guest: u64,
        count: u64,
        mut counted: Option<Counted<'_>>,
        entry: impl Fn(u64) -> L2Entry,
    ) -> Result<()> {
        if self.geometry.extended_l2 {
            let whole = |index, _| ExtendedEntry::whole(entry(index));
            return self.link_extended(guest, count, counted, whole).await;
        }
        let mut index = 0_u64;
        while index < count {
            let at = guest.saturating_add(index << self.geometry.cluster_bits);
            self.ensure_table(self.mapping.l1_index(at)).await?;
            let Some(slice) = self.pin_slice(at).await? else { continue };
            let (_, first) = self.mapping.slice_of(at);
            let mut old = Vec::new();
            let before = index;
            let mut change = slice.begin_change();
            for word in first..slice.words().len() {
                if index == count {
                    break;
                }
                let new = entry(index);
                let replaced = L2Entry(change.replace(word, new.0));
                if replaced.0 != 0 && !self.mapping.keeps_host(replaced, new) {
                    old.push(replaced);
                }
                index = index.saturating_add(1);
            }
            drop(change);
            point();
            if let Some(counted) = &mut counted {
                counted.keep_first(index.saturating_sub(before));
            }
            self.clusters.drop_entries(&old, ReleaseReason::Data);
        }
        Ok(())
    }

    /// Replaces the L2 entries of whole clusters by the results of `change`. The arguments of `change` are the kind of the
    /// entry, whether its copied flag is set, and whether the image has a backing file. `None` keeps the entry. The caller
    /// holds the range lock.
    pub(in crate::qcow2) async fn change_entries(
        &self,
        from: u64,
        to: u64,
        reason: ReleaseReason,
        change: impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<()> {
        let has_backing = self.image_state.children().has(ChildIdx::BACKING);
        let mut at = from;
        while at < to {
            at = self
                .change_slice(
                    at,
                    to.min(at.saturating_add(AT_ONCE << self.geometry.cluster_bits)),
                    has_backing,
                    reason,
                    &change,
                )
                .await?;
            self.write_back_if_needed().await?;
        }
        Ok(())
    }

    /// If `change` would change no entry of the range in this slice, returns the guest offset at which the caller continues.
    /// The caller then does not copy a shared L2 table. `None` if an entry would change or is invalid, or if the L2 table does
    /// not exist.
    async fn unchanged_slice(
        &self,
        at: u64,
        to: u64,
        has_backing: bool,
        change: &impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<Option<u64>> {
        let Some(slice) = self.pin_slice(at).await? else { return Ok(None) };
        let (_, first) = self.mapping.slice_of(at);
        let mut next = at;
        for word in slice.words().iter().skip(first) {
            if next >= to {
                break;
            }
            let entry = L2Entry(word.load(Acquire));
            let kind = entry.kind(self.geometry, self.image_state.version());
            if kind.is_err()
                || kind.is_ok_and(|kind| {
                    change(kind, entry.copied(), has_backing).is_some_and(|new| new != entry)
                })
            {
                return Ok(None);
            }
            next = next.saturating_add(self.geometry.cluster_size());
        }
        Ok(Some(next))
    }

    /// Changes the entries of one slice. Returns the guest offset at which the caller continues.
    async fn change_slice(
        &self,
        at: u64,
        to: u64,
        has_backing: bool,
        reason: ReleaseReason,
        change: &impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let table = size << self.geometry.l2_bits();
        let table_exists = self.mapping.l1_entry(self.mapping.l1_index(at)).0 != 0;
        if !table_exists && change(L2Kind::Unallocated, false, has_backing).is_none() {
            return Ok(to.min((at - at % table).saturating_add(table)));
        }
        if !self.mapping.l1_entry(self.mapping.l1_index(at)).copied()
            && let Some(next) = self.unchanged_slice(at, to, has_backing, change).await?
        {
            return Ok(next);
        }
        self.ensure_table(self.mapping.l1_index(at)).await?;
        let Some(slice) = self.pin_slice(at).await? else { return Ok(at) };
        let (_, first) = self.mapping.slice_of(at);
        let mut old = Vec::new();
        let (mut next, mut bad) = (at, None);
        let mut changing = slice.begin_change();
        for word in first..slice.words().len() {
            if next >= to {
                break;
            }
            let Some(entry) = changing.words().get(word).map(|word| word.load(Acquire)) else {
                break;
            };
            let entry = L2Entry(entry);
            let Ok(kind) = entry.kind(self.geometry, self.image_state.version()) else {
                bad = Some(entry.0);
                break;
            };
            if let Some(new) = change(kind, entry.copied(), has_backing)
                && new != entry
            {
                changing.replace(word, new.0);
                if !self.mapping.keeps_host(entry, new) {
                    old.push(entry);
                }
            }
            next = next.saturating_add(size);
        }
        drop(changing);
        point();
        self.clusters.drop_entries(&old, reason);
        match bad {
            None => Ok(next),
            Some(entry) => {
                drop(slice);
                Err(self
                    .image_state
                    .mark_corrupt(&format!("L2 entry {entry:#x} is invalid"), next)
                    .await)
            }
        }
    }
}
