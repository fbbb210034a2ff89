//! The free map: which host clusters may be allocated.
//!
//! When the map has no suitable free clusters, `Clusters::scan_next` adds the free clusters of the next refcount block. The
//! lowest clusters come first, so that images stay compact. The search for free clusters begins behind the clusters that were
//! allocated last. When a cluster below that position becomes free, the search restarts at that cluster. Free runs that were
//! too short for a request stay unused until the search restarts, or until the image is opened again, as in QEMU.
//! [`Allocator::rewind`] also restarts the search, at the front of the file.
//!
//! A cluster that was scanned is in one of these states:
//!
//! - **free**: the cluster is in the map;
//! - **reserved**: a task owns the cluster in a [`Reserved`]. A [`Reserved`] that is dropped frees its clusters
//!   immediately if no write to these clusters has begun. Otherwise the clusters are quarantined;
//! - **in use**: its refcount is not 0;
//! - **quarantined**: freed, but a request that started before may still use the cluster. The cluster becomes free once the
//!   epoch in which it was freed has passed.
//!
//! The mutex of the map is never held across I/O.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::{Edge, Epochs, Error, Result};
use oxblk_ring::Mutex as AsyncMutex;
use roaring::RoaringTreemap;

use crate::qcow2::layout::Geometry;

/// Contiguous clusters that were freed in one epoch, and that are quarantined.
#[derive(Clone, Copy)]
pub(in crate::qcow2) struct Quarantined {
    pub(in crate::qcow2) epoch: u64,
    pub(in crate::qcow2) cluster: u64,
    pub(in crate::qcow2) count: u64,
    /// The clusters are discarded on the host before they become free.
    pub(in crate::qcow2) discard: bool,
}

struct Map {
    /// Free runs, start to length.
    free: BTreeMap<u64, u64>,
    quarantined: VecDeque<Quarantined>,
    /// The search for free clusters begins here.
    next: u64,
    /// Clusters below this number have been scanned.
    scanned: u64,
    /// Clusters from this number on read as zeroes, because they lay behind the end of the file and were not written since
    /// then.
    untouched: u64,
    /// Clusters from this number on lay behind the end of the file when the file was opened or last truncated.
    new_from: u64,
    /// Clusters that contain metadata.
    metadata: RoaringTreemap,
}

/// Allocates host clusters. Its free map is filled lazily from the refcount blocks.
pub(super) struct Allocator {
    geometry: Geometry,
    map: Mutex<Map>,
    pub(super) epochs: Arc<Epochs>,
    /// Held by the task that fills the map, and while refcounts drop to 0.
    pub(super) scanning: AsyncMutex<()>,
}

/// The first cluster that lies completely behind the end of the file. This cluster and all later ones read as zeroes. The
/// result is `u64::MAX` if the file cannot grow.
fn untouched(geometry: Geometry, file: &Edge) -> u64 {
    if file.node().limits().grows {
        file.size().div_ceil(geometry.cluster_size())
    } else {
        u64::MAX
    }
}

impl Allocator {
    /// A map without free clusters. The header cluster is recorded as metadata.
    pub(super) fn new(geometry: Geometry, file: &Edge, epochs: Arc<Epochs>) -> Self {
        let untouched = untouched(geometry, file);
        let metadata = RoaringTreemap::from_iter([0]);
        let map = Map {
            free: BTreeMap::new(),
            quarantined: VecDeque::new(),
            next: 0,
            scanned: 0,
            untouched,
            new_from: untouched,
            metadata,
        };
        Self { geometry, map: Mutex::new(map), epochs, scanning: AsyncMutex::new(()) }
    }

    /// Call this when the file may have become longer. The new part may contain data, so the new part no longer counts as
    /// untouched.
    pub(super) fn note_file_size(&self, file: &Edge) {
        let untouched = untouched(self.geometry, file);
        let mut map = self.lock();
        map.untouched = map.untouched.max(untouched);
    }

