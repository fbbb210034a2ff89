//! Zero writes and discards in images with subclusters. These requests change L2 entries. They write data only to zero a
//! part of a compressed cluster.

use oxblk_core::{Result, ZeroFlags};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::clusters::ReleaseReason;
use super::super::discard::zero_release_reason;
use super::super::layout::{ExtendedEntry, L2Kind, Subclusters};

impl Qcow2 {
    /// Makes whole subclusters read as zeroes. The caller holds the range lock.
    ///
    /// # Errors
    /// [`oxblk_core::ErrorKind::Unsupported`] if a part of a compressed cluster is to be zeroed, and `flags` forbid writing
    /// data. Also the errors of requests to the image file.
    pub(in super::super) async fn zero_subclusters(
        &self,
        offset: u64,
        end: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let keep = !unmap || self.image_state.keeps_discarded();
        let (first, last) = (
            self.geometry.cluster_end(offset).min(end),
            self.geometry.cluster_start(end).max(offset),
        );
        if first > last {
            return self.zero_part(offset, end, flags).await;
        }
        if offset < first {
            self.zero_part(offset, first, flags).await?;
        }
        self.metadata
            .change_extended(first, last, zero_release_reason(unmap), |old| match old.kind {
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
        let cluster = self.geometry.cluster_start(offset);
        let (_, kind) = self.metadata.extended_entry(cluster).await?;
        if matches!(kind, L2Kind::Compressed { .. }) {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                return Err(super::super::discard::unsupported());
            }
            let len = usize::try_from(end - offset).unwrap_or(0);
            return self.write_subclusters(offset, IoBuf::zeroes(len)).await;
        }
        let mask = Subclusters::touched_by(self.geometry, offset - cluster, end - cluster);
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let frees = unmap && !self.image_state.keeps_discarded();
        let next = cluster.saturating_add(self.geometry.cluster_size());
        self.metadata
            .change_extended(cluster, next, zero_release_reason(unmap), |old| {
                let bitmap = old.entry.bitmap.with_zero(mask);
                Some(match bitmap {
                    Subclusters::ZERO if frees => ExtendedEntry::ZERO,
                    _ => ExtendedEntry { bitmap, ..old.entry },
                })
            })
            .await
    }

    /// Discards whole clusters. The clusters read as zeroes afterwards. The caller holds the range lock.
    pub(in super::super) async fn discard_subclusters(&self, from: u64, to: u64) -> Result<()> {
        let keep = self.image_state.keeps_discarded();
        self.metadata
            .change_extended(from, to, ReleaseReason::Discarded, |old| {
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
    pub(in super::super) async fn deallocate_subclusters(
        &self,
        from: u64,
        to: u64,
        reason: ReleaseReason,
    ) -> Result<()> {
        self.metadata
            .change_extended(from, to, reason, |old| {
                (old.entry != ExtendedEntry::EMPTY).then_some(ExtendedEntry::EMPTY)
            })
            .await
    }

    /// Drops the contents of whole clusters. A cluster that had an L2 entry other than 0 is not read from the backing file
    /// afterwards. The caller holds the range lock.
    pub(in super::super) async fn clear_subclusters(&self, from: u64, to: u64) -> Result<()> {
        self.metadata
            .change_extended(from, to, ReleaseReason::CutOff, |old| {
                let new = if old.has_backing { ExtendedEntry::ZERO } else { ExtendedEntry::EMPTY };
                (old.entry != ExtendedEntry::EMPTY && old.entry != new).then_some(new)
            })
            .await
    }
}
