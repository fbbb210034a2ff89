//! The allocator of blocks. It records which blocks of the file are in use.
//!
//! [`Allocator::reserve`] allocates the lowest free blocks first, so that gaps are filled. Blocks are reserved as a
//! [`Run`]. Dropping a run returns its blocks, unless the map refers to them ([`Run::keep`]). If writes to the blocks are
//! in flight, the blocks are returned after the host has completed these writes. A freed block is quarantined until every
//! request that may have mapped it has ended.
//!
//! Blocks are allocated only while the allocator knows which blocks are in use. The allocator does not know this in an
//! image that was opened read-only or for a check, and after a repair that failed ([`Repair`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use oxblk_core::{Epochs, Errno, Error, Result};
use oxblk_ring::{Event, UntilSettled};
use roaring::RoaringBitmap;

use super::survey::end_of;

#[derive(Debug, Default)]
struct State {
    /// First block of the unused space at the end of the file.
    end: u32,
    /// Unused blocks before `end`.
    gaps: RoaringBitmap,
    /// Blocks with this number or a higher one contain no data. They read as zeroes once the file is long enough.
    fresh: u32,
    /// The largest value that `end` has had since the image was opened or the file was truncated, or the value that the last
    /// [`Allocator::set_used`] required.
    max_end: u32,
    /// Freed blocks with the epochs in which they were freed, oldest first.
    quarantined: VecDeque<(u64, u32)>,
    /// Whether the fields above are correct.
    is_known: bool,
    /// Number of blocks of dropped runs whose writes may still be in flight.
    returning: u64,
}

/// Allocates blocks of the file.
#[derive(Debug)]
pub(crate) struct Allocator {
    /// Maximum number of blocks. The map cannot refer to blocks with this number or a higher one.
    limit: u32,
    epochs: Arc<Epochs>,
    state: Mutex<State>,
    /// Notified when blocks of a dropped run are free again.
    returned: Event,
}

/// Reserved contiguous blocks. No other request can reserve them.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) start: u32,
    pub(crate) count: u32,
    /// The blocks contain no data, and read as zeroes once the file is long enough.
    pub(crate) fresh: bool,
    give_back: Option<UntilSettled<GiveBack>>,
}

impl Run {
    /// The block after the last block of the run.
    pub(crate) fn end(&self) -> u32 {
        self.start.saturating_add(self.count)
    }

    /// Ends the reservation: the map refers to all blocks.
    pub(crate) fn keep(mut self) {
        if let Some(mut back) = self.give_back.take().and_then(UntilSettled::release) {
            back.count = 0;
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(back) = self.give_back.take().and_then(UntilSettled::release) {
            let mut state = back.allocator.lock();
            state.returning = state.returning.saturating_add(self.count.into());
            drop(state);
            drop(UntilSettled::new(back));
        }
    }
}

#[derive(Debug)]
struct GiveBack {
    allocator: Arc<Allocator>,
    start: u32,
    count: u32,
}

impl Drop for GiveBack {
    fn drop(&mut self) {
        if self.count > 0 {
            self.allocator.give_back(self.start, self.count);
        }
    }
}

/// A repair of the image. During the repair, requests allocate no blocks. If this value is dropped before [`Repair::done`],
/// the allocator no longer knows which blocks are in use.
pub(crate) struct Repair<'a>(Option<&'a Allocator>);

impl Repair<'_> {
    /// Ends a successful repair.
    pub(crate) fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        if let Some(allocator) = self.0 {
            allocator.lock().is_known = false;
        }
    }
}

impl State {
    /// If gaps lie directly before `end`, removes these gaps and moves `end` to the first of them.
    fn drop_gaps_at_end(&mut self) {
        while let Some(last) = self.end.checked_sub(1) {
            if !self.gaps.remove(last) {
                break;
            }
            self.end = last;
        }
    }

    /// Takes `count` blocks at the end. Returns the first block, and whether all of them are fresh.
    fn append(&mut self, count: u32) -> (u32, bool) {
        let start = self.end;
        let fresh = start >= self.fresh;
        self.end = start.saturating_add(count);
        self.fresh = self.fresh.max(self.end);
        self.max_end = self.max_end.max(self.end);
        (start, fresh)
    }

    /// The first of the lowest `count` contiguous gaps.
    fn gap_of(&self, count: u32) -> Option<u32> {
        let mut gaps = self.gaps.iter();
        let (mut start, mut len) = (gaps.next()?, 1_u32);
        while len < count {
            let next = gaps.next()?;
            if start.saturating_add(len) == next {
                len = len.saturating_add(1);
            } else {
                (start, len) = (next, 1);
            }
        }
        Some(start)
    }
}

