//! Filling new clusters of an image with subclusters, and choosing the subclusters that are copied.

use std::ops::Range;

use oxblk_core::{BoxFuture, Result, run_all};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::data::NewData;
use super::super::fill::length;
use super::super::layout::{ExtendedEntry, L2Entry, L2Kind, SUBCLUSTERS, Subclusters};

impl Qcow2 {
    /// Extends the range from `offset` to `end` to whole subclusters. `complete` is a mask of subclusters that have data: a
    /// start or end of the range inside such a subcluster is not moved.
    pub(super) fn round_to_subclusters(&self, offset: u64, end: u64, complete: u32) -> Range<u64> {
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

    /// Writes `data` into the new clusters of `run`, and copies the data of the other subclusters from the old clusters.
    /// Then makes the L2 entries refer to the new clusters.
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
        let mut head = self.data_to_copy(first, offset, end).await?;
        let mut tail = if last == first { 0 } else { self.data_to_copy(last, offset, end).await? };
        let (copied_head, copied_tail) = (head, tail);

        // The subclusters next to the data are written together with the data. The others are copied separately.
        let mut whole = self.round_to_subclusters(offset, end, 0);
        let size = self.geometry.subcluster_size();
        whole.start = self.extend_before(first, whole.start, size, &mut head);
        let rest = if last == first { &mut head } else { &mut tail };
        whole.end = self.extend_behind(last, whole.end, size, rest);

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
                    with_data |= copied_head;
                }
                if guest == last {
                    with_data |= copied_tail;
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
    async fn data_to_copy(&self, cluster: u64, offset: u64, end: u64) -> Result<u32> {
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

    /// Removes the adjacent subclusters directly before `start` from `mask`. Returns the start of the first removed subcluster,
    /// or `start` if none is removed.
    fn extend_before(&self, cluster: u64, mut start: u64, size: u64, mask: &mut u32) -> u64 {
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

    /// Removes the adjacent subclusters directly behind `end` from `mask`. Returns the end of the last removed subcluster, or
    /// `end` if none is removed.
    fn extend_behind(&self, cluster: u64, mut end: u64, size: u64, mask: &mut u32) -> u64 {
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

    /// Copies the current contents of a guest range to the host offset `host`.
    async fn copy(&self, range: Range<u64>, host: u64, untouched: bool) -> Result<()> {
        let end = self.image_state.end_of_data(range.end);
        match self.old_contents(range.start, end, untouched).await? {
            Some(data) => self.data.write_data(range.start, host, data).await,
            None => Ok(()),
        }
    }
}
