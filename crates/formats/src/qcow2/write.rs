//! Guest writes that the map cannot place: allocation and copy-on-write.
//!
//! A write holds the guest range lock on its clusters from the lookup until the clusters are linked. So two writers of one
//! cluster run one after the other, and writers of different clusters run concurrently. Each run of clusters goes through these
//! steps:
//!
//! 1. *reserve*: host clusters are taken out of the free map;
//! 2. *write*: the data is written, and around it the old contents of the guest clusters (copy-on-write);
//! 3. *count*: their refcounts become 1 in the cache;
//! 4. *link*: the L2 entries in the cache refer to them. Readers see the new data from here on. The old references of the
//!    entries are handed to the write-back, which releases them when the disk no longer refers to them.

use std::ops::Range;

use futures_util::future::try_join;
use oxblk_core::{BoxFuture, ChildIdx, Result, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qcow2;
use super::counted::Counted;
use super::data::NewData;
use super::dropped::ReleaseReason;
use super::layout::{ExtendedEntry, L2Entry};
use super::lookup::Extent;

/// Up to this size in bytes, the old and new contents of a cluster are combined in memory and written with one write.
const ASSEMBLE: u64 = 256 << 10;

/// The place of data.
enum Place {
    /// In place, over existing data from this host offset on.
    Data(u64),
    /// Into the preallocated cluster of a zero cluster, at this host offset.
    Kept(u64),
    /// Into new clusters.
    New,
}

pub(super) fn length(data: &[u8]) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

impl Qcow2 {
    /// Writes `data` to the guest disk at `offset`.
    pub(super) async fn write_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.check_writable()?;
        // A write over existing data needs no lock.
        if let Extent::Data { host, len, owned: true } =
            self.extent_to_write(offset, length(&data)).await?
            && len == length(&data)
        {
            point();
            return self.write_data(offset, host, data).await;
        }
        let end = self.cluster_end(offset.saturating_add(length(&data)));
        let _lock = self.guest.lock(self.cluster_start(offset)..end).await;
        self.write_locked(offset, data).await
    }

    /// As [`Self::write_guest`], for callers that hold the range lock.
    pub(super) async fn write_locked(&self, offset: u64, mut data: IoBuf) -> Result<()> {
        if self.geometry.extended_l2 {
            return self.write_subclusters(offset, data).await;
        }
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        // The host cluster that follows the previous piece.
        let mut behind = None;
        while !data.is_empty() {
            let (place, len) = self.run_at(at, length(&data)).await?;
            let piece = data.split_to(usize::try_from(len).unwrap_or(usize::MAX).min(data.len()));
            match place {
                Place::Data(host) => {
                    behind = Some(self.cluster_end(host.saturating_add(length(&piece))));
                    jobs.push(Box::pin(self.write_data(at, host, piece)));
                }
                Place::Kept(cluster) => {
                    behind = Some(cluster.saturating_add(self.geometry.cluster_size()));
                    jobs.push(Box::pin(self.write_kept(at, piece, cluster)));
                }
                Place::New => {
                    let behind = behind.take().map(|host| self.geometry.cluster_index(host));
                    jobs.push(Box::pin(self.write_new(at, piece, behind)));
                }
            }
            at = at.saturating_add(len);
        }
        run_all(jobs).await
    }

    /// The place for data at `offset`, and the length of the longest run from there on with the same kind of place.
    async fn run_at(&self, offset: u64, len: u64) -> Result<(Place, u64)> {
        let mut covered = 0_u64;
        while covered < len {
            let extent =
                self.extent_to_write(offset.saturating_add(covered), len - covered).await?;
            match extent {
                Extent::Data { host, len, owned: true } if covered == 0 => {
                    return Ok((Place::Data(host), len));
                }
                Extent::Zero { host: Some(host), len, owned: true } if covered == 0 => {
                    return Ok((Place::Kept(self.geometry.cluster_start(host)), len));
                }
                Extent::Data { owned: true, .. }
                | Extent::Zero { host: Some(_), owned: true, .. } => break,
                other => covered = covered.saturating_add(other.len()),
            }
        }
        Ok((Place::New, covered.min(len)))
    }

    /// Writes `data` into the preallocated cluster at `host` of a guest cluster that reads as zeroes. A power cut before the L2
    /// entry changes has no visible effect, because the entry still says zero.
    async fn write_kept(&self, offset: u64, data: IoBuf, host: u64) -> Result<()> {
        let first = self.cluster_start(offset);
        let whole = first..self.cluster_end(offset.saturating_add(length(&data)));
        let place = host.saturating_add(offset - first);
        self.fill(whole, offset, data, place, false).await?;
        self.link(first, 1, None, |_| L2Entry::data(host)).await
    }

    /// Writes `data` into newly allocated clusters. They are taken from host cluster `behind` on if that is free. This cluster
    /// follows the data in front of `offset`, so the data is contiguous.
    pub(super) async fn write_new(
        &self,
        offset: u64,
        mut data: IoBuf,
        mut behind: Option<u64>,
    ) -> Result<()> {
        let mut at = offset;
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        while !data.is_empty() {
            let first = self.cluster_start(at);
            let end = self.cluster_end(at.saturating_add(length(&data)));
            let count = (end - first) >> self.geometry.cluster_bits;
            let count = self.table_before_data(first, count).await?;
            let run = self.reserve_data(first, count, behind).await?;
            behind = Some(run.start.saturating_add(run.count));
            let reach = first.saturating_add(run.count << self.geometry.cluster_bits);
            let room = usize::try_from(reach - at).unwrap_or(usize::MAX).min(data.len());
            let piece = data.split_to(room);
            let next = at.saturating_add(length(&piece));
            jobs.push(match self.geometry.extended_l2 {
                true => Box::pin(self.fill_new(at, piece, run)),
                false => Box::pin(self.fill_and_link(at, piece, run)),
            });
            at = next;
        }
        run_all(jobs).await
    }

    async fn fill_and_link(&self, offset: u64, data: IoBuf, mut run: NewData<'_>) -> Result<()> {
        let first = self.cluster_start(offset);
        let (start, count) = (run.start, run.count);
        run.begin_write();
        let whole = first..self.cluster_end(offset.saturating_add(length(&data)));
        let place = (start << self.geometry.cluster_bits).saturating_add(offset - first);
        let filled = self.fill(whole, offset, data, place, self.reads_as_zeroes(&run)).await;
        let counted = run.count_if(filled, self).await?;
        let bits = self.geometry.cluster_bits;
        let entry = |index| L2Entry::data(start.saturating_add(index) << bits);
        self.link(first, count, counted, entry).await
    }

    /// Writes `data` to the host offset `at`, and around it the old contents of the guest range `whole`. `untouched`: all of
    /// the host clusters read as zeroes.
    pub(super) async fn fill(
        &self,
        whole: Range<u64>,
        offset: u64,
        data: IoBuf,
        at: u64,
        untouched: bool,
    ) -> Result<()> {
        let (first, end) = (whole.start.min(offset), self.end_of_data(whole.end));
        let data_end = offset.saturating_add(length(&data));
        let head = self.old_contents(first, offset, untouched);
        // Bytes behind the end of the disk are invisible, so their contents do not matter.
        let tail = self.old_contents(data_end, end, untouched);
        let (head, tail) = try_join(head, tail).await?;
        let host = at.saturating_sub(offset - first);
        if head.is_none() && tail.is_none() {
            return self.write_data(offset, at, data).await;
        }
        let total = head.as_ref().map_or(0, |head| head.len()).saturating_add(data.len());
        let total = total.saturating_add(tail.as_ref().map_or(0, |tail| tail.len()));
        let (guest, start) = if head.is_some() { (first, host) } else { (offset, at) };
        let can_part = self.can_part_at(offset) && self.can_part_at(data_end);
        if !can_part || u64::try_from(total).is_ok_and(|total| total <= ASSEMBLE) {
            let mut whole = IoBufMut::new(total);
            let mut rest: &mut [u8] = &mut whole;
            for part in [head.as_deref(), Some(&*data), tail.as_deref()].into_iter().flatten() {
                let (place, next) = std::mem::take(&mut rest).split_at_mut(part.len());
                place.copy_from_slice(part);
                rest = next;
            }
            return self.write_data(guest, start, whole.freeze()).await;
        }
        let mut writes = vec![self.write_data(offset, at, data.clone())];
        if let Some(head) = head {
            writes.push(self.write_data(first, host, head));
        }
        if let Some(tail) = tail {
            writes.push(self.write_data(data_end, at.saturating_add(length(&data)), tail));
        }
        run_all(writes).await
    }

    /// The contents of the guest disk from `from` to `to`. `None` if the range is empty, or if it is zero and the new clusters
    /// read as zeroes already.
    pub(super) async fn old_contents(
        &self,
        from: u64,
        to: u64,
        untouched: bool,
    ) -> Result<Option<IoBuf>> {
        if from >= to {
            return Ok(None);
        }
        let len = usize::try_from(to - from).unwrap_or(0);
        if self.reads_as_zero(from, to).await? {
            return Ok(if untouched { None } else { Some(IoBuf::zeroes(len)) });
        }
        let old = self.read_guest(from, IoBufMut::new(len)).await?.freeze();
        Ok(if untouched && oxblk_ring::is_zero(&old) { None } else { Some(old) })
    }

    /// Whether a range is known to read as zeroes without reading data.
    pub(super) async fn reads_as_zero(&self, from: u64, to: u64) -> Result<bool> {
        let backing_end = self.children.get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            match extent {
                Extent::Zero { .. } => {}
                Extent::Unallocated { .. } if at >= backing_end => {}
                _ => return Ok(false),
            }
            at = at.saturating_add(extent.len());
        }
        Ok(true)
    }

    /// Sets the L2 entries of `count` guest clusters from `guest` on to the results of `entry`. Hands their old references to
    /// the write-back. If this fails, the clusters of `counted` that have no entry yet are handed to the write-back too.
    pub(super) async fn link(
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
            self.ensure_table(self.l1_index(at)).await?;
            let Some(slice) = self.pin_slice(at).await? else { continue };
            let (_, first) = self.slice_of(at);
            let mut old = Vec::new();
            let before = index;
            let mut change = slice.begin_change();
            for word in first..slice.words().len() {
                if index == count {
                    break;
                }
                let new = entry(index);
                let replaced = L2Entry(change.replace(word, new.0));
                if replaced.0 != 0 && !self.keeps_host(replaced, new) {
                    old.push(replaced);
                }
                index = index.saturating_add(1);
            }
            drop(change);
            point();
            if let Some(counted) = &mut counted {
                counted.keep_first(index.saturating_sub(before));
            }
            self.drop_entries(&old, ReleaseReason::Data);
        }
        Ok(())
    }
}