    /// Forgets which clusters are free, because another program may have changed the image. The caller ensures that the node is
    /// drained. So no request uses quarantined clusters.
    pub(super) fn forget_free(&self) {
        let mut map = self.lock();
        map.free.clear();
        map.quarantined.clear();
        map.next = 0;
        map.scanned = 0;
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clusters(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        let first = offset >> self.geometry.cluster_bits;
        let end = offset.saturating_add(bytes).div_ceil(self.geometry.cluster_size());
        first..end
    }

    /// Records that a range of the file contains metadata. An allocation of a cluster of this range fails (`Corrupt`).
    pub(super) fn note_metadata(&self, offset: u64, bytes: u64) {
        self.lock().metadata.insert_range(self.clusters(offset, bytes));
    }

    /// Records that a range of the file no longer contains metadata.
    pub(super) fn forget_metadata(&self, offset: u64, bytes: u64) {
        self.lock().metadata.remove_range(self.clusters(offset, bytes));
    }

    /// Forgets all ranges with metadata except the header cluster. The caller records the current ranges.
    pub(super) fn forget_all_metadata(&self) {
        self.lock().metadata = RoaringTreemap::from_iter([0]);
    }

    /// Whether any cluster of a range of the file contains metadata.
    pub(super) fn is_metadata(&self, offset: u64, bytes: u64) -> bool {
        let range = self.clusters(offset, bytes);
        self.lock().metadata.range_cardinality(range) > 0
    }

    /// Reserves up to `count` contiguous clusters that end at or before `limit`. Returns `None` when the search finds no free
    /// cluster before `limit`.
    pub(super) fn take(&self, count: u64, limit: u64) -> Result<Option<Reserved<'_>>> {
        let mut map = self.lock();
        let Some((start, len)) = map.find(1, limit) else { return Ok(None) };
        self.reserve_run(&mut map, start, count.min(len).max(1)).map(Some)
    }

