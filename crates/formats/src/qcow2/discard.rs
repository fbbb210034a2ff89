//! Zero writes and discards. These requests change L2 entries and write no data to the image file. In a raw data file, they
//! also zero the range.

use std::cell::RefCell;

use oxblk_core::{ChildIdx, Error, ErrorKind, Result, Want, ZeroFlags};
use roaring::RoaringTreemap;

use super::Qcow2;
use super::clusters::ReleaseReason;
use super::layout::{L2Entry, L2Kind};
use super::mapping::Extent;

impl Qcow2 {
    /// Makes a range of the guest disk read as zeroes. In version 3, the L2 entries become zero entries, so the range stays
    /// zero even if the image gets another backing file later. Version 2 has no zero entries. In a version 2 image without a
    /// backing file, the clusters become unallocated.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the caller must write zeroes as data instead. This is so if the range does not consist of
    /// whole clusters or subclusters. As an exception, a part of one cluster or subcluster is accepted if the cluster contains
    /// no data and its other parts read as zeroes. The error is also returned in version 2 with a backing file, and in version
    /// 2 with the flags `OWN` or `NO_FALLBACK`. Other errors: the image is read-only, is corrupt, or accepts no requests; the
    /// errors of requests to the children.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.image_state.check_writable()?;
        if self.image_state.version() < 3 && flags.contains(ZeroFlags::NO_FALLBACK) {
            // Version 2 has no zero clusters.
            return Err(unsupported());
        }
        let size = self.geometry.subcluster_size();
        let end = offset.saturating_add(len);
        let _lock = self
            .guest
            .lock(self.geometry.cluster_start(offset)..self.geometry.cluster_end(end))
            .await;
        let is_at_end = end == self.image_state.size();
        let to_whole = |at: u64| at.checked_next_multiple_of(size).unwrap_or(u64::MAX);
        let last = if is_at_end { to_whole(end) } else { end };
        let (offset, last) = match offset.is_multiple_of(size) && last.is_multiple_of(size) {
            true => (offset, last),
            false if self.can_zero_whole(offset, end).await? => {
                (offset - offset % size, to_whole(end))
            }
            false => return Err(unsupported()),
        };
        // If the range begins at the start of a cluster, the last cluster of the disk counts as a whole cluster, even if the
        // disk ends inside this cluster.
        let last = match is_at_end && self.geometry.offset_in_cluster(offset) == 0 {
            true => self.geometry.cluster_end(last),
            false => last,
        };
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        self.data.zero_raw_data(offset, last, flags).await?;
        self.zero_entries(offset, last, flags).await?;
        if unmap {
            self.data
                .discard_data(self.geometry.cluster_end(offset), self.geometry.cluster_start(last))
                .await;
        }
        Ok(())
    }

    /// Whether a range lies inside one cluster or subcluster that can become zero as a whole. This cluster or subcluster must
    /// have no data, and its parts around the range must read as zeroes.
    async fn can_zero_whole(&self, from: u64, to: u64) -> Result<bool> {
        let size = self.geometry.subcluster_size();
        let start = from - from % size;
        let end = start.saturating_add(size);
        if to > end
            || !matches!(
                self.metadata.extent(start, size).await?,
                Extent::Zero { .. } | Extent::Unallocated { .. }
            )
        {
            return Ok(false);
        }
        Ok(self.shows_zeroes(start, from).await?
            && self.shows_zeroes(to, end.min(self.image_state.size())).await?)
    }

    /// Whether a range contains no data and is known to read as zeroes. The backing chain is queried for unallocated parts.
    async fn shows_zeroes(&self, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let extent = self.metadata.extent(at, to - at).await?;
            let len = match (extent, self.image_state.children().get(ChildIdx::BACKING)) {
                (Extent::Zero { len, .. }, _) | (Extent::Unallocated { len, .. }, None) => len,
                (Extent::Unallocated { len, .. }, Some(backing)) if at >= backing.size() => len,
                (Extent::Unallocated { len, .. }, Some(backing)) => {
                    let below = backing.chain_status(at, len, Want::Precise).await?;
                    if !below.is_zero() {
                        return Ok(false);
                    }
                    below.len.clamp(1, len)
                }
                _ => return Ok(false),
            };
            at = at.saturating_add(len);
        }
        Ok(true)
    }

    /// Changes the L2 entries of a range of whole clusters or subclusters, so that the range reads as zeroes.
    pub(super) async fn zero_entries(
        &self,
        offset: u64,
        last: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.geometry.extended_l2 {
            return self.zero_subclusters(offset, last, flags).await;
        }
        if self.image_state.version() < 3 {
            return self.zero_version_2(offset, last, flags.contains(ZeroFlags::OWN)).await;
        }
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        if unmap && self.image_state.keeps_discarded() {
            return self.discard_in_place(offset, last, true).await;
        }
        self.metadata
            .change_entries(
                offset,
                last,
                zero_release_reason(unmap),
                |kind, copied, _| match kind {
                    L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } if !unmap => {
                        Some(L2Entry::zero_allocated(host).with_copied(copied))
                    }
                    _ => Some(L2Entry::zero_plain()),
                },
            )
            .await
    }

    /// Zeroes a range of a version 2 image. Version 2 has no zero clusters, but unallocated clusters read as zeroes as long as
    /// the image has no backing file.
    async fn zero_version_2(&self, offset: u64, end: u64, own: bool) -> Result<()> {
        if own || self.image_state.children().has(ChildIdx::BACKING) {
            return Err(unsupported());
        }
        self.metadata
            .change_entries(offset, end, ReleaseReason::Discarded, |kind, _, _| match kind {
                L2Kind::Unallocated => None,
                _ => Some(L2Entry::EMPTY),
            })
            .await
    }

    /// Discards the whole clusters of a range. Partial clusters at the ends of the range do not change, but the last cluster of
    /// the disk counts as a whole cluster. Does nothing in version 2 with a backing file.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.image_state.check_writable()?;
        let end = offset.saturating_add(len);
        let first = self.geometry.cluster_end(offset);
        let last = if end == self.image_state.size() {
            self.geometry.cluster_end(end)
        } else {
            self.geometry.cluster_start(end)
        };
        if first >= last {
            return Ok(());
        }
        let has_backing = self.image_state.children().get(ChildIdx::BACKING).is_some();
        if self.image_state.version() < 3 && has_backing {
            // Without zero clusters, the guest would read the backing file in the discarded range.
            return Ok(());
        }
        let new =
            if self.image_state.version() < 3 { L2Entry::EMPTY } else { L2Entry::zero_plain() };
        let _lock = self.guest.lock(first..last).await;
        self.data.zero_raw_data(first, last, ZeroFlags::MAY_UNMAP).await?;
        if self.geometry.extended_l2 {
            self.discard_subclusters(first, last).await?;
        } else {
            self.discard_entries(first, last, new).await?;
        }
        self.data.discard_data(first, last).await;
        Ok(())
    }

    async fn discard_entries(&self, first: u64, last: u64, new: L2Entry) -> Result<()> {
        if self.image_state.keeps_discarded() {
            return self.discard_in_place(first, last, false).await;
        }
        self.metadata
            .change_entries(first, last, ReleaseReason::Discarded, |kind, _, over_backing| {
                match kind {
                    L2Kind::Zero { host: None } => None,
                    L2Kind::Unallocated if !over_backing => None,
                    _ => Some(new),
                }
            })
            .await
    }

    /// Like [`Self::discard_entries`], but data clusters that have the copied flag stay allocated, as preallocated clusters of
    /// zero entries. If the options pass guest discards to the host, the contents of these clusters are discarded. Existing
    /// zero entries do not change. With `explicit`, unallocated clusters become zero clusters even without a backing file. The
    /// caller holds the range lock.
    async fn discard_in_place(&self, first: u64, last: u64, explicit: bool) -> Result<()> {
        let kept = RefCell::new(RoaringTreemap::new());
        self.metadata
            .change_entries(first, last, ReleaseReason::Discarded, |kind, copied, over_backing| {
                match kind {
                    L2Kind::Zero { .. } => None,
                    L2Kind::Unallocated if !over_backing && !explicit => None,
                    L2Kind::Data { host } if copied => {
                        kept.borrow_mut().insert(self.geometry.cluster_index(host));
                        Some(L2Entry::zero_allocated(host))
                    }
                    _ => Some(L2Entry::zero_plain()),
                }
            })
            .await?;
        if !self.clusters.passes_discard(ReleaseReason::Discarded) {
            return Ok(());
        }
        let file = self.image_state.file()?;
        let size = self.geometry.cluster_size();
        for cluster in kept.into_inner() {
            // The discard only saves space, so its errors are ignored.
            let _ = file.discard(cluster << self.geometry.cluster_bits, size).await;
        }
        Ok(())
    }

    /// Frees whole clusters. The L2 entries become unallocated. The caller ensures that the guest cannot then read a backing
    /// file in this range: the clusters lie behind the end of the disk, or the image has no backing file.
    pub(super) async fn deallocate_guest(
        &self,
        from: u64,
        to: u64,
        reason: ReleaseReason,
    ) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let _lock = self.guest.lock(from..to).await;
        if self.geometry.extended_l2 {
            return self.deallocate_subclusters(from, to, reason).await;
        }
        self.metadata
            .change_entries(from, to, reason, |kind, _, _| match kind {
                L2Kind::Unallocated => None,
                _ => Some(L2Entry::EMPTY),
            })
            .await
    }

    /// Frees whole clusters that will lie behind the end of the disk after a shrink. Until the shrink is complete, freed
    /// clusters must not read as the backing file. So, in version 3 with a backing file, all clusters that are not unallocated
    /// become zero clusters. Otherwise they become unallocated.
    pub(super) async fn clear_guest(&self, from: u64, to: u64) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let _lock = self.guest.lock(from..to).await;
        if self.geometry.extended_l2 {
            return self.clear_subclusters(from, to).await;
        }
        let has_zeroes = self.image_state.version() >= 3;
        self.metadata
            .change_entries(from, to, ReleaseReason::CutOff, |kind, _, over_backing| match kind {
                L2Kind::Unallocated => None,
                L2Kind::Zero { host: None } if over_backing => None,
                _ if over_backing && has_zeroes => Some(L2Entry::zero_plain()),
                _ => Some(L2Entry::EMPTY),
            })
            .await
    }
}

/// The release reason of clusters that a zero write frees. `unmap`: whether the zero write may unmap.
pub(super) fn zero_release_reason(unmap: bool) -> ReleaseReason {
    if unmap { ReleaseReason::Discarded } else { ReleaseReason::Data }
}

pub(super) fn unsupported() -> Error {
    Error::new(ErrorKind::Unsupported, "Operation not supported")
}
