//! Zero writes and discards. They change L2 entries and do not write data to clusters of the image.

use std::cell::RefCell;
use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{ChildIdx, Error, ErrorKind, Result, Want, ZeroFlags};
use oxblk_ring::perturb::point;
use roaring::RoaringTreemap;

use super::Qcow2;
use super::dropped::ReleaseReason;
use super::layout::{L2Entry, L2Kind};
use super::lookup::Extent;
use super::run_options::Modes;

/// Largest number of guest clusters that one step changes.
const AT_ONCE: u64 = 1 << 16;

impl Qcow2 {
    /// Makes a range of the guest disk read as zeroes with zero entries in the L2 tables. The range stays zero even if the
    /// image gets another backing file later. Version 2 has no zero entries. There the image must have no backing file, and the
    /// clusters become unallocated.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the caller must write zeroes as data. This is so in a part of a cluster whose other
    /// parts do not read as zeroes. It is also so in version 2 with a backing file (present, or expected later).
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        if self.version < 3 && flags.contains(ZeroFlags::NO_FALLBACK) {
            // Version 2 has no zero clusters.
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
        // The last cluster of the disk counts as a whole cluster, although the disk ends inside it.
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

    /// Whether the cluster or subcluster that contains a range can become a zero cluster as a whole. It must have no data, and
    /// its parts around the range must read as zeroes.
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

    /// Whether a range without data is known to read as zeroes, with the backing chain taken into account.
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

    /// Changes the L2 entries of a range of whole clusters or subclusters, so that it reads as zeroes.
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
        if unmap && self.keeps_discarded() {
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

    /// Zeroes a range of a version 2 image, which has no zero clusters. Unallocated clusters read as zeroes there as long as
    /// the image has no backing file.
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

    /// Discards the whole clusters of a range. Partial clusters at its ends do not change.
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
            // Without zero clusters, the guest would read the backing file there.
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

    /// Whether clusters that the guest discards stay allocated. This does not concern clusters of a data file, each of which
    /// belongs to one guest cluster anyway.
    pub(super) fn keeps_discarded(&self) -> bool {
        self.modes().contains(Modes::NO_UNREF) && !self.geometry.data_file
    }

    async fn discard_entries(&self, first: u64, last: u64, new: L2Entry) -> Result<()> {
        if self.keeps_discarded() {
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

    /// As [`Self::discard_entries`], but clusters that only the active state owns stay allocated; their contents may be
    /// discarded on the host. With `explicit`, unallocated clusters become zero clusters too. The caller holds the range lock.
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
            // The discard only saves space, so its errors are ignored.
            let _ = file.discard(cluster << self.geometry.cluster_bits, size).await;
        }
        Ok(())
    }

    /// Frees whole clusters behind the end of the disk. Their entries become unallocated.
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

    /// Frees whole clusters that will lie behind the end of the disk after a shrink. Until then the guest must not read the
    /// backing file there. So the clusters become zero clusters where there is a backing file and the version has zero
    /// clusters.
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

    /// Replaces the L2 entries of whole clusters by the results of `change`. Its arguments are the kind of the entry, whether
    /// the active state owns the cluster, and whether the image has a backing file. `None` keeps the entry. The caller holds
    /// the range lock.
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

    /// Whether the new entry still refers to the host cluster of the old entry.
    pub(super) fn keeps_host(&self, old: L2Entry, new: L2Entry) -> bool {
        let host_of = |entry: L2Entry| match entry.kind(self.geometry, self.version) {
            Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => Some(host),
            _ => None,
        };
        host_of(old).is_some_and(|host| host_of(new) == Some(host))
    }

    /// If `change` would change nothing in this slice, returns the guest offset where the next slice begins. A shared L2 table
    /// need not be copied then.
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
        let mut changing = slice.begin_change();
        for word in first..slice.words().len() {
            if next >= to {
                break;
            }
            let Some(entry) = changing.words().get(word).map(|word| word.load(Acquire)) else {
                break;
            };
            let entry = L2Entry(entry);
            let Ok(kind) = entry.kind(self.geometry, self.version) else {
                bad = Some(entry.0);
                break;
            };
            if let Some(new) = change(kind, entry.copied(), has_backing)
                && new != entry
            {
                changing.replace(word, new.0);
                if !self.keeps_host(entry, new) {
                    old.push(entry);
                }
            }
            next = next.saturating_add(size);
        }
        drop(changing);
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

/// The release reason of clusters that a zero write frees. `unmap`: whether the zero write may unmap.
pub(super) fn given_up(unmap: bool) -> ReleaseReason {
    if unmap { ReleaseReason::Discarded } else { ReleaseReason::Data }
}

pub(super) fn unsupported() -> Error {
    Error::new(ErrorKind::Unsupported, "Operation not supported")
}