fn full() -> Error {
    Error::from_errno(Errno::NOSPC).reword("All blocks of the image are in use")
}

impl Allocator {
    /// An allocator for an image of at most `limit` blocks, all unused.
    pub(crate) fn new(limit: u32, epochs: Arc<Epochs>) -> Arc<Self> {
        Arc::new(Self { limit, epochs, state: Mutex::default(), returned: Event::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        super::lock(&self.state)
    }

    /// Sets which blocks are in use. From block `fresh` on, the file contains no data (`None`: no block is fresh). `max_end`
    /// is the least value for [`Allocator::max_end`].
    pub(crate) fn set_used(&self, used: &RoaringBitmap, fresh: Option<u32>, max_end: u32) {
        let end = end_of(used);
        let mut gaps = RoaringBitmap::new();
        gaps.insert_range(0..end);
        gaps -= used;
        let max_end = max_end.max(end);
        let fresh = fresh.unwrap_or(u32::MAX).max(end);
        let mut state = self.lock();
        let returning = state.returning;
        let quarantined = VecDeque::new();
        *state = State { end, gaps, fresh, max_end, quarantined, is_known: true, returning };
    }

    /// From block `fresh` on, the file contains no data (`None`: no block is fresh). Does nothing if the allocator does not know
    /// which blocks are in use.
    pub(crate) fn set_fresh(&self, fresh: Option<u32>) {
        let mut state = self.lock();
        if state.is_known {
            state.fresh = fresh.unwrap_or(u32::MAX).max(state.end);
        }
    }

    /// Sets which blocks are in use in an image that will be repaired. No block is fresh.
    pub(crate) fn begin_repair(&self, used: &RoaringBitmap, max_end: u32) -> Repair<'_> {
        self.set_used(used, None, max_end);
        Repair(Some(self))
    }

    /// Whether the allocator knows which blocks are in use.
    pub(crate) fn is_known(&self) -> bool {
        self.lock().is_known
    }

    /// Reserves up to `count` contiguous blocks. If no block is free, waits for blocks of dropped runs whose writes are
    /// still in flight.
    ///
    /// # Errors
    /// `ENOSPC` if all blocks are in use. `EIO` if the allocator does not know which blocks are in use.
    pub(crate) async fn reserve(self: &Arc<Self>, count: u32) -> Result<Run> {
        loop {
            let listener = self.returned.listen();
            match self.try_reserve(count)? {
                Some(run) => return Ok(run),
                None => listener.await,
            }
        }
    }

    /// The same as [`Allocator::reserve`], but returns `None` if the caller must wait for blocks.
    fn try_reserve(self: &Arc<Self>, count: u32) -> Result<Option<Run>> {
        let mut state = self.usable()?;
        let (start, count, fresh) = match state.gaps.min() {
            Some(start) => {
                let mut end = start;
                while end.saturating_sub(start) < count && state.gaps.remove(end) {
                    end = end.saturating_add(1);
                }
                (start, end.saturating_sub(start), false)
            }
            None => {
                let count = count.min(self.limit.saturating_sub(state.end));
                if count == 0 && state.returning > 0 {
                    return Ok(None);
                }
                if count == 0 {
                    return Err(full());
                }
                let (start, fresh) = state.append(count);
                (start, count, fresh)
            }
        };
        Ok(Some(self.run(start, count, fresh)))
    }

    /// Reserves exactly `count` contiguous blocks, even if lower blocks are free. If there is no free run of this length,
    /// waits for blocks of dropped runs.
    ///
    /// # Errors
    /// `ENOSPC` if there is no such run, and no blocks of dropped runs are being returned. `EIO` as for [`Allocator::reserve`].
    pub(crate) async fn reserve_contiguous(self: &Arc<Self>, count: u32) -> Result<Run> {
        loop {
            let listener = self.returned.listen();
            match self.try_reserve_contiguous(count)? {
                Some(run) => return Ok(run),
                None => listener.await,
            }
        }
    }

    fn try_reserve_contiguous(self: &Arc<Self>, count: u32) -> Result<Option<Run>> {
        let mut state = self.usable()?;
        let (start, fresh) = match state.gap_of(count) {
            Some(start) => {
                state.gaps.remove_range(start..start.saturating_add(count));
                (start, false)
            }
            None if count <= self.limit.saturating_sub(state.end) => state.append(count),
            None if state.returning > 0 => return Ok(None),
            None => return Err(full()),
        };
        Ok(Some(self.run(start, count, fresh)))
    }

    /// Reserves `count` blocks at the end, even if lower blocks are free.
    ///
    /// # Errors
    /// `ENOSPC` if the map could not refer to these blocks. `EIO` as for [`Allocator::reserve`].
    pub(crate) fn reserve_at_end(self: &Arc<Self>, count: u32) -> Result<Run> {
        let mut state = self.usable()?;
        if count > self.limit.saturating_sub(state.end) {
            return Err(full());
        }
        let (start, fresh) = state.append(count);
        Ok(self.run(start, count, fresh))
    }

    fn run(self: &Arc<Self>, start: u32, count: u32, fresh: bool) -> Run {
        let give_back = GiveBack { allocator: Arc::clone(self), start, count };
        Run { start, count, fresh, give_back: Some(UntilSettled::new(give_back)) }
    }

    /// Locks the state, and frees the blocks whose quarantine has ended.
    ///
    /// # Errors
    /// `EIO` if the allocator does not know which blocks are in use.
    fn usable(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if !state.is_known {
            return Err(Error::from_errno(Errno::IO).reword(
                "It is not known which blocks of the image are free: it has to be opened again",
            ));
        }
        while let Some((epoch, block)) = state.quarantined.front().copied()
            && self.epochs.has_passed(epoch)
        {
            state.quarantined.pop_front();
            state.gaps.insert(block);
        }
        state.drop_gaps_at_end();
        Ok(state)
    }

    fn give_back(&self, start: u32, count: u32) {
        let mut state = self.lock();
        state.gaps.insert_range(start..start.saturating_add(count));
        state.drop_gaps_at_end();
        state.returning = state.returning.saturating_sub(count.into());
        drop(state);
        self.returned.notify(usize::MAX);
    }

    /// Frees blocks to which no entry on disk refers. The blocks are quarantined until all requests that began before this
    /// call have ended.
    pub(crate) fn free(&self, blocks: impl IntoIterator<Item = u32>) {
        let epoch = self.epochs.current();
        self.lock().quarantined.extend(blocks.into_iter().map(|block| (epoch, block)));
        // Advances the epoch, so that the next request does not belong to the epoch of the freed blocks.
        self.epochs.has_passed(epoch);
    }

    /// Ends the quarantine of all blocks. No request is in flight.
    pub(crate) fn end_quarantine(&self) {
        let mut state = self.lock();
        while let Some((_, block)) = state.quarantined.pop_front() {
            state.gaps.insert(block);
        }
        state.drop_gaps_at_end();
    }

    /// Number of gaps, plus the number of blocks from the end up to block `capacity`. Quarantined blocks do not count.
    pub(crate) fn available(&self, capacity: u32) -> u64 {
        let state = self.lock();
        u64::from(capacity.saturating_sub(state.end)).saturating_add(state.gaps.len())
    }

    /// First block of the unused space at the end of the file.
    pub(crate) fn end(&self) -> u32 {
        self.lock().end
    }

    /// The largest value that the end has had since the image was opened or the file was truncated.
    pub(crate) fn max_end(&self) -> u32 {
        self.lock().max_end
    }

    /// Records that the file now ends with the last block in use.
    pub(crate) fn note_truncated(&self) {
        let mut state = self.lock();
        state.max_end = state.end;
        state.fresh = state.end;
    }

    /// The unused blocks before the end, lowest first.
    pub(crate) fn gaps(&self) -> RoaringBitmap {
        self.lock().gaps.clone()
    }
}

#[cfg(test)]
mod tests {
    use oxblk_ring::File;
    use oxblk_ring::sim::{self, Disk};

