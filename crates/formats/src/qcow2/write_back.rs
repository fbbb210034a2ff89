//! Writing metadata back, in an order that survives a crash at any point.
//!
//! One cycle runs at a time (`writing_back`). A cycle holds no lock across its I/O that a cache hit or a guest write needs. Its
//! steps are:
//!
//! 1. take the list of dropped references, the changed L1 entries with their values, and copies of the dirty L2 slices, in that
//!    order. So the copies contain every change to which the lists belong. For each reference in the copies, the data was written
//!    and the refcount was raised in the cache before;
//! 2. write the dirty refcounts; flush the file and the data file, so that data and refcounts are durable. With lazy refcounts,
//!    set the dirty bit in the header instead of writing refcounts;
//! 3. write the copies; flush if a later step relies on them;
//! 4. write the L1 entries; flush if a later step relies on them;
//! 5. lower the refcounts of the dropped references. Clusters whose refcount reaches 0 are quarantined until the requests that
//!    may still use them have ended (see `allocator`).
//!
//! A cycle that fails or is cancelled restores its input: slices and L1 entries are dirty again, and the dropped references
//! stay in the list. The next cycle waits until the I/O of a cancelled cycle has ended (see `write_barrier`). An I/O error in
//! step 5 does not fail the cycle: the next cycle tries to lower these refcounts again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, Release},
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use oxblk_core::{ChildIdx, Edge, ErrorKind, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Qcow2;
use super::allocator::{Quarantined, Reserved};
use super::cache::{DirtyCopy, Radix};
use super::dropped::{Dropped, ReleaseReason};
use super::layout::{L1Entry, L2Entry, L2Kind};
use super::run_options::Modes;
use super::write::length;

/// With more dropped runs than this, [`Qcow2::relieve`] runs a cycle.
const MANY_DROPPED: usize = 8192;

impl Qcow2 {
    /// Hands the references of the entries `old` to the write-back. Their slices are already marked dirty.
    pub(super) fn drop_entries(&self, old: &[L2Entry], was: ReleaseReason) {
        if self.geometry.data_file {
            // Clusters of a data file have no refcounts.
            return;
        }
        for entry in old {
            let (host, bytes) = match entry.kind(self.geometry, self.version) {
                Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => {
                    (host, self.geometry.cluster_size())
                }
                Ok(L2Kind::Compressed { host, len }) => (host, len),
                _ => continue,
            };
            let first = host >> self.geometry.cluster_bits;
            let last = host.saturating_add(bytes).saturating_sub(1) >> self.geometry.cluster_bits;
            self.drop_clusters(first, last.saturating_sub(first).saturating_add(1), was);
        }
    }

    /// Hands one reference of each of `count` host clusters to the write-back.
    pub(super) fn drop_clusters(&self, cluster: u64, count: u64, was: ReleaseReason) {
        self.refcounts.dropped.push(cluster, count, was);
    }

    /// Runs a write-back cycle if many references were dropped, or if some were and free clusters are needed soon. Clusters that
    /// the cycle frees can be reused after all current requests have ended, so this must happen before the file is full.
    pub(super) async fn relieve(&self) -> Result<()> {
        let dropped = self.refcounts.dropped.len();
        if dropped == 0 || dropped <= MANY_DROPPED && !self.refcounts.is_nearly_full().await? {
            return Ok(());
        }
        self.write_back(false).await
    }

    /// Sets an L1 entry and marks it dirty, atomically. So a thread that sees the new entry and then flushes also writes it.
    pub(super) fn set_l1_entry(&self, index: u64, entry: L1Entry) {
        set_and_note(&self.l1, &self.l1_dirty, index, entry);
    }

    /// Runs one cycle. With `durable`, all changes that completed before the call are on stable storage afterwards. Only the
    /// lowering of refcounts may happen later.
    pub(super) async fn write_back(&self, durable: bool) -> Result<()> {
        let _turn = self.writing_back.lock().await;
        let file = self.children.require(ChildIdx::FILE)?;
        let mut cycle = Cycle::begin(self);
        if let Err(stopped) = self.check_usable() {
            // A pointer on disk may differ from memory, so no metadata may be written. Without changed tables, nothing is lost:
            // refcounts on disk may only be too high.
            return if cycle.changes_tables() {
                Err(stopped)
            } else {
                self.flush_files(&file).await
            };
        }
        let drops = !cycle.dropped.is_empty();
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, &cycle.copies, &cycle.l1, drops, durable).await;
        writing.done();
        outcome?;
        cycle.written();
        point();
        match self.lower(&mut cycle.dropped).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
            // The requested data is durable. The next cycle lowers the remaining refcounts.
            Err(error) => tracing::warn!(
                "qcow2: refcounts could not be lowered yet; the next write-back tries again: {error}"
            ),
            Ok(()) => {}
        }
        self.recycle().await
    }

    /// Makes the data durable that is in the files.
    async fn flush_files(&self, file: &Edge) -> Result<()> {
        self.flush_data().await?;
        file.flush().await
    }

    async fn write_ordered(
        &self,
        file: &Edge,
        copies: &[DirtyCopy<'_>],
        l1: &BTreeMap<u64, L1Entry>,
        drops: bool,
        durable: bool,
    ) -> Result<()> {
        let postponed = self.modes().contains(Modes::LAZY);
        if !postponed {
            self.write_back_refcounts().await?;
        }
        if !copies.is_empty() || !l1.is_empty() {
            if postponed {
                self.postpone_refcounts().await?;
            }
            self.flush_files(file).await?;
            self.write_slices(file, copies).await?;
        }
        if !l1.is_empty() {
            file.flush().await?;
            self.write_l1(file, l1).await?;
        }
        if durable {
            self.flush_data().await?;
        }
        if drops || durable {
            file.flush().await?;
        }
        Ok(())
    }

    async fn write_slices(&self, file: &Edge, copies: &[DirtyCopy<'_>]) -> Result<()> {
        let mut writes = Vec::with_capacity(copies.len());
        for copy in copies {
            if let Some(place) = self.slice_place(copy.slice).await? {
                self.check_overlaps(Modes::ACTIVE_L2, place, length(&copy.bytes)).await?;
                writes.push(file.write(
                    place,
                    IoBuf::from(copy.bytes.clone()),
                    WriteFlags::empty(),
                ));
            }
        }
        run_all(writes).await
    }

    async fn write_l1(&self, file: &Edge, entries: &BTreeMap<u64, L1Entry>) -> Result<()> {
        let base = self.l1_offset.load(Relaxed);
        let bytes = self.l1_entries().saturating_mul(8);
        self.check_overlaps(Modes::ACTIVE_L1, base, bytes).await?;
        let writes = entries.iter().map(|(index, entry)| {
            let place = base.saturating_add(index.saturating_mul(8));
            let entry = entry.0.to_be_bytes().to_vec();
            file.write(place, IoBuf::from(entry), WriteFlags::empty())
        });
        run_all(writes).await
    }

    /// Lowers the refcounts of references that are gone from the disk, and removes them from the list. A reference whose
    /// refcount cannot be read stays in the list. A refcount that is 0 already is no error: the data is durable, and a check
    /// repairs such refcounts.
    async fn lower(&self, dropped: &mut VecDeque<Dropped>) -> Result<()> {
        if dropped.is_empty() {
            return Ok(());
        }
        let mut missing = Missing::default();
        // A scan must not find a cluster with refcount 0 before the cluster is quarantined.
        let _turn = self.refcounts.allocator.scanning.lock().await;
        while let Some(Dropped { cluster, was, .. }) = dropped.front().copied() {
            let outcome = self.lower_one(cluster, was, &mut missing).await;
            if matches!(&outcome, Err(error) if error.kind() != ErrorKind::Corrupt) {
                return outcome;
            }
            if let Some(run) = dropped.front_mut() {
                run.cluster = run.cluster.saturating_add(1);
                run.count = run.count.saturating_sub(1);
                if run.count == 0 {
                    dropped.pop_front();
                }
            }
            outcome?;
        }
        Ok(())
    }

    async fn lower_one(
        &self,
        cluster: u64,
        was: ReleaseReason,
        missing: &mut Missing,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (offset, size) = (cluster << bits, self.geometry.cluster_size());
        if was != ReleaseReason::Table && self.is_protected(offset, size) {
            let text = format!("Preventing invalid freeing of metadata at offset {offset:#x}");
            return Err(self.mark_corrupt(&text, offset).await);
        }
        match self.refcounts.drop_one(cluster).await {
            Ok(0) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                missing.add(offset);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        point();
        if was == ReleaseReason::Table {
            self.refcounts.allocator.forget_metadata(offset, size);
        }
        self.compressed_tail.leave(cluster, bits);
        let (epoch, discard) = (self.epochs.current(), self.passes_discard(was));
        self.refcounts.allocator.rest(Quarantined { epoch, cluster, count: 1, discard });
        Ok(())
    }

    /// Frees the quarantined clusters whose epoch has passed. Discards them on the host first where that is required.
    pub(super) async fn recycle(&self) -> Result<()> {
        if !self.refcounts.allocator.has_resting() {
            return Ok(());
        }
        // Otherwise a scan would find the clusters that are being discarded as free.
        let _turn = self.refcounts.allocator.scanning.lock().await;
        let woken = self.refcounts.allocator.wake(&self.epochs);
        if woken.is_empty() {
            return Ok(());
        }
        let file = self.children.require(ChildIdx::FILE)?;
        let mut woken = Woken { image: self, runs: merge(woken).into() };
        while let Some(run) = woken.runs.front() {
            let bits = self.geometry.cluster_bits;
            let end = (run.cluster.saturating_add(run.count) << bits).min(file.size());
            let start = run.cluster << bits;
            if start < end {
                // The discard only saves space, so its errors are ignored.
                let _ = file.discard(start, end - start).await;
            }
            if let Some(run) = woken.runs.pop_front() {
                self.refcounts.allocator.free(run);
            }
        }
        Ok(())
    }

    /// Reserves up to `count` contiguous host clusters, and at least one.
    pub(super) async fn reserve(&self, count: u64) -> Result<Reserved<'_>> {
        if self.refcounts.allocator.has_resting() {
            self.recycle().await?;
        }
        self.note_if_corrupt(self.refcounts.reserve(count).await, 0).await
    }

    /// Reserves `count` contiguous host clusters that the caller will use, or fewer if the file cannot grow. Missing refcount
    /// blocks for these clusters are created immediately. So a new refcount block lies directly behind the clusters, as in
    /// images that QEMU writes. If the refcount table moves because of this, the reservation is repeated, because the old
    /// table's clusters have become free.
    pub(super) async fn reserve_to_use(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_to_use_behind(None, count).await
    }

    /// As [`Self::reserve_to_use`]. If cluster `behind` is free, takes the free clusters from there on, even if they are fewer
    /// than `count`.
    pub(super) async fn reserve_to_use_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
        self.relieve().await?;
        loop {
            if self.refcounts.allocator.has_resting() {
                self.recycle().await?;
            }
            let reserved = self.refcounts.reserve_run_behind(behind, count).await;
            let reserved = self.note_if_corrupt(reserved, 0).await?;
            if !self.refcounts.ensure_blocks(reserved.start(), reserved.count()).await? {
                return Ok(reserved);
            }
            reserved.give_back();
        }
    }
}

