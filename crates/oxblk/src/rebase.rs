//! Rebase of an overlay: the overlay gets another backing file, and its guest-visible contents do not change.
//!
//! Workers on several I/O threads take pieces of the disk that consist of complete clusters. In ranges that the overlay
//! has not allocated, the workers compare the old backing file with the new one. Where the two differ, the workers
//! write the contents of the old backing file to the overlay. No data is read in two cases: the block status shows that
//! both backing files are zero; or the new backing file is in the backing chain of the old one, and no image above the
//! new backing file has allocated the range.
//!
//! Only the rebase writes to the overlay during this work ([`SoleWriter`]). Otherwise, old data that a worker has read could
//! replace data that another writer wrote after the read. A rebase fails if the overlay has another writer. Writes through the
//! backend of the rebase and its clones are refused until the rebase ends.
//!
//! The overlay has its old backing file until this work has ended. If the work has succeeded, the caller changes the backing
//! file ([`Backend::change_backing_file`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

#[cfg(doc)]
use oxblk_core::SoleWriter;
use oxblk_core::{Backend, Error, ErrorKind, Node, Want, WriteFlags, ZeroFlags, strerror};
use oxblk_ring::{IoBuf, IoBufMut, IoThread, TaskGone};

use crate::buffer::buffer;
use crate::copy::Observer;
use crate::first_by_offset::FirstByOffset;
use crate::progress::{InOrder, Piece};
use crate::workers::Workers;

/// Length in bytes of the pieces that workers take; if clusters are larger, a piece is one cluster. Progress is reported in
/// these steps, as in QEMU.
const CHUNK: u64 = 2 << 20;
/// Length in bytes of one read from each backing file; if clusters are larger, one cluster is read. The length is short, so
/// that the data is still in the processor's caches when it is compared and written.
const STEP: u64 = 256 << 10;

/// An overlay to be rebased.
pub struct Rebase {
    /// The overlay, possibly below filters. It is writable and has its old backing file. Writes through this backend fail
    /// during the rebase.
    pub disk: Backend,
    /// The old backing file; `None`: zeroes.
    pub old: Option<Backend>,
    /// The new backing file; `None`: zeroes.
    pub new: Option<Backend>,
    /// The node of `new`, if that node is in the backing chain of `old`.
    pub common: Option<Arc<Node>>,
    /// If true, compressed clusters are written.
    pub compress: bool,
    /// Maximum number of pieces that are processed concurrently, on all threads together.
    pub parallel: usize,
    /// Receives the progress.
    pub observer: Arc<dyn Observer>,
    /// Any thread may set this flag. The work then stops soon, also if its requests wait.
    pub stop: Arc<AtomicBool>,
}

/// The step at which a rebase failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebaseStage {
    /// Becoming the only writer of the overlay, or returning the overlay to its other users at the end.
    Attaching,
    /// Querying the block status of an image.
    Status,
    /// Reading the old backing file.
    ReadingOld,
    /// Reading the new backing file.
    ReadingNew,
    /// Writing to the overlay, or reading data from the overlay before it is compressed.
    Writing,
    /// The rebase was stopped on request.
    Stopped,
}

/// The failure of a rebase. The overlay still has its old backing file, and its guest-visible contents are unchanged.
#[derive(Debug)]
pub struct RebaseError {
    /// The step that failed.
    pub stage: RebaseStage,
    /// The byte offset in the overlay.
    pub offset: u64,
    /// The cause.
    pub error: Error,
}

impl std::fmt::Display for RebaseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = strerror(self.error.raw_errno());
        match self.stage {
            RebaseStage::Attaching => self.error.fmt(f),
            RebaseStage::Status => write!(f, "error while reading image metadata: {error}"),
            RebaseStage::ReadingOld => f.write_str("error while reading from old backing file"),
            RebaseStage::ReadingNew => f.write_str("error while reading from new backing file"),
            RebaseStage::Writing => write!(f, "Error while writing to COW image: {error}"),
            RebaseStage::Stopped => f.write_str("Interrupted"),
        }
    }
}