    use super::*;

    fn used(blocks: &[u32]) -> RoaringBitmap {
        blocks.iter().copied().collect()
    }

    /// Reserves blocks without waiting.
    fn reserve(allocator: &Arc<Allocator>, count: u32) -> Result<Run> {
        allocator.try_reserve(count).map(|run| run.expect("no blocks are in flight"))
    }

    fn shape(run: &Run) -> (u32, u32, bool) {
        (run.start, run.count, run.fresh)
    }

    #[test]
    fn gaps_are_allocated_first() {
        let allocator = Allocator::new(8, Arc::default());
        allocator.set_used(&used(&[0, 3]), Some(4), 0);
        let gap = reserve(&allocator, 5).unwrap();
        assert_eq!(shape(&gap), (1, 2, false));
        let new = reserve(&allocator, 5).unwrap();
        assert_eq!(shape(&new), (4, 4, true));
        assert_eq!(reserve(&allocator, 1).unwrap_err().raw_errno(), Errno::NOSPC);
        gap.keep();
        new.keep();
        assert_eq!((allocator.end(), allocator.gaps().len()), (8, 0));
    }

    #[test]
    fn contiguous_blocks_come_from_the_first_long_gap_or_the_end() {
        let allocator = Allocator::new(12, Arc::default());
        allocator.set_used(&used(&[1, 3, 6]), Some(7), 0);
        let take = |count| allocator.try_reserve_contiguous(count).map(|run| run.expect("free"));
        let gap = take(2).unwrap();
        assert_eq!(shape(&gap), (4, 2, false));
        let end = take(2).unwrap();
        assert_eq!(shape(&end), (7, 2, true));
        assert_eq!(shape(&reserve(&allocator, 2).unwrap()), (0, 1, false));
        let too_many = take(4).unwrap_err();
        assert_eq!(too_many.raw_errno(), Errno::NOSPC);
        assert_eq!(shape(&take(2).unwrap()), (9, 2, true));
        drop(gap);
        assert_eq!(shape(&allocator.reserve_at_end(1).unwrap()), (9, 1, false));
    }

