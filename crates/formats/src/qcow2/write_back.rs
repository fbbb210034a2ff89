//! Writing metadata back, in the order that a crash at any point survives.
//!
//! One cycle at a time (`writing_back`), and no lock that a hit or a writer needs is held across its I/O:
//!
//! 1. take the list of dropped references, the list of changed L1 entries, and copies of the dirty L2 slices, in that
//!    order: the copies then contain every change that the lists speak of, and every reference in them had its data
//!    written and its refcount raised in the cache before;
//! 2. write the dirty refcounts; flush, the data file too (data and refcounts are durable). With lazy refcounts, have the
//!    header say that they may be too low instead;
//! 3. write the copies; flush if anything follows that relies on them;
//! 4. write the L1 entries; flush if anything follows;
//! 5. only now lower the refcounts of what was dropped. What reaches 0 rests until the requests that may still be using
//!    it have ended (see `allocator`).
//!
//! A failure puts everything back as it was: still dirty, still to be dropped; refcounts that cannot be lowered are not a
//! failure, for the next cycle tries again. So does a cycle that is given up, and the
//! next one waits until the host has ended what it had begun (see `write_barrier`).

use std::collections::{BTreeSet, VecDeque};
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
use super::layout::{L1Entry, L2Entry, L2Kind};
use super::run_options::Modes;
use super::write::length;

/// Dropped runs that make a cycle start without anybody asking.
const MANY_DROPPED: usize = 8192;

/// Host clusters that lost one reference each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropped {
    cluster: u64,
    count: u64,
    was: ReleaseReason,
}

/// What a host cluster was to the reference that was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReleaseReason {
    /// Guest data.
    Data,
    /// Guest data that the guest discarded.
    Discarded,
    /// Guest data behind the end of the disk.
    CutOff,
    /// Guest data of a snapshot, or of the state before one was applied.
    Snapshot,
    /// An L1 or L2 table.
    Table,
}

