//! Writes that allocate clusters, with copy-on-write.
//!
//! A write that allocates clusters holds the range lock on its clusters of the disk from the lookup until the clusters are
//! linked. So two allocating writes to the same cluster run one after the other. Each run of clusters goes through these
//! steps:
//!
//! 1. *reserve*: get clusters of the file that no other request has reserved; make the file long enough;
//! 2. *write*: write the data, and around it the old contents of the clusters;
//! 3. *link*: set the L2 entries in the cache. Readers see the new data from this step on. [`super::write_back`] writes the
//!    entries to the file.
//!
//! The entries of a run lie in one slice, so that either all of them are set or none.

use futures_util::future::try_join;
use oxblk_core::{BoxFuture, ChildIdx, DebugEvent, Result, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut};

use super::Qed;
use super::lookup::{Extent, set};
use crate::blocks::{Run, length};

/// If a run has at most this number of bytes, its old and new contents are combined in memory and written with one write.
const MAX_COMBINED_WRITE: u64 = 256 << 10;
/// Old contents are copied in steps of this size in bytes.
const STEP: u64 = 1 << 20;

impl Qed {
    /// Writes `data` to the disk at `offset`.
    pub(super) async fn write_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.check_writable()?;
        let len = length(&data);
        // A write to allocated clusters that are contiguous in the file needs no lock.
        if let Extent::Data { host, len: covered } = self.extent(offset, len).await?
            && covered == len
        {
            return self.write_file(host, data).await;
        }
        let end = self.geometry.end(offset.saturating_add(len));
        let _lock = self.guest.lock(self.geometry.start(offset)..end).await;
        self.write_locked(offset, data).await
    }

    pub(super) async fn write_file(&self, host: u64, data: IoBuf) -> Result<()> {
        let file = self.file()?;
        file.debug_event(DebugEvent::WriteAio).await;
        file.write(host, data, WriteFlags::empty()).await
    }

    /// The same as [`Self::write_guest`], for callers that hold the range lock.
    pub(super) async fn write_locked(&self, offset: u64, mut data: IoBuf) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while !data.is_empty() {
            let job = self.next_job(at, &mut data, &mut jobs);
            match job.await {
                Ok(next) => at = next,
                // The parts before the failed one are still written.
                Err(error) => return run_all(jobs).await.and(Err(error)),
            }
        }
        run_all(jobs).await
    }

    /// Splits off the first part of `data`, adds its write to `jobs`, and returns the disk offset of the next part.
    async fn next_job<'a>(
        &'a self,
        at: u64,
        data: &mut IoBuf,
        jobs: &mut Vec<BoxFuture<'a, Result<()>>>,
    ) -> Result<u64> {
        let left = length(data);
        let first = self.extent(at, left).await?;
        if let Extent::Data { host, len } = first {
            let piece = split(data, len);
            jobs.push(Box::pin(self.write_file(host, piece)));
            return Ok(at.saturating_add(len));
        }
        let mut covered = first.len();
        while covered < left {
            match self.extent(at.saturating_add(covered), left - covered).await? {
                Extent::Data { .. } => break,
                other => covered = covered.saturating_add(other.len()),
            }
        }
        let reach = self.slice_reach();
        let covered = covered.min(left).min(reach - at % reach);
        let start = self.geometry.start(at);
        let count = self.geometry.index(self.geometry.end(at.saturating_add(covered)) - start);
        let run = self.reserve(u32::try_from(count).unwrap_or(u32::MAX)).await?;
        let room = start.saturating_add(self.offset_of(run.count)) - at;
        let piece = split(data, covered.min(room));
        let next = at.saturating_add(length(&piece));
        jobs.push(Box::pin(self.fill_and_link(at, piece, run)));
        Ok(next)
    }

    /// Reserves up to `count` contiguous clusters of the file, after the need-check flag has been written and flushed.
    pub(super) async fn reserve(&self, count: u32) -> Result<Run> {
        self.set_need_check().await?;
        self.allocator.reserve(count).await
    }

    async fn fill_and_link(&self, offset: u64, data: IoBuf, run: Run) -> Result<()> {
        self.lengthen(run.end()).await?;
        self.fill(offset, data, &run).await?;
        point();
        self.link(self.geometry.start(offset), run).await
    }

    /// Writes the new contents of the clusters of `run`: `data`, and the old contents of the disk before and after `data`.
    async fn fill(&self, offset: u64, data: IoBuf, run: &Run) -> Result<()> {
        let first = self.geometry.start(offset);
        let host = self.offset_of(run.start);
        let data_end = offset.saturating_add(length(&data));
        let end = first.saturating_add(self.offset_of(run.count));
        let place = |at: u64| host.saturating_add(at - first);
        if end - first > MAX_COMBINED_WRITE {
            let head = self.copy_old(first, offset, host, run.fresh);
            let tail = self.copy_old(data_end, end, place(data_end), run.fresh);
            let (head, tail): (BoxFuture<'_, _>, BoxFuture<'_, _>) =
                (Box::pin(head), Box::pin(tail));
            return run_all([head, Box::pin(self.write_file(place(offset), data)), tail]).await;
        }
        let head = self.old_contents(first, offset, run.fresh);
        let tail = self.old_contents(data_end, end, run.fresh);
        let (head, tail) = try_join(head, tail).await?;
        if head.is_none() && tail.is_none() {
            return self.write_file(place(offset), data).await;
        }
        let start = if head.is_some() { first } else { offset };
        self.children.debug_event(ChildIdx::FILE, DebugEvent::CowWrite).await;
        let parts = [head.as_deref(), Some(&*data), tail.as_deref()];
        let total = parts.iter().flatten().map(|part| part.len()).sum();
        let mut whole = IoBufMut::new(total);
        let mut rest: &mut [u8] = &mut whole;
        for part in parts.into_iter().flatten() {
            let (to, next) = std::mem::take(&mut rest).split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = next;
        }
        self.write_file(place(start), whole.freeze()).await
    }

    /// Copies the old contents of the disk between `from` and `to` to offset `host` of the file, in steps. `fresh`: the file
    /// reads as zeroes there.
    async fn copy_old(&self, from: u64, to: u64, host: u64, fresh: bool) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        if self.reads_as_zero(from, to).await? {
            let flags = ZeroFlags::MAY_UNMAP;
            return match fresh {
                true => Ok(()),
                false => self.file()?.write_zeroes(host, to - from, flags).await,
            };
        }
        let mut at = from;
        while at < to {
            let end = at.saturating_add(STEP).min(to);
            if let Some(old) = self.old_contents(at, end, fresh).await? {
                self.children.debug_event(ChildIdx::FILE, DebugEvent::CowWrite).await;
                self.write_file(host.saturating_add(at - from), old).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// The contents of the disk between `from` and `to`. `None` if nothing has to be written: the range is empty, or it reads
    /// as zeroes and `fresh` says that the file reads as zeroes already. After the end of the disk, the contents are zeroes.
    async fn old_contents(&self, from: u64, to: u64, fresh: bool) -> Result<Option<IoBuf>> {
        if from >= to {
            return Ok(None);
        }
        let len = usize::try_from(to - from).unwrap_or(0);
        if self.reads_as_zero(from, to).await? {
            return Ok(if fresh { None } else { Some(IoBuf::zeroes(len)) });
        }
        let visible = to.min(self.size()).saturating_sub(from);
        let visible = usize::try_from(visible).unwrap_or(0);
        let seen = self.read_guest(from, IoBufMut::new(visible)).await?;
        let old = if visible == len {
            seen.freeze()
        } else {
            let mut whole = IoBufMut::zeroed(len);
            if let Some(start) = whole.get_mut(..visible) {
                start.copy_from_slice(&seen);
            }
            whole.freeze()
        };
        Ok(if fresh && oxblk_ring::is_zero(&old) { None } else { Some(old) })
    }

    /// Whether the tables show that a range reads as zeroes. No data is read.
    pub(super) async fn reads_as_zero(&self, from: u64, to: u64) -> Result<bool> {
        let backing_end = self.children.get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        let end = to.min(self.size());
        let mut at = from;
        while at < end {
            let extent = self.extent(at, end - at).await?;
            match extent {
                Extent::Zero { .. } => {}
                Extent::Unallocated { .. } if at >= backing_end => {}
                _ => return Ok(false),
            }
            at = at.saturating_add(extent.len());
        }
        Ok(true)
    }

    /// Makes the L2 entries from the disk offset `guest` on refer to the clusters of `run`. All entries lie in one slice.
    async fn link(&self, guest: u64, run: Run) -> Result<()> {
        let (_, first) = self.slice_of(guest);
        loop {
            self.ensure_table(self.l1_index(guest)).await?;
            let Some(slice) = self.pin_slice(guest).await? else { continue };
            let hosts = (0..run.count).map(|index| self.offset_of(run.start.saturating_add(index)));
            let mut change = slice.begin_change();
            for (index, host) in (first..).zip(hosts) {
                set(&mut change, index, host);
            }
            drop(change);
            run.keep();
            return Ok(());
        }
    }
}

fn split(data: &mut IoBuf, len: u64) -> IoBuf {
    data.split_to(usize::try_from(len).unwrap_or(usize::MAX).min(data.len()))
}
