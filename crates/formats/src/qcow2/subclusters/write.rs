//! Writes without a direct mapping to a host offset, in images with subclusters.
//!
//! The order is that of other writes (see [`super::super::write`]): data, refcounts, entries. A request is split into
//! runs of clusters, and each run is
//!
//! - *in place*: every touched subcluster has data in a cluster that the image owns;
//! - *owned*: the image owns the cluster, but some of its touched subclusters have no data yet;
//! - *new*: the clusters are not allocated, shared with a snapshot, or compressed, so that new clusters are needed.

use std::ops::Range;

use oxblk_core::{BoxFuture, Result, run_all};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::data::NewData;
use super::super::layout::{ExtendedEntry, L2Entry, L2Kind, SUBCLUSTERS, Subclusters};
use super::super::mapping::Extent;
use super::super::write::length;

/// The first run of a write, with its length in bytes.
enum Run {
    /// The data goes to `host`, and no entry changes.
    InPlace { host: u64, len: u64 },
    /// The run lies in one cluster at `host` that the image owns.
    Owned { host: u64, bitmap: Subclusters, len: u64 },
    /// The run needs new clusters.
    New { len: u64 },
}

impl Qcow2 {
    /// Writes `data` to the guest disk at `offset`. The caller holds the range lock.
    pub(in super::super) async fn write_subclusters(
        &self,
        offset: u64,
        mut data: IoBuf,
    ) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while !data.is_empty() {
            let run = self.next_run(at, length(&data)).await?;
            let (Run::InPlace { len, .. } | Run::Owned { len, .. } | Run::New { len }) = run;
            let piece = data.split_to(usize::try_from(len).unwrap_or(usize::MAX).min(data.len()));
            jobs.push(match run {
                Run::InPlace { host, .. } => Box::pin(self.data.write_data(at, host, piece)),
                Run::Owned { host, bitmap, .. } => {
                    Box::pin(self.write_owned(at, piece, host, bitmap))
                }
                Run::New { .. } => Box::pin(self.write_new(at, piece, None)),
            });
            at = at.saturating_add(len);
        }
        run_all(jobs).await
    }

    async fn next_run(&self, offset: u64, len: u64) -> Result<Run> {
        if let Extent::Data { host, len: covered, owned: true } =
            self.metadata.extent_to_write(offset, len).await?
        {
            // If only a part of the touched subclusters has data, the cluster is written as one owned run.
            let end = offset.saturating_add(covered);
            let whole = if covered == len { end } else { self.geometry.cluster_start(end) };
            if whole > offset {
                return Ok(Run::InPlace { host, len: whole - offset });
            }
        }
        let mut covered = 0;
        while covered < len {
            let at = offset.saturating_add(covered);
            let room = (self.geometry.cluster_end(at.saturating_add(1)) - at).min(len - covered);
            match self.metadata.extended_entry(at).await? {
                (found, L2Kind::Data { host }) if found.entry.copied() => {
                    if covered > 0 {
                        break;
                    }
                    return Ok(Run::Owned { host, bitmap: found.bitmap, len: room });
                }
                _ => covered = covered.saturating_add(room),
            }
        }
        Ok(Run::New { len: covered })
    }

    /// Writes `data` into the owned cluster at `host`. `bitmap` says which of its subclusters have data.
    async fn write_owned(
        &self,
        offset: u64,
        data: IoBuf,
        host: u64,
        bitmap: Subclusters,
    ) -> Result<()> {
        let first = self.geometry.cluster_start(offset);
        let end = offset.saturating_add(length(&data));
        let touched = Subclusters::touched_by(self.geometry, offset - first, end - first);
        let whole = self.round_out(offset, end, bitmap.allocated());
        let place = host.saturating_add(offset - first);
        self.fill(whole, offset, data, place, false).await?;
        let with_data =
            |_, old: ExtendedEntry| ExtendedEntry { bitmap: old.bitmap.with_data(touched), ..old };
        self.metadata.link_extended(first, 1, None, with_data).await
    }

    /// Extends the range from `offset` to `end` to whole subclusters. An end in a subcluster of `complete` is not
    /// extended.
    fn round_out(&self, offset: u64, end: u64, complete: u32) -> Range<u64> {
        let size = self.geometry.subcluster_size();
        let is_complete = |at: u64| {
            let index = self.geometry.offset_in_cluster(at) >> self.geometry.subcluster_bits();
            complete.checked_shr(u32::try_from(index).unwrap_or(SUBCLUSTERS)).unwrap_or(0) & 1 == 1
        };
        let start = if is_complete(offset) { offset } else { offset - offset % size };
        let last = end.saturating_sub(1);
        let end = if is_complete(last) { end } else { end.next_multiple_of(size) };
        start..end
    }

    /// Writes `data` into the new clusters of `run`, and copies the data of the other subclusters from the old
    /// clusters.
    pub(in super::super) async fn fill_new(
        &self,
        offset: u64,
        data: IoBuf,
        mut run: NewData<'_>,
    ) -> Result<()> {
        let first = self.geometry.cluster_start(offset);
        let end = offset.saturating_add(length(&data));
        let last = self.geometry.cluster_start(end.saturating_sub(1));
        let (start, count) = (run.start, run.count);
        let bits = self.geometry.cluster_bits;
        let untouched = self.data.reads_as_zeroes(&run);
        let host = |guest: u64| (start << bits).saturating_add(guest.saturating_sub(first));
        let mut head = self.carried(first, offset, end).await?;
        let mut tail = if last == first { 0 } else { self.carried(last, offset, end).await? };
        let (carried_head, carried_tail) = (head, tail);

        // Subclusters next to the data are written together with it. The others are copied separately.
        let mut whole = self.round_out(offset, end, 0);
        let size = self.geometry.subcluster_size();
        whole.start = self.take_before(first, whole.start, size, &mut head);
        let rest = if last == first { &mut head } else { &mut tail };
        whole.end = self.take_from(last, whole.end, size, rest);

        run.begin_write();
        let mut copies: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        for (cluster, mask) in [(first, head), (last, tail)] {
            for piece in self.ranges(cluster, mask) {
                copies.push(Box::pin(self.copy(piece.clone(), host(piece.start), untouched)));
            }
        }
        copies.push(Box::pin(self.fill(whole, offset, data, host(offset), untouched)));
        let copied = run_all(copies).await;
        let counted = run.count_if(copied, &self.clusters).await?;
        self.metadata
            .link_extended(first, count, counted, |index, old| {
                let guest = first.saturating_add(index << bits);
                let from = offset.max(guest) - guest;
                let to = end.min(guest.saturating_add(1 << bits)) - guest;
                let mut with_data = Subclusters::touched_by(self.geometry, from, to);
                if guest == first {
                    with_data |= carried_head;
                }
                if guest == last {
                    with_data |= carried_tail;
                }
                // Subclusters that had data and are not written have been copied.
                let others = match old.entry.is_compressed() {
                    true => Subclusters::NONE,
                    false => old.bitmap.without_data(),
                };
                ExtendedEntry {
                    entry: L2Entry::data(start.saturating_add(index) << bits),
                    bitmap: others.with_data(with_data),
                }
            })
            .await
    }

    /// The subclusters of a cluster whose data must be copied when `offset..end` is written to a new cluster.
    async fn carried(&self, cluster: u64, offset: u64, end: u64) -> Result<u32> {
        let (found, kind) = self.metadata.extended_entry(cluster).await?;
        let with_data = match kind {
            L2Kind::Compressed { .. } => u32::MAX,
            L2Kind::Data { .. } | L2Kind::Zero { .. } => found.bitmap.allocated(),
            L2Kind::Unallocated => 0,
        };
        let size = self.geometry.cluster_size();
        let from = offset.max(cluster) - cluster;
        let to = end.saturating_sub(cluster).min(size);
        Ok(with_data & !Subclusters::touched_by(self.geometry, from, to))
    }

    /// Removes the adjacent subclusters directly before `start` from `mask`. Returns the start of the first one.
    fn take_before(&self, cluster: u64, mut start: u64, size: u64, mask: &mut u32) -> u64 {
        while start > cluster {
            let before = start - size;
            let bit = Subclusters::touched_by(self.geometry, before - cluster, start - cluster);
            if *mask & bit == 0 {
                break;
            }
            *mask &= !bit;
            start = before;
        }
        start
    }

    /// Removes the adjacent subclusters directly behind `end` from `mask`. Returns the end of the last one.
    fn take_from(&self, cluster: u64, mut end: u64, size: u64, mask: &mut u32) -> u64 {
        while end < cluster.saturating_add(self.geometry.cluster_size()) {
            let next = end.saturating_add(size);
            let bit = Subclusters::touched_by(self.geometry, end - cluster, next - cluster);
            if *mask & bit == 0 {
                break;
            }
            *mask &= !bit;
            end = next;
        }
        end
    }

    /// The guest ranges of the subclusters of `mask` in a cluster.
    fn ranges(&self, cluster: u64, mask: u32) -> Vec<Range<u64>> {
        let bits = self.geometry.subcluster_bits();
        let mut ranges = Vec::new();
        let mut index = 0;
        while index < SUBCLUSTERS {
            let rest = mask >> index;
            if rest == 0 {
                break;
            }
            let start = index.saturating_add(rest.trailing_zeros());
            let end = start.saturating_add((mask >> start).trailing_ones());
            let at = |index: u32| cluster.saturating_add(u64::from(index) << bits);
            ranges.push(at(start)..at(end));
            index = end;
        }
        ranges
    }

    /// Copies the current contents of a guest range to `host`.
    async fn copy(&self, range: Range<u64>, host: u64, untouched: bool) -> Result<()> {
        let end = self.facts.end_of_data(range.end);
        match self.old_contents(range.start, end, untouched).await? {
            Some(data) => self.data.write_data(range.start, host, data).await,
            None => Ok(()),
        }
    }
}