impl std::error::Error for RebaseError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

type Outcome<T = ()> = Result<T, RebaseError>;

struct Shared {
    job: Rebase,
    size: u64,
    /// Cluster size in bytes: the unit of comparing and writing.
    cluster: u64,
    /// The start of the next piece.
    next: AtomicU64,
    progress: InOrder,
    failure: FirstByOffset<RebaseError>,
}

/// Compares the backing files and writes the differences to the overlay, on the current I/O thread and on `helpers`. The
/// overlay is not flushed.
///
/// # Errors
/// The failure at the lowest offset, as if the pieces had been processed in order. No request is in flight when this returns, unless the
/// rebase was stopped.
pub async fn run(job: Rebase, helpers: &[IoThread]) -> Outcome {
    let attaching = failed(RebaseStage::Attaching, 0);
    let writer = job.disk.sole_writer("rebase job").await.map_err(&attaching)?;
    let outcome = run_alone(Rebase { disk: writer.backend().clone(), ..job }, helpers).await;
    outcome.and(writer.end().await.map_err(attaching))
}

/// Runs a rebase whose `disk` is the only writer of the overlay.
async fn run_alone(job: Rebase, helpers: &[IoThread]) -> Outcome {
    let (count, stop) = (job.parallel, Arc::clone(&job.stop));
    let cluster =
        job.disk.node().map_or(0, |node| node.skip_filters().driver().info().cluster_size);
    let cluster = cluster.max(512);
    let shared = Arc::new(Shared {
        size: job.disk.size(),
        cluster,
        next: AtomicU64::new(0),
        progress: InOrder::new(0),
        failure: FirstByOffset::default(),
        job,
    });
    let in_place = usize::try_from(STEP).ok();
    let work = |shared: Arc<Shared>| async move { shared.work().await };
    let workers = Workers { count, in_place, helpers, stop: Some(&stop) };
    let cancel = |shared: &Shared| shared.fail(stopped(0, "Cancelled"));
    if let Err(TaskGone) = workers.run(&shared, work, cancel).await {
        shared.fail(stopped(0, "An I/O thread ended early"));
    }
    shared.failure.take().map_or(Ok(()), Err)
}

fn stopped(offset: u64, why: &'static str) -> RebaseError {
    let error = Error::new(ErrorKind::Cancelled, why);
    RebaseError { stage: RebaseStage::Stopped, offset, error }
}

fn failed(stage: RebaseStage, offset: u64) -> impl Fn(Error) -> RebaseError {
    move |error| RebaseError { stage, offset, error }
}

impl Shared {
    async fn work(&self) {
        let step = self.cluster.max(CHUNK);
        // If another piece fails, a worker still processes the piece that it has taken. So every piece below a failed piece is
        // processed, and the failure at the lowest offset is found.
        while !self.failure.is_some() {
            let start = self.next.fetch_add(step, Relaxed);
            if start >= self.size {
                return;
            }
            let end = start.saturating_add(step).min(self.size);
            if let Err(failure) = self.piece(start..end).await {
                return self.fail(failure);
            }
            let report = |done| self.job.observer.progress(done, self.size);
            self.progress.done(start, Piece::whole(start..end), report);
        }
    }

    fn fail(&self, failure: RebaseError) {
        self.failure.keep(failure.offset, failure);
    }