    /// Reserves exactly `count` contiguous clusters that end at or before `limit`. Returns `None` when the search finds no such
    /// run.
    pub(super) fn take_contiguous(&self, count: u64, limit: u64) -> Result<Option<Reserved<'_>>> {
        let mut map = self.lock();
        let Some((start, _)) = map.find(count, limit) else { return Ok(None) };
        self.reserve_run(&mut map, start, count).map(Some)
    }

    /// Reserves the `count` clusters from `start` on. Returns `None` if one of them is not free, or if `count` is 0.
    pub(super) fn take_at(&self, start: u64, count: u64) -> Result<Option<Reserved<'_>>> {
        let mut map = self.lock();
        let end = start.saturating_add(count);
        if count == 0 {
            return Ok(None);
        }
        let run = map.free.range(..=start).next_back();
        match run.map(|(first, len)| first.saturating_add(*len)) {
            Some(last) if last >= end => {
                let next = map.next;
                let reserved = self.reserve_run(&mut map, start, count)?;
                map.next = next;
                Ok(Some(reserved))
            }
            _ => Ok(None),
        }
    }

    /// Reserves up to `count` clusters from `start` on. Returns `None` if cluster `start` is not free, or if `count` is 0.
    pub(super) fn take_from(&self, start: u64, count: u64) -> Result<Option<Reserved<'_>>> {
        let end = {
            let map = self.lock();
            let run = map.free.range(..=start).next_back();
            run.map_or(0, |(first, len)| first.saturating_add(*len))
        };
        self.take_at(start, end.saturating_sub(start).min(count))
    }

    /// Restarts the search for free clusters at the front of the file.
    pub(super) fn rewind(&self) {
        self.lock().next = 0;
    }

    /// Removes free clusters from the map and reserves them. Fails if one of them contains metadata.
    fn reserve_run(&self, map: &mut Map, start: u64, count: u64) -> Result<Reserved<'_>> {
        map.remove(start, count);
        let end = start.saturating_add(count);
        map.next = end;
        if map.metadata.range_cardinality(start..end) > 0 {
            return Err(Error::corrupt(format!(
                "Preventing invalid allocation of {count} clusters at offset {:#x}: they hold metadata",
                start << self.geometry.cluster_bits
            )));
        }
        let untouched = start >= map.untouched;
        map.untouched = map.untouched.max(end);
        Ok(Reserved { allocator: self, start, count, untouched, written: false })
    }

    /// Whether the first run of `count` free clusters ends at or before `limit`. Restarts the search for free clusters at the
    /// front, so that a following reservation finds this run.
    pub(super) fn has_run_below(&self, count: u64, limit: u64) -> bool {
        let mut map = self.lock();
        map.next = 0;
        let first = map.free.iter().find(|(_, len)| **len >= count);
        first.is_some_and(|(start, _)| start.saturating_add(count) <= limit)
    }

    /// Whether the map has at least `wanted` free clusters in front of `limit`.
    pub(super) fn has_free(&self, wanted: u64, limit: u64) -> bool {
        let mut found = 0_u64;
        self.lock().free.range(..limit).any(|(start, len)| {
            found = found.saturating_add((*len).min(limit.saturating_sub(*start)));
            found >= wanted
        })
    }

    /// Call this when the file was truncated at the start of `cluster`. The clusters from `cluster` on read as zeroes again.
    pub(super) fn note_truncated(&self, cluster: u64) {
        let mut map = self.lock();
        map.untouched = map.untouched.min(cluster);
        map.new_from = map.new_from.min(cluster);
    }

    /// Whether a cluster was allocated for data behind the end that the file had when it was opened or last truncated.
    pub(super) fn is_new_data(&self, cluster: u64) -> bool {
        let map = self.lock();
        (map.new_from..map.untouched).contains(&cluster) && !map.metadata.contains(cluster)
    }

    /// First cluster that has not been scanned.
    pub(super) fn scanned(&self) -> u64 {
        self.lock().scanned
    }

    /// Records the free runs found by a scan of `start..end`. Does nothing if `start` is not the first cluster that has not
    /// been scanned. Quarantined clusters have a refcount of 0 too, but are not free yet.
    pub(super) fn add_scanned(&self, start: u64, end: u64, runs: Vec<(u64, u64)>) {
        let mut map = self.lock();
        if map.scanned != start {
            return;
        }
        map.scanned = end;
        let next = map.next;
        for (first, last) in runs {
            map.insert(first, last - first);
        }
        map.next = next;
        let quarantined: Vec<Quarantined> = map.quarantined.iter().copied().collect();
        for run in quarantined {
            map.remove(run.cluster, run.count);
        }
    }

    /// Quarantines clusters. The clusters become free when the epoch has passed. If the refcounts of the clusters became 0,
    /// the caller holds [`Self::scanning`] from before the change of the refcounts until this function returns.
    pub(super) fn quarantine(&self, run: Quarantined) {
        self.lock().quarantined.push_back(run);
    }

    /// Frees the quarantined clusters whose epoch has passed. Runs that must be discarded on the host first are returned
    /// instead; after the discard, [`Self::free`] frees them.
    pub(super) fn end_quarantine(&self, epochs: &Epochs) -> Vec<Quarantined> {
        let mut to_discard = Vec::new();
        let mut map = self.lock();
        while let Some(front) = map.quarantined.front().copied() {
            if !epochs.has_passed(front.epoch) {
                break;
            }
            map.quarantined.pop_front();
            if front.discard {
                to_discard.push(front);
            } else {
                map.insert_scanned(front.cluster, front.count);
            }
        }
        to_discard
    }

    /// Frees clusters that [`Self::end_quarantine`] returned.
    pub(super) fn free(&self, run: Quarantined) {
        self.lock().insert_scanned(run.cluster, run.count);
    }

    /// Whether any cluster is quarantined.
    pub(super) fn has_quarantined(&self) -> bool {
        !self.lock().quarantined.is_empty()
    }
}

impl Map {
    /// The first run of at least `count` free clusters in front of `limit`, as start and length. The search begins at `next`.
    fn find(&self, count: u64, limit: u64) -> Option<(u64, u64)> {
        let around = self.free.range(..self.next).next_back();
        let rest = |(start, len): (&u64, &u64)| {
            let first = self.next.max(*start);
            (first, start.saturating_add(*len).min(limit).saturating_sub(first))
        };
        let mut runs = around.into_iter().chain(self.free.range(self.next..)).map(rest);
        runs.find(|(_, len)| *len >= count)
    }

