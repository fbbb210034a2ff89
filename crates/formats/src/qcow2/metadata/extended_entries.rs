//! Changing extended L2 entries in cached slices.
//!
//! Callers hold the guest range lock on the clusters of these entries. Lookups take no lock: they see either both old words or
//! both new words of an entry (see `mapping/lookup`).

use oxblk_core::{ChildIdx, Result};
use oxblk_ring::perturb::point;

use super::Metadata;
use crate::qcow2::clusters::{Counted, ReleaseReason};
use crate::qcow2::layout::{ExtendedEntry, L2Kind};
use crate::qcow2::mapping::{load_entry, same_host, store_entry};

/// The state of an entry before a change.
pub(in crate::qcow2) struct OldEntry {
    pub(in crate::qcow2) entry: ExtendedEntry,
    pub(in crate::qcow2) kind: L2Kind,
    /// Whether the image has a backing file. If so, unallocated subclusters are read from the backing file.
    pub(in crate::qcow2) has_backing: bool,
}

impl Metadata {
    /// The entry of a guest offset, and its kind. The caller holds the range lock.
    pub(in crate::qcow2) async fn extended_entry(
        &self,
        offset: u64,
    ) -> Result<(ExtendedEntry, L2Kind)> {
        let Some(slice) = self.pin_slice(offset).await? else {
            return Ok((ExtendedEntry::EMPTY, L2Kind::Unallocated));
        };
        let (_, index) = self.mapping.slice_of(offset);
        let found = load_entry(slice.words(), index).unwrap_or_default();
        drop(slice);
        match found.kind(self.geometry) {
            Ok(kind) if !self.mapping.is_misplaced(offset, kind) => Ok((found, kind)),
            _ => Err(self.mapping.report_bad_entry(offset, found.entry.0).await),
        }
    }

    /// Replaces the entries of `count` guest clusters from `guest` on by the results of `change`. Passes the references of
    /// replaced entries to the write-back. The write-back lowers the refcounts of the clusters. On an error, also passes
    /// the clusters of `counted` that no entry refers to yet. The caller holds the range lock.
    pub(in crate::qcow2) async fn link_extended(
        &self,
        guest: u64,
        count: u64,
        mut counted: Option<Counted<'_>>,
        change: impl Fn(u64, ExtendedEntry) -> ExtendedEntry,
    ) -> Result<()> {
        let mut index = 0_u64;
        while index < count {
            let at = guest.saturating_add(index << self.geometry.cluster_bits);
            self.ensure_table(self.mapping.l1_index(at)).await?;
            let Some(slice) = self.pin_slice(at).await? else { continue };
            let (_, first) = self.mapping.slice_of(at);
            let mut dropped = Vec::new();
            let before = index;
            let mut changing = slice.begin_change();
            for word in (first..slice.words().len()).step_by(2) {
                let Some(old) = load_entry(slice.words(), word).filter(|_| index < count) else {
                    break;
                };
                let new = change(index, old);
                store_entry(&mut changing, word, new);
                if !same_host(old.entry, new.entry) {
                    dropped.push(old.entry);
                }
                index = index.saturating_add(1);
            }
            drop(changing);
            point();
            if let Some(counted) = &mut counted {
                counted.keep_first(index.saturating_sub(before));
            }
            self.clusters.drop_entries(&dropped, ReleaseReason::Data);
        }
        Ok(())
    }

    /// Replaces the entries of whole clusters by the results of `change`. `None` keeps the entry.
    pub(in crate::qcow2) async fn change_extended(
        &self,
        from: u64,
        to: u64,
        reason: ReleaseReason,
        change: impl Fn(&OldEntry) -> Option<ExtendedEntry>,
    ) -> Result<()> {
        let has_backing = self.image_state.children().has(ChildIdx::BACKING);
        let table = self.geometry.cluster_size() << self.geometry.l2_bits();
        let mut at = from;
        while at < to {
            let nothing =
                OldEntry { entry: ExtendedEntry::EMPTY, kind: L2Kind::Unallocated, has_backing };
            if self.mapping.l1_entry(self.mapping.l1_index(at)).0 == 0 && change(&nothing).is_none()
            {
                at = to.min((at - at % table).saturating_add(table));
                continue;
            }
            at = self.change_extended_slice(at, to, has_backing, reason, &change).await?;
            self.write_back_if_needed().await?;
        }
        Ok(())
    }

    /// Changes the entries of one slice. Returns the guest offset at which the caller continues.
    async fn change_extended_slice(
        &self,
        from: u64,
        to: u64,
        has_backing: bool,
        reason: ReleaseReason,
        change: &impl Fn(&OldEntry) -> Option<ExtendedEntry>,
    ) -> Result<u64> {
        self.ensure_table(self.mapping.l1_index(from)).await?;
        let Some(slice) = self.pin_slice(from).await? else { return Ok(from) };
        let (_, first) = self.mapping.slice_of(from);
        let (mut at, mut bad) = (from, None);
        let mut dropped = Vec::new();
        let mut changing = slice.begin_change();
        for word in (first..slice.words().len()).step_by(2) {
            let Some(entry) = load_entry(slice.words(), word).filter(|_| at < to) else { break };
            let Ok(kind) = entry.kind(self.geometry) else {
                bad = Some(entry.entry.0);
                break;
            };
            let new = change(&OldEntry { entry, kind, has_backing });
            if let Some(new) = new.filter(|new| *new != entry) {
                store_entry(&mut changing, word, new);
                if !same_host(entry.entry, new.entry) {
                    dropped.push(entry.entry);
                }
            }
            at = at.saturating_add(self.geometry.cluster_size());
        }
        drop(changing);
        drop(slice);
        self.clusters.drop_entries(&dropped, reason);
        match bad {
            None => Ok(at),
            Some(entry) => Err(self.mapping.report_bad_entry(at, entry).await),
        }
    }
}