    /// Processes one piece, which consists of complete clusters.
    async fn piece(&self, range: Range<u64>) -> Outcome {
        let below = self.job.old.as_ref().and_then(|old| old.node().ok());
        let mut at = range.start;
        while at < range.end {
            if self.job.stop.load(Relaxed) {
                return Err(stopped(at, "Interrupted"));
            }
            let disk = &self.job.disk;
            let held = disk.status_above(below.as_ref(), at, range.end - at, Want::Allocation);
            let held = held.await.map_err(failed(RebaseStage::Status, at))?.status;
            let end = at.saturating_add(held.len.clamp(1, range.end - at));
            if !held.is_allocated() {
                self.compare(at..end).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// Compares the backing files in a range that the overlay has not allocated.
    async fn compare(&self, range: Range<u64>) -> Outcome {
        let mut at = range.start;
        while at < range.end {
            let len = range.end - at;
            let (old, new) = (self.old_status(at, len).await?, self.new_status(at, len).await?);
            let end = at.saturating_add(old.len.min(new.len));
            // Let ranges end at cluster boundaries, so that a cluster of zeroes can become a zero cluster of the overlay.
            let whole = end - end % self.cluster;
            let (contents, end) = match end < range.end && whole < end {
                false => ((old.contents, new.contents), end),
                true if whole > at => ((old.contents, new.contents), whole),
                true => {
                    let end = whole.saturating_add(self.cluster).min(range.end);
                    (self.cluster_contents(at..end).await?, end)
                }
            };
            match contents {
                (Contents::Same, _) | (Contents::Zero, Contents::Zero) => {}
                (old, new) => self.compare_in_steps(at..end, old, new).await?,
            }
            at = end;
        }
        Ok(())
    }

    /// The contents of the backing files in one cluster that consists of several extents.
    async fn cluster_contents(&self, range: Range<u64>) -> Outcome<(Contents, Contents)> {
        let mut at = range.start;
        while at < range.end {
            let len = range.end - at;
            let (old, new) = (self.old_status(at, len).await?, self.new_status(at, len).await?);
            if !matches!(
                (old.contents, new.contents),
                (Contents::Same, _) | (Contents::Zero, Contents::Zero)
            ) {
                return Ok((Contents::Data, Contents::Data));
            }
            at = at.saturating_add(old.len.min(new.len));
        }
        Ok((Contents::Same, Contents::Same))
    }

    async fn old_status(&self, at: u64, len: u64) -> Outcome<Extent> {
        let Some(old) = &self.job.old else { return Ok(Extent { len, contents: Contents::Zero }) };
        let size = old.size();
        if at >= size {
            return Ok(Extent { len, contents: Contents::Zero });
        }
        let len = len.min(size - at);
        let common = self.job.common.as_ref();
        let status = old.status_above(common, at, len, Want::Precise).await;
        let status = status.map_err(failed(RebaseStage::Status, at))?.status;
        let top = old.node().ok();
        let is_common = common.is_some_and(|c| top.as_ref().is_some_and(|top| Arc::ptr_eq(c, top)));
        let between = status.is_allocated() || status.is_zero();
        let contents = match (status.is_zero(), common) {
            _ if is_common => Contents::Same,
            (_, Some(_)) if !between => Contents::Same,
            (true, _) => Contents::Zero,
            (false, _) => Contents::Data,
        };
        Ok(Extent { len: status.len.clamp(1, len), contents })
    }

    async fn new_status(&self, at: u64, len: u64) -> Outcome<Extent> {
        let Some(new) = &self.job.new else { return Ok(Extent { len, contents: Contents::Zero }) };
        let size = new.size();
        if at >= size {
            return Ok(Extent { len, contents: Contents::Zero });
        }
        let len = len.min(size - at);
        let status = new.block_status(at, len, Want::Precise).await;
        let status = status.map_err(failed(RebaseStage::Status, at))?.status;
        let contents = if status.is_zero() { Contents::Zero } else { Contents::Data };
        Ok(Extent { len: status.len.clamp(1, len), contents })
    }

    async fn compare_in_steps(&self, range: Range<u64>, old: Contents, new: Contents) -> Outcome {
        let step = STEP.max(self.cluster);
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % step).saturating_add(step).min(range.end);
            self.compare_data(at..end, old, new).await?;
            at = end;
        }
        Ok(())
    }

    async fn compare_data(&self, range: Range<u64>, old: Contents, new: Contents) -> Outcome {
        let reads = (
            read(self.job.old.as_ref(), old, &range, RebaseStage::ReadingOld),
            read(self.job.new.as_ref(), new, &range, RebaseStage::ReadingNew),
        );
        let (old, new) = futures_util::future::try_join(reads.0, reads.1).await?;
        let mut at = range.start;
        let mut run: Option<(Range<u64>, bool)> = None;
        while at < range.end {
            let unit_end = (at - at % self.cluster).saturating_add(self.cluster).min(range.end);
            let part = within(at, unit_end, range.start);
            let (ours, theirs) = (old.get(part.clone()), new.get(part));
            let kind = (ours != theirs).then(|| ours.is_some_and(oxblk_ring::is_zero));
            match (&mut run, kind) {
                (Some((run, zero)), Some(kind)) if *zero == kind => run.end = unit_end,
                _ => {
                    if let Some((run, zero)) = run.take() {
                        self.keep(run, zero, &old, range.start).await?;
                    }
                    run = kind.map(|zero| (at..unit_end, zero));
                }
            }
            at = unit_end;
        }
        match run {
            Some((run, zero)) => self.keep(run, zero, &old, range.start).await,
            None => Ok(()),
        }
    }

    /// Writes the contents of the old backing file in the range `run` to the overlay. `old` contains the data of the old
    /// backing file from the offset `start` on.
    async fn keep(&self, run: Range<u64>, zero: bool, old: &IoBuf, start: u64) -> Outcome {
        let disk = &self.job.disk;
        let failed = failed(RebaseStage::Writing, run.start);
        if zero {
            let flags = ZeroFlags::MAY_UNMAP | ZeroFlags::OWN;
            return disk.write_zeroes(run.start, run.end - run.start, flags).await.map_err(failed);
        }
        if self.job.compress {
            return self.compress(run).await;
        }
        let data = old.slice(within(run.start, run.end, start));
        disk.write(run.start, data, WriteFlags::empty()).await.map_err(failed)
    }

    /// Compresses the clusters that contain a range. The data is read from the overlay, because the overlay may have allocated
    /// parts of the clusters.
    async fn compress(&self, run: Range<u64>) -> Outcome {
        let disk = &self.job.disk;
        let mut at = run.start - run.start % self.cluster;
        while at < run.end {
            let failed = failed(RebaseStage::Writing, at);
            let len = self.cluster.min(self.size - at);
            let buf = IoBufMut::new(usize::try_from(len).unwrap_or(usize::MAX));
            let data = disk.read(at, buf).await.map_err(&failed)?.freeze();
            disk.write(at, data, WriteFlags::COMPRESSED).await.map_err(failed)?;
            at = at.saturating_add(self.cluster);
        }
        Ok(())
    }
}

/// The contents of a backing file in one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// Equal in the old and the new backing file: both read the same image or, in a cluster that consists of several extents,
    /// both may also be zero.
    Same,
    Zero,
    Data,
}

struct Extent {
    len: u64,
    contents: Contents,
}

fn within(from: u64, to: u64, start: u64) -> Range<usize> {
    let index = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
    index(from)..index(to)
}

/// Reads a range of a backing file. Bytes past the end of the backing file are zeroes.
async fn read(
    disk: Option<&Backend>,
    contents: Contents,
    range: &Range<u64>,
    stage: RebaseStage,
) -> Outcome<IoBuf> {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    match disk {
        Some(disk) if contents != Contents::Zero && range.start < disk.size() => {
            let there = usize::try_from(disk.size() - range.start).map_or(len, |l| l.min(len));
            let read = disk.read(range.start, buffer(there)).await;
            let read = read.map_err(failed(stage, range.start))?;
            if there == len {
                return Ok(read.freeze());
            }
            let mut whole = IoBufMut::zeroed(len);
            whole.iter_mut().zip(read.iter()).for_each(|(to, from)| *to = *from);
            Ok(whole.freeze())
        }
        _ => Ok(IoBuf::zeroes(len)),
    }
}