    /// Adds the part of a run that lies in scanned clusters. A later scan finds the remaining part.
    fn insert_scanned(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len).min(self.scanned);
        if start < end {
            self.insert(start, end - start);
        }
    }

    /// Removes a range from the free runs.
    fn remove(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let overlapping: Vec<(u64, u64)> = self
            .free
            .range(..end)
            .rev()
            .map(|(first, len)| (*first, first.saturating_add(*len)))
            .take_while(|(_, last)| *last > start)
            .collect();
        for (first, last) in overlapping {
            self.free.remove(&first);
            if first < start {
                self.free.insert(first, start - first);
            }
            if last > end {
                self.free.insert(end, last - end);
            }
        }
    }

    /// Adds a run, merged with its neighbours.
    fn insert(&mut self, start: u64, len: u64) {
        let (mut start, mut len) = (start, len);
        self.next = self.next.min(start);
        debug_assert!(
            self.free
                .range(..start.saturating_add(len))
                .next_back()
                .is_none_or(|(s, l)| s + l <= start),
            "clusters freed twice"
        );
        if let Some((before, before_len)) =
            self.free.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before.saturating_add(before_len) == start
        {
            self.free.remove(&before);
            start = before;
            len = len.saturating_add(before_len);
        }
        if let Some(after_len) = self.free.remove(&start.saturating_add(len)) {
            len = len.saturating_add(after_len);
        }
        self.free.insert(start, len);
    }
}

/// Contiguous host clusters that a task has reserved, and whose refcounts are not raised yet.
pub(in crate::qcow2) struct Reserved<'a> {
    allocator: &'a Allocator,
    start: u64,
    count: u64,
    untouched: bool,
    written: bool,
}

impl<'a> Reserved<'a> {
    /// First cluster of the run.
    pub(in crate::qcow2) fn start(&self) -> u64 {
        self.start
    }

    /// Number of clusters.
    pub(in crate::qcow2) fn count(&self) -> u64 {
        self.count
    }

    /// Whether the clusters read as zeroes, because they lay behind the end of the file and were not written since then.
    pub(in crate::qcow2) fn is_untouched(&self) -> bool {
        self.untouched
    }

    /// Call this before the first write to the clusters. If the [`Reserved`] is dropped after this call, a write may still be
    /// in flight. So the drop quarantines the clusters until all current requests have ended.
    pub(in crate::qcow2) fn begin_write(&mut self) {
        self.written = true;
    }

    /// Marks the clusters as in use. The drop of the [`Reserved`] then does not free the clusters.
    pub(in crate::qcow2) fn keep(mut self) {
        self.count = 0;
    }

    /// Splits off the first `count` clusters.
    #[must_use]
    pub(in crate::qcow2) fn split_first(&mut self, count: u64) -> Self {
        let Self { allocator, start, untouched, written, .. } = *self;
        let count = count.min(self.count);
        self.start = start.saturating_add(count);
        self.count -= count;
        Self { allocator, start, count, untouched, written }
    }

    /// Frees the clusters immediately. Nothing was written to the clusters, or all writes to the clusters have ended.
    pub(in crate::qcow2) fn give_back(mut self) {
        self.written = false;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        let (cluster, count) = (self.start, self.count);
        if self.written {
            // The clusters were scanned before they were reserved, so no later scan adds them to the map.
            let epoch = self.allocator.epochs.current();
            self.allocator.quarantine(Quarantined { epoch, cluster, count, discard: false });
        } else {
            self.allocator.lock().insert(cluster, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_runs_merge() {
        let mut map = Map {
            free: BTreeMap::new(),
            quarantined: VecDeque::new(),
            next: 0,
            scanned: 0,
            untouched: 0,
            new_from: 0,
            metadata: RoaringTreemap::new(),
        };
        map.insert(10, 2);
        map.insert(14, 2);
        map.insert(12, 2);
        assert_eq!(map.free, BTreeMap::from([(10, 6)]));
        map.remove(11, 3);
        assert_eq!(map.free, BTreeMap::from([(10, 1), (14, 2)]));
    }
}