/// Clusters whose quarantine has ended and that are being discarded on the host, in order. If this is dropped early, the
/// remaining clusters are quarantined again. The host may still be discarding the first of them; the cancelled request stays in
/// the epoch until that discard has ended.
struct Woken<'a> {
    image: &'a Qcow2,
    runs: VecDeque<Quarantined>,
}

impl Drop for Woken<'_> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            let epoch = self.image.epochs.current();
            self.image.refcounts.allocator.rest(Quarantined { epoch, ..run });
        }
    }
}

/// The input of one cycle. If it is dropped early, because the cycle failed or was cancelled, the remaining input is restored.
struct Cycle<'a> {
    image: &'a Qcow2,
    dropped: VecDeque<Dropped>,
    /// The changed L1 entries, with the values that they had when the cycle began. A later value may refer to a table that this
    /// cycle does not write.
    l1: BTreeMap<u64, L1Entry>,
    copies: Vec<DirtyCopy<'a>>,
}

impl<'a> Cycle<'a> {
    fn begin(image: &'a Qcow2) -> Self {
        let take_l1 = || {
            let mut notes = lock(&image.l1_dirty);
            std::mem::take(&mut *notes).into_iter().map(|at| (at, image.l1_entry(at))).collect()
        };
        // The order matters; see the module's text.
        let dropped = image.refcounts.dropped.take().into();
        point();
        let l1 = take_l1();
        point();
        Self { image, dropped, l1, copies: image.l2.take_dirty() }
    }

