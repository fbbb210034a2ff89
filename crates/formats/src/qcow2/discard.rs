//! Zero writes and discards: L2 entries change, data does not move.

use std::cell::RefCell;

use oxblk_core::{ChildIdx, Error, ErrorKind, Result, Want, ZeroFlags};
use oxblk_ring::perturb::point;
use roaring::RoaringTreemap;

use super::Qcow2;
use super::layout::{L2Entry, L2Kind};
use super::lookup::Extent;
use super::run_options::Modes;
use super::write_back::ReleaseReason;

/// Guest clusters changed under one hold of the range lock.
const AT_ONCE: u64 = 1 << 16;

impl Qcow2 {
    /// Makes a range of the guest disk read as zeroes, by entries that say so: it stays zero whatever backing file the
    /// image is given later. In version 2, which has no such entries, this needs an image without a backing file, and
    /// the clusters become unallocated.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where only zeroes as data do: in a part of a cluster whose rest does not read as zeroes,
    /// and in version 2 with a backing file (or one to come).
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        if self.version < 3 && flags.contains(ZeroFlags::NO_FALLBACK) {
            // There are no zero clusters.
            return Err(unsupported());
        }
        let size = self.geometry.subcluster_size();
        let end = offset.saturating_add(len);
        let _lock = self.guest.lock(self.cluster_start(offset)..self.cluster_end(end)).await;
        let is_at_end = end == self.size();
        let to_whole = |at: u64| at.checked_next_multiple_of(size).unwrap_or(u64::MAX);
        let last = if is_at_end { to_whole(end) } else { end };
        let (offset, last) = match offset.is_multiple_of(size) && last.is_multiple_of(size) {
            true => (offset, last),
            false if self.can_zero_whole(offset, end).await? => {
                (offset - offset % size, to_whole(end))
            }
            false => return Err(unsupported()),
        };
        // The last cluster of the disk is whole although the disk ends in it.
        let last = match is_at_end && self.geometry.offset_in_cluster(offset) == 0 {
            true => self.cluster_end(last),
            false => last,
        };
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        self.zero_raw_data(offset, last, unmap).await?;
        self.zero_entries(offset, last, flags).await?;
        if unmap {
            self.give_up_data(self.cluster_end(offset), self.cluster_start(last)).await;
        }
        Ok(())
    }

    /// Whether the cluster or subcluster that holds a range can become zero as a whole: it has no data, and what lies
    /// around the range reads as zeroes.
    async fn can_zero_whole(&self, from: u64, to: u64) -> Result<bool> {
        let size = self.geometry.subcluster_size();
        let start = from - from % size;
        let end = start.saturating_add(size);
        if to > end
            || !matches!(
                self.extent(start, size).await?,
                Extent::Zero { .. } | Extent::Unallocated { .. }
            )
        {
            return Ok(false);
        }
        Ok(self.shows_zeroes(start, from).await?
            && self.shows_zeroes(to, end.min(self.size())).await?)
    }

    /// Whether a range without data is known to read as zeroes, the backing files included.
    async fn shows_zeroes(&self, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            let len = match (extent, self.children.get(ChildIdx::BACKING)) {
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

    /// Has the tables say that a range of whole clusters or subclusters reads as zeroes.
    pub(super) async fn zero_entries(
        &self,
        offset: u64,
        last: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.geometry.extended_l2 {
            return self.zero_subclusters(offset, last, flags).await;
        }
        if self.version < 3 {
            return self.zero_old(offset, last, flags.contains(ZeroFlags::OWN)).await;
        }
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        if unmap && self.modes().contains(Modes::NO_UNREF) && !self.geometry.data_file {
            return self.discard_in_place(offset, last, true).await;
        }
        self.change_entries(offset, last, given_up(unmap), |kind, copied, _| match kind {
            L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } if !unmap => {
                Some(L2Entry::zero_allocated(host).with_copied(copied))
            }
            _ => Some(L2Entry::zero_plain()),
        })
        .await
    }

    /// Version 2 has no zero clusters: what is not allocated reads as zeroes, as long as there is no backing file.
    async fn zero_old(&self, offset: u64, end: u64, own: bool) -> Result<()> {
        if own || self.children.has(ChildIdx::BACKING) {
            return Err(unsupported());
        }
        self.change_entries(offset, end, ReleaseReason::Discarded, |kind, _, _| match kind {
            L2Kind::Unallocated => None,
            _ => Some(L2Entry::EMPTY),
        })
        .await
    }

    /// Gives up what whole clusters of a range hold; parts of clusters at its ends are left alone.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let end = offset.saturating_add(len);
        let first = self.cluster_end(offset);
        let last = if end == self.size() { self.cluster_end(end) } else { self.cluster_start(end) };
        if first >= last {
            return Ok(());
        }
        let has_backing = self.children.get(ChildIdx::BACKING).is_some();
        if self.version < 3 && has_backing {
            // Without zero clusters the backing file would show through.
            return Ok(());
        }
        let new = if self.version < 3 { L2Entry::EMPTY } else { L2Entry::zero_plain() };
        let _lock = self.guest.lock(first..last).await;
        self.zero_raw_data(first, last, true).await?;
        if self.geometry.extended_l2 {
            self.discard_subclusters(first, last).await?;
        } else {
            self.discard_entries(first, last, new).await?;
        }
        self.give_up_data(first, last).await;
        Ok(())
    }

    async fn discard_entries(&self, first: u64, last: u64, new: L2Entry) -> Result<()> {
        if self.modes().contains(Modes::NO_UNREF) && !self.geometry.data_file {
            return self.discard_in_place(first, last, false).await;
        }
        self.change_entries(first, last, ReleaseReason::Discarded, |kind, _, over_backing| {
            match kind {
                L2Kind::Zero { host: None } => None,
                L2Kind::Unallocated if !over_backing => None,
                _ => Some(new),
            }
        })
        .await
    }

    /// The same, but clusters that are the image's own stay allocated; the host may still take back what they hold. With
    /// `explicit`, what is not allocated becomes a zero cluster too. The caller holds the range lock.
    async fn discard_in_place(&self, first: u64, last: u64, explicit: bool) -> Result<()> {
        let kept = RefCell::new(RoaringTreemap::new());
        self.change_entries(first, last, ReleaseReason::Discarded, |kind, copied, over_backing| {
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
        if !self.passes_discard(ReleaseReason::Discarded) {
            return Ok(());
        }
        let file = self.children.require(ChildIdx::FILE)?;
        let size = self.geometry.cluster_size();
        for cluster in kept.into_inner() {
            // It only saves space: the host may refuse.
            let _ = file.discard(cluster << self.geometry.cluster_bits, size).await;
        }
        Ok(())
    }

    /// Gives up whole clusters behind the end of the disk, as if they had never been written.
    pub(super) async fn forget_guest(&self, from: u64, to: u64, was: ReleaseReason) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let _lock = self.guest.lock(from..to).await;
        if self.geometry.extended_l2 {
            return self.forget_subclusters(from, to, was).await;
        }
        self.change_entries(from, to, was, |kind, _, _| match kind {
            L2Kind::Unallocated => None,
            _ => Some(L2Entry::EMPTY),
        })
        .await
    }

    /// Gives up whole clusters that are about to lie behind the end of the disk. Meanwhile the backing file does not show
    /// where it did not before, as far as the format has words for that.
    pub(super) async fn clear_guest(&self, from: u64, to: u64) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let _lock = self.guest.lock(from..to).await;
        if self.geometry.extended_l2 {
            return self.clear_subclusters(from, to).await;
        }
        let has_zeroes = self.version >= 3;
        self.change_entries(from, to, ReleaseReason::CutOff, |kind, _, over_backing| match kind {
            L2Kind::Unallocated => None,
            L2Kind::Zero { host: None } if over_backing => None,
            _ if over_backing && has_zeroes => Some(L2Entry::zero_plain()),
            _ => Some(L2Entry::EMPTY),
        })
        .await
    }

    /// Replaces the L2 entries of whole clusters by what `change` says of each (kind, whether it is owned, whether there
    /// is a backing file). The caller holds the range lock.
    async fn change_entries(
        &self,
        from: u64,
        to: u64,
        was: ReleaseReason,
        change: impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<()> {
        let has_backing = self.children.has(ChildIdx::BACKING);
        let mut at = from;
        while at < to {
            at = self
                .change_slice(
                    at,
                    to.min(at.saturating_add(AT_ONCE << self.geometry.cluster_bits)),
                    has_backing,
                    was,
                    &change,
                )
                .await?;
            self.relieve().await?;
        }
        Ok(())
    }

    /// Whether the new entry goes on referring to the old one's cluster.
    pub(super) fn keeps_host(&self, old: L2Entry, new: L2Entry) -> bool {
        let host_of = |entry: L2Entry| match entry.kind(self.geometry, self.version) {
            Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => Some(host),
            _ => None,
        };
        host_of(old).is_some_and(|host| host_of(new) == Some(host))
    }

    /// Where the next slice begins if nothing changes in this one: a table that is shared need not be copied then.
    async fn unchanged_slice(
        &self,
        at: u64,
        to: u64,
        has_backing: bool,
        change: &impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<Option<u64>> {
        let Some(slice) = self.pin_slice(at).await? else { return Ok(None) };
        let (_, first) = self.slice_of(at);
        let mut next = at;
        for word in slice.words().iter().skip(first) {
            if next >= to {
                break;
            }
            let entry = L2Entry(word.load(std::sync::atomic::Ordering::Acquire));
            let kind = entry.kind(self.geometry, self.version);
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

    /// Changes the entries of one slice and returns where the next one begins.
    async fn change_slice(
        &self,
        at: u64,
        to: u64,
        has_backing: bool,
        was: ReleaseReason,
        change: &impl Fn(L2Kind, bool, bool) -> Option<L2Entry>,
    ) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let table = size << self.geometry.l2_bits();
        let table_exists = self.l1_entry(self.l1_index(at)).0 != 0;
        if !table_exists && change(L2Kind::Unallocated, false, has_backing).is_none() {
            return Ok(to.min((at - at % table).saturating_add(table)));
        }
        if !self.l1_entry(self.l1_index(at)).copied()
            && let Some(next) = self.unchanged_slice(at, to, has_backing, change).await?
        {
            return Ok(next);
        }
        self.ensure_table(self.l1_index(at)).await?;
        let Some(slice) = self.pin_slice(at).await? else { return Ok(at) };
        let (_, first) = self.slice_of(at);
        let mut old = Vec::new();
        let (mut next, mut bad) = (at, None);
        let mut changed = false;
        for word in slice.words().iter().skip(first) {
            if next >= to {
                break;
            }
            let entry = L2Entry(word.load(std::sync::atomic::Ordering::Acquire));
            let Ok(kind) = entry.kind(self.geometry, self.version) else {
                bad = Some(entry.0);
                break;
            };
            if let Some(new) = change(kind, entry.copied(), has_backing)
                && new != entry
            {
                word.store(new.0, std::sync::atomic::Ordering::Release);
                changed = true;
                if !self.keeps_host(entry, new) {
                    old.push(entry);
                }
            }
            next = next.saturating_add(size);
        }
        point();
        if changed {
            slice.mark_dirty();
        }
        point();
        self.drop_entries(&old, was);
        match bad {
            None => Ok(next),
            Some(entry) => {
                drop(slice);
                Err(self.mark_corrupt(&format!("L2 entry {entry:#x} is invalid"), next).await)
            }
        }
    }
}

/// What clusters were that a zero write gives up, by whether it may unmap.
pub(super) fn given_up(unmap: bool) -> ReleaseReason {
    if unmap { ReleaseReason::Discarded } else { ReleaseReason::Data }
}

pub(super) fn unsupported() -> Error {
    Error::new(ErrorKind::Unsupported, "Operation not supported")
}