impl Qcow2 {
    /// Hands the references that `old` entries held to the write-back. Their slices are marked dirty already.
    pub(super) fn drop_entries(&self, old: &[L2Entry], was: ReleaseReason) {
        if self.geometry.data_file {
            // Nothing counts what is there.
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
        let mut dropped = lock(&self.dropped);
        if let Some(last) = dropped.last_mut()
            && last.cluster.saturating_add(last.count) == cluster
            && last.was == was
        {
            last.count = last.count.saturating_add(count);
            return;
        }
        dropped.push(Dropped { cluster, count, was });
    }

    /// Writes back early if much was dropped.
    pub(super) async fn relieve(&self) -> Result<()> {
        let many = lock(&self.dropped).len() > MANY_DROPPED;
        if many { self.write_back(false).await } else { Ok(()) }
    }

    /// Sets an L1 entry and notes that it is to be written, as one: whoever sees the entry and flushes finds the note.
    pub(super) fn set_l1_entry(&self, index: u64, entry: L1Entry) {
        set_and_note(&self.l1, &self.l1_dirty, index, entry);
    }

    /// Runs one cycle. With `durable`, everything completed before the call is on stable storage afterwards (but
    /// for the lowering of refcounts, which may wait).
    pub(super) async fn write_back(&self, durable: bool) -> Result<()> {
        let _turn = self.writing_back.lock().await;
        let file = self.children.require(ChildIdx::FILE)?;
        let mut cycle = Cycle::begin(self);
        let drops = !cycle.dropped.is_empty();
        if cycle.has_work() {
            // What a pointer on disk names may not be what memory knows.
            self.check_usable()?;
        }
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, &cycle.copies, &cycle.l1, drops, durable).await;
        writing.done();
        outcome?;
        cycle.written();
        point();
        match self.lower(&mut cycle.dropped).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
            // All that was asked for is done. What is left is tried again by the next cycle.
            Err(error) => tracing::warn!("qcow2: refcounts stay too high for now: {error}"),
            Ok(()) => {}
        }
        self.recycle().await
    }

    async fn write_ordered(
        &self,
        file: &Edge,
        copies: &[DirtyCopy<'_>],
        l1: &BTreeSet<u64>,
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
            self.flush_data().await?;
            file.flush().await?;
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

    async fn write_l1(&self, file: &Edge, indices: &BTreeSet<u64>) -> Result<()> {
        let base = self.l1_offset.load(Relaxed);
        let bytes = self.l1_entries().saturating_mul(8);
        self.check_overlaps(Modes::ACTIVE_L1, base, bytes).await?;
        let writes = indices.iter().map(|index| {
            let place = base.saturating_add(index.saturating_mul(8));
            let entry = self.l1_entry(*index).0.to_be_bytes().to_vec();
            file.write(place, IoBuf::from(entry), WriteFlags::empty())
        });
        run_all(writes).await
    }

    /// Lowers the refcounts of what the disk no longer refers to, and takes it off the list as it does. What cannot be read
    /// now stays there.
    async fn lower(&self, dropped: &mut VecDeque<Dropped>) -> Result<()> {
        if dropped.is_empty() {
            return Ok(());
        }
        // A scan must not find a cluster whose refcount is 0 before it rests.
        let _turn = self.refcounts.allocator.scanning.lock().await;
        while let Some(Dropped { cluster, was, .. }) = dropped.front().copied() {
            let outcome = self.lower_one(cluster, was).await;
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

    async fn lower_one(&self, cluster: u64, was: ReleaseReason) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (offset, size) = (cluster << bits, self.geometry.cluster_size());
        if was != ReleaseReason::Table && self.is_protected(offset, size) {
            let text = format!("Preventing invalid freeing of metadata at offset {offset:#x}");
            return Err(self.mark_corrupt(&text, offset).await);
        }
        if self.refcounts.drop_one(cluster).await? > 0 {
            return Ok(());
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

    /// Gives rested clusters to the free map, telling the host first of those that it is to hear of.
    pub(super) async fn recycle(&self) -> Result<()> {
        if !self.refcounts.allocator.has_resting() {
            return Ok(());
        }
        // A scan would find those that are being discarded free as well.
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
                // It only saves space: the host may refuse.
                let _ = file.discard(start, end - start).await;
            }
            if let Some(run) = woken.runs.pop_front() {
                self.refcounts.allocator.free(run);
            }
        }
        Ok(())
    }

    /// Reserves up to `count` host clusters that lie together (at least one).
    pub(super) async fn reserve(&self, count: u64) -> Result<Reserved<'_>> {
        if self.refcounts.allocator.has_resting() {
            self.recycle().await?;
        }
        self.note_if_corrupt(self.refcounts.reserve(count).await, 0).await
    }

    /// The same for clusters that will surely be used: where they are the first of a refcount block, it is made at once. So
    /// it lies directly behind them, as in images that QEMU writes, whatever is reserved before they are counted.
    /// If the refcount table moves for that, what it leaves free counts as well. They are as many as are asked for, or
    /// fewer where the file cannot grow.
    pub(super) async fn reserve_to_use(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_to_use_behind(None, count).await
    }

    /// The same. Where clusters are free from `behind` on, they are taken, if fewer than are asked for.
    pub(super) async fn reserve_to_use_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
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

/// Clusters that have rested and are being discarded on the host, in their order. Dropped unfinished, those that are
/// left rest once more: the host may still be discarding the first of them, for a request that keeps its place in the
/// epoch until that has ended.
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

/// What one cycle is to write. Dropped unfinished (it failed, or was given up), it puts back what is left of it.
struct Cycle<'a> {
    image: &'a Qcow2,
    dropped: VecDeque<Dropped>,
    l1: BTreeSet<u64>,
    copies: Vec<DirtyCopy<'a>>,
}

impl<'a> Cycle<'a> {
    fn begin(image: &'a Qcow2) -> Self {
        let take_dropped = || std::mem::take(&mut *lock(&image.dropped));
        let take_l1 = || std::mem::take(&mut *lock(&image.l1_dirty));
        // In this order; see the module's text.
        let dropped = take_dropped().into();
        point();
        let l1 = take_l1();
        point();
        Self { image, dropped, l1, copies: image.l2.take_dirty() }
    }

    fn has_work(&self) -> bool {
        !(self.dropped.is_empty() && self.l1.is_empty() && self.copies.is_empty())
    }

    /// All is on disk; the references can be dropped now.
    fn written(&mut self) {
        self.l1.clear();
        self.copies.drain(..).for_each(DirtyCopy::written);
    }
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        lock(&self.image.l1_dirty).append(&mut self.l1);
        lock(&self.image.dropped).extend(self.dropped.drain(..));
    }
}

/// The entry is seen only while the note cannot be taken without it.
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

/// Neighbouring runs as one.
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Acquire;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn an_l1_entry_that_is_seen_has_been_noted() {
        let (entries, notes) = (Radix::default(), Mutex::default());
        let seen = || entries.get(7).is_some_and(|entry: &AtomicU64| entry.load(Acquire) != 0);
        std::thread::scope(|scope| {
            // Whoever takes the notes now does not find the entry's, so nobody may see the entry yet.
            let taking = lock(&notes);
            scope.spawn(|| set_and_note(&entries, &notes, 7, L1Entry::new(65536)));
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(!seen(), "the entry was set before it was noted");
                std::thread::yield_now();
            }
            drop(taking);
        });
        assert!(seen() && lock(&notes).contains(&7));
    }
}
