//! Zero writes and discards in images with subclusters: entries change, data does not move.

use oxblk_core::{ChildIdx, Result, ZeroFlags};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::discard::given_up;
use super::super::dropped::ReleaseReason;
use super::super::layout::{ExtendedEntry, L2Kind, Subclusters};
use super::{load, same_place, store};

/// The state of an entry before a change.
struct Old {
    entry: ExtendedEntry,
    kind: L2Kind,
    /// Whether the image has a backing file, from which unallocated subclusters read.
    has_backing: bool,
}

impl Qcow2 {
    /// Makes whole subclusters read as zeroes. The caller holds the range lock.
    ///
    /// # Errors
    /// [`oxblk_core::ErrorKind::Unsupported`] if data would have to be written, for a part of a compressed cluster, and
    /// `flags` forbid this.
    pub(in super::super) async fn zero_subclusters(
        &self,
        offset: u64,
        end: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let keep = !unmap || self.keeps_discarded();
        let (first, last) =
            (self.cluster_end(offset).min(end), self.cluster_start(end).max(offset));
        if first > last {
            return self.zero_part(offset, end, flags).await;
        }
        if offset < first {
            self.zero_part(offset, first, flags).await?;
        }
        self.change_extended(first, last, given_up(unmap), |old| match old.kind {
            L2Kind::Data { .. } if keep => {
                Some(ExtendedEntry { bitmap: Subclusters::ZERO, ..old.entry })
            }
            _ => Some(ExtendedEntry::ZERO),
        })
        .await?;
        if last < end {
            self.zero_part(last, end, flags).await?;
        }
        Ok(())
    }

    /// Makes a part of a cluster read as zeroes.
    async fn zero_part(&self, offset: u64, end: u64, flags: ZeroFlags) -> Result<()> {
        let cluster = self.cluster_start(offset);
        let (_, kind) = self.extended_entry(cluster).await?;
        if matches!(kind, L2Kind::Compressed { .. }) {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                return Err(super::super::discard::unsupported());
            }
            let len = usize::try_from(end - offset).unwrap_or(0);
            return self.write_subclusters(offset, IoBuf::zeroes(len)).await;
        }
        let mask = Subclusters::touched_by(self.geometry, offset - cluster, end - cluster);
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let frees = unmap && !self.keeps_discarded();
        let next = cluster.saturating_add(self.geometry.cluster_size());
        self.change_extended(cluster, next, given_up(unmap), |old| {
            let bitmap = old.entry.bitmap.with_zero(mask);
            Some(match bitmap {
                Subclusters::ZERO if frees => ExtendedEntry::ZERO,
                _ => ExtendedEntry { bitmap, ..old.entry },
            })
        })
        .await
    }

    /// Discards whole clusters, which read as zeroes afterwards. The caller holds the range lock.
    pub(in super::super) async fn discard_subclusters(&self, from: u64, to: u64) -> Result<()> {
        let keep = self.keeps_discarded();
        self.change_extended(from, to, ReleaseReason::Discarded, |old| {
            let empty = old.entry.entry.0 == 0 && !old.has_backing;
            let data = matches!(old.kind, L2Kind::Data { .. });
            if keep && data && old.entry.entry.copied() {
                return Some(ExtendedEntry { bitmap: Subclusters::ZERO, ..old.entry });
            }
            (!empty && old.entry != ExtendedEntry::ZERO).then_some(ExtendedEntry::ZERO)
        })
        .await
    }

    /// Makes whole clusters unallocated. The caller holds the range lock.
    pub(in super::super) async fn forget_subclusters(
        &self,
        from: u64,
        to: u64,
        was: ReleaseReason,
    ) -> Result<()> {
        self.change_extended(from, to, was, |old| {
            (old.entry != ExtendedEntry::EMPTY).then_some(ExtendedEntry::EMPTY)
        })
        .await
    }

    /// Drops the contents of whole clusters. Clusters that are not empty do not read from a backing file afterwards.
    /// The caller holds the range lock.
    pub(in super::super) async fn clear_subclusters(&self, from: u64, to: u64) -> Result<()> {
        self.change_extended(from, to, ReleaseReason::CutOff, |old| {
            let new = if old.has_backing { ExtendedEntry::ZERO } else { ExtendedEntry::EMPTY };
            (old.entry != ExtendedEntry::EMPTY && old.entry != new).then_some(new)
        })
        .await
    }

    /// Replaces the entries of whole clusters by the results of `change`.
    async fn change_extended(
        &self,
        from: u64,
        to: u64,
        was: ReleaseReason,
        change: impl Fn(&Old) -> Option<ExtendedEntry>,
    ) -> Result<()> {
        let has_backing = self.children.has(ChildIdx::BACKING);
        let table = self.geometry.cluster_size() << self.geometry.l2_bits();
        let mut at = from;
        while at < to {
            let nothing =
                Old { entry: ExtendedEntry::EMPTY, kind: L2Kind::Unallocated, has_backing };
            if self.l1_entry(self.l1_index(at)).0 == 0 && change(&nothing).is_none() {
                at = to.min((at - at % table).saturating_add(table));
                continue;
            }
            at = self.change_extended_slice(at, to, has_backing, was, &change).await?;
            self.relieve().await?;
        }
        Ok(())
    }

    /// Changes the entries of one slice. Returns the guest offset at which the next slice begins.
    async fn change_extended_slice(
        &self,
        from: u64,
        to: u64,
        has_backing: bool,
        was: ReleaseReason,
        change: &impl Fn(&Old) -> Option<ExtendedEntry>,
    ) -> Result<u64> {
        self.ensure_table(self.l1_index(from)).await?;
        let Some(slice) = self.pin_slice(from).await? else { return Ok(from) };
        let (_, first) = self.slice_of(from);
        let (mut at, mut bad) = (from, None);
        let mut dropped = Vec::new();
        let mut changing = slice.begin_change();
        for word in (first..slice.words().len()).step_by(2) {
            let Some(entry) = load(slice.words(), word).filter(|_| at < to) else { break };
            let Ok(kind) = entry.kind(self.geometry) else {
                bad = Some(entry.entry.0);
                break;
            };
            let new = change(&Old { entry, kind, has_backing });
            if let Some(new) = new.filter(|new| *new != entry) {
                store(&mut changing, word, new);
                if !same_place(entry.entry, new.entry) {
                    dropped.push(entry.entry);
                }
            }
            at = at.saturating_add(self.geometry.cluster_size());
        }
        drop(changing);
        drop(slice);
        self.drop_entries(&dropped, was);
        match bad {
            None => Ok(at),
            Some(entry) => Err(self.bad_entry(at, entry).await),
        }
    }
}