    fn changes_tables(&self) -> bool {
        !(self.l1.is_empty() && self.copies.is_empty())
    }

    /// Call this when all is on disk: the dropped references can be released now.
    fn written(&mut self) {
        self.l1.clear();
        self.copies.drain(..).for_each(DirtyCopy::written);
    }
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        lock(&self.image.l1_dirty).extend(std::mem::take(&mut self.l1).into_keys());
        self.image.refcounts.dropped.restore(self.dropped.drain(..));
    }
}

/// Sets the entry and its dirty note under one lock, so that no cycle takes the notes between the two.
fn set_and_note(
    entries: &Radix<AtomicU64>,
    notes: &Mutex<BTreeSet<u64>>,
    index: u64,
    entry: L1Entry,
) {
    let mut notes = lock(notes);
    entries.get_or_make(index).store(entry.0, Release);
    point();
    notes.insert(index);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Merges adjacent runs.
fn merge(mut runs: Vec<Quarantined>) -> Vec<Quarantined> {
    runs.sort_unstable_by_key(|run| run.cluster);
    let mut merged: Vec<Quarantined> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.cluster.saturating_add(last.count) == run.cluster => {
                last.count = last.count.saturating_add(run.count);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// Clusters that lost a reference although their refcounts were 0. They are reported together when this is dropped.
#[derive(Default)]
struct Missing {
    first: Option<u64>,
    count: u64,
}

impl Missing {
    fn add(&mut self, offset: u64) {
        self.first.get_or_insert(offset);
        self.count = self.count.saturating_add(1);
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        if let Some(offset) = self.first {
            tracing::warn!(
                "qcow2: {} freed clusters had no refcount (the first at offset {offset:#x}); 'img check -r all' repairs the image",
                self.count
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Acquire;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_visible_l1_entry_is_already_marked_dirty() {
        let (entries, notes) = (Radix::default(), Mutex::default());
        let seen = || entries.get(7).is_some_and(|entry: &AtomicU64| entry.load(Acquire) != 0);
        std::thread::scope(|scope| {
            // This thread holds the notes without the entry's note, so no thread may see the entry yet.
            let taking = lock(&notes);
            scope.spawn(|| set_and_note(&entries, &notes, 7, L1Entry::new(65536)));
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(!seen(), "the entry was visible before it was marked dirty");
                std::thread::yield_now();
            }
            drop(taking);
        });
        assert!(seen() && lock(&notes).contains(&7));
    }
}