    #[test]
    fn returned_blocks_are_no_longer_fresh_and_the_end_moves_back() {
        let allocator = Allocator::new(8, Arc::default());
        allocator.set_used(&used(&[]), Some(0), 0);
        let first = reserve(&allocator, 2).unwrap();
        let second = reserve(&allocator, 1).unwrap();
        drop(first);
        assert_eq!((allocator.end(), allocator.gaps().len()), (3, 2));
        drop(second);
        assert_eq!((allocator.end(), allocator.gaps().len(), allocator.max_end()), (0, 0, 3));
        let run = reserve(&allocator, 4).unwrap();
        assert_eq!(shape(&run), (0, 4, false));
    }

    #[test]
    fn a_freed_block_is_quarantined_while_an_earlier_request_is_in_flight() {
        let epochs = Arc::new(Epochs::default());
        let allocator = Allocator::new(8, Arc::clone(&epochs));
        allocator.set_used(&used(&[0, 1, 2]), Some(3), 0);
        let request = epochs.enter();
        allocator.free([1]);
        let new = reserve(&allocator, 1).unwrap();
        assert_eq!(new.start, 3);
        drop(request);
        assert_eq!(reserve(&allocator, 1).unwrap().start, 1);
        new.keep();
        allocator.free([3]);
        allocator.end_quarantine();
        assert_eq!(allocator.end(), 3);
    }

    #[test]
    fn gaps_and_the_space_before_the_capacity_are_available() {
        let allocator = Allocator::new(8, Arc::default());
        allocator.set_used(&used(&[0, 3]), None, 0);
        assert_eq!((allocator.available(6), allocator.available(4)), (4, 2));
        assert_eq!(allocator.available(0), 2);
    }

    #[test]
    fn a_file_that_does_not_grow_has_no_fresh_blocks() {
        let allocator = Allocator::new(8, Arc::default());
        allocator.set_used(&used(&[]), None, 0);
        assert_eq!(shape(&reserve(&allocator, 1).unwrap()), (0, 1, false));
    }

    #[test]
    fn blocks_of_a_dropped_run_are_waited_for_while_writes_are_in_flight() {
        let disk = Disk::new(1, 4096);
        sim::run(1, async {
            let allocator = Allocator::new(2, Arc::default());
            allocator.set_used(&used(&[0]), Some(1), 0);
            let file = File::sim(&disk);
            let write =
                oxblk_ring::spawn(
                    async move { file.write_all_at(vec![1; 512].into(), 0, false).await },
                );
            oxblk_ring::yield_now().await;
            drop(reserve(&allocator, 1).unwrap());
            assert!(allocator.try_reserve(1).unwrap().is_none(), "the write is in flight");
            let run = allocator.reserve(1).await.unwrap();
            assert_eq!(shape(&run), (1, 1, false));
            write.await.unwrap();
            let full = allocator.reserve(1).await.unwrap_err();
            assert_eq!(full.raw_errno(), Errno::NOSPC);
        });
    }

    #[test]
    fn no_block_is_allocated_after_a_repair_that_failed() {
        let allocator = Allocator::new(8, Arc::default());
        assert_eq!(reserve(&allocator, 1).unwrap_err().raw_errno(), Errno::IO);
        let repair = allocator.begin_repair(&used(&[0]), 0);
        assert_eq!(reserve(&allocator, 1).unwrap().start, 1);
        repair.done();
        assert_eq!(reserve(&allocator, 1).unwrap().start, 1);
        drop(allocator.begin_repair(&used(&[0]), 0));
        assert_eq!(reserve(&allocator, 1).unwrap_err().raw_errno(), Errno::IO);
    }
}
