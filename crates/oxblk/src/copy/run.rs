//! The workers of a copy.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use oxblk_core::{Error, ErrorKind, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::Mutex as AsyncMutex;
use oxblk_ring::{IoBuf, IoBufMut, IoThread};

use super::plan::{Action, Chunk, Plan};
use super::rate::Rate;
use super::source::Sources;
use super::sparse::{Run, runs};
use super::{Copy, CopyError, CopyOptions, Stage};
use crate::lowest::Lowest;

/// Longest zero write issued at once in bytes, so that progress moves and a stop is noticed.
const ZERO_STEP: u64 = 1 << 30;
/// Smallest piece that salvaging tells good from bad, in bytes.
const SALVAGE_UNIT: usize = 512;

struct Shared {
    copy: Copy,
    sources: Arc<Sources>,
    plan: AsyncMutex<Plan>,
    /// Unit of zero detection in bytes.
    unit: u64,
    rate: Option<Rate>,
    /// Where in the sources the copy begins.
    begin: u64,
    total: u64,
    done: AtomicU64,
    /// The thread that writes, where it is another one than the reader's. See [`Shared::write`].
    writer: Option<IoThread>,
    /// What lies before a failure was begun earlier, and is still under way.
    failure: Lowest<CopyError>,
}

/// Makes a copy, on the current I/O thread and on `helpers`.
///
/// # Errors
/// The failure at the lowest offset, as if all had been copied in order; requests in flight end first.
pub async fn run(copy: Copy, helpers: &[IoThread]) -> Result<(), CopyError> {
    let parallel = copy.options.parallel.max(1);
    let shared = Arc::new(Shared::new(copy));
    let threads = helpers.len().saturating_add(1).min(parallel);
    let (each, extra) = (parallel / threads, parallel % threads);
    let mut remote = Vec::new();
    for (index, helper) in helpers.iter().take(threads - 1).enumerate() {
        let shared = Arc::clone(&shared);
        let workers = each + usize::from(index + 1 < extra);
        remote.push(helper.spawn(move || workers_on_one_thread(shared, workers)));
    }
    workers_on_one_thread(Arc::clone(&shared), each + usize::from(extra > 0)).await;
    for thread in remote {
        if thread.await.is_err() {
            shared.fail(stopped(0, "An I/O thread ended early"));
        }
    }
    shared.failure.take().map_or(Ok(()), Err)
}

async fn workers_on_one_thread(shared: Arc<Shared>, workers: usize) {
    let tasks: Vec<_> = (0..workers)
        .map(|_| {
            let shared = Arc::clone(&shared);
            oxblk_ring::spawn(async move { shared.work().await })
        })
        .collect();
    for task in tasks {
        task.await;
    }
}

fn stopped(offset: u64, why: &'static str) -> CopyError {
    CopyError { stage: Stage::Stopped, offset, error: Error::new(ErrorKind::Cancelled, why) }
}

impl Shared {
    fn new(copy: Copy) -> Self {
        let CopyOptions { sparse, compress, rate, .. } = copy.options;
        let node = copy.target.node().ok();
        let cluster = node.as_ref().map_or(0, |node| node.driver().info().cluster_size).max(512);
        let zeroes = node.as_ref().map_or(1, |node| node.limits().write_zeroes_alignment);
        let sources = Sources::new(&copy.sources);
        let aligned = if compress { cluster } else { 1 };
        let range = copy.range.clone().unwrap_or(0..sources.size());
        let (begin, total) = (range.start, range.end.saturating_sub(range.start));
        let plan = Plan::new(Arc::clone(&sources), copy.options.clone(), range, aligned);
        Self {
            plan: AsyncMutex::new(plan),
            unit: if compress { cluster } else { sparse.max(u64::from(zeroes)).max(1) },
            rate: rate.map(Rate::new),
            begin,
            total,
            sources,
            done: AtomicU64::new(0),
            writer: IoThread::current().filter(|_| !compress),
            failure: Lowest::default(),
            copy,
        }
    }

    async fn work(self: &Arc<Self>) {
        loop {
            match self.step().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(failure) => return self.fail(failure),
            }
        }
    }

    fn fail(&self, failure: CopyError) {
        self.failure.keep(failure.offset, failure);
    }

    /// Deals with one chunk; `false` when there is none left.
    async fn step(self: &Arc<Self>) -> Result<bool, CopyError> {
        if self.failure.is_some() {
            return Ok(false);
        }
        let Some(chunk) = self.plan.lock().await.next().await? else { return Ok(false) };
        self.go_on(chunk.offset)?;
        match chunk.action {
            Action::Skip => {}
            Action::Zero => self.zero(chunk.offset - self.begin, chunk.len).await?,
            Action::Copy => self.copy_chunk(chunk).await?,
        }
        let done = self.done.fetch_add(chunk.len, Relaxed).saturating_add(chunk.len);
        self.copy.observer.progress(done.min(self.total), self.total);
        Ok(true)
    }

    /// Fails when the copy has been told to stop; what is at `offset` and after it is not done yet.
    fn go_on(&self, offset: u64) -> Result<(), CopyError> {
        if self.copy.stop.load(Relaxed) {
            return Err(stopped(offset, "Interrupted"));
        }
        Ok(())
    }

    async fn copy_chunk(self: &Arc<Self>, chunk: Chunk) -> Result<(), CopyError> {
        if let Some(rate) = &self.rate {
            rate.pass(chunk.len).await;
        }
        if self.copy.options.offload && self.offload(chunk).await {
            return Ok(());
        }
        let data = self.read(chunk).await?.freeze();
        self.write(chunk.offset - self.begin, data).await
    }

    /// Moves a chunk within the host; `false` where it cannot. Whatever the reason, the ordinary way
    /// either works or tells what is wrong.
    async fn offload(&self, chunk: Chunk) -> bool {
        let Some((source, offset)) = self.sources.at(chunk.offset) else { return false };
        if source.size().saturating_sub(offset) < chunk.len {
            return false;
        }
        let place = chunk.offset - self.begin;
        source.copy_to(offset, &self.copy.target, place, chunk.len).await.is_ok()
    }

    async fn read(&self, chunk: Chunk) -> Result<IoBufMut, CopyError> {
        let len = usize::try_from(chunk.len).unwrap_or(usize::MAX);
        match self.sources.read(chunk.offset, len).await {
            Ok(buf) => Ok(buf),
            Err(_) if self.copy.options.salvage => Ok(self.salvage(chunk).await),
            Err(error) => Err(CopyError { stage: Stage::Reading, offset: chunk.offset, error }),
        }
    }

    /// Reads what can be read, in small pieces, and leaves the rest zero.
    async fn salvage(&self, chunk: Chunk) -> IoBufMut {
        let len = usize::try_from(chunk.len).unwrap_or(usize::MAX);
        let mut whole = IoBufMut::zeroed(len);
        let mut done = 0;
        while done < len {
            let piece = SALVAGE_UNIT.min(len - done);
            let place = chunk.offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
            match self.sources.read(place, piece).await {
                Ok(buf) => {
                    if let Some(room) = whole.get_mut(done..done.saturating_add(piece)) {
                        room.copy_from_slice(&buf);
                    }
                }
                Err(error) => self.copy.observer.salvaged(place, &error),
            }
            done = done.saturating_add(piece);
        }
        whole
    }

    /// Writes what has been read.
    ///
    /// Data that is not to be compressed first goes out from one thread. A host file that is not opened with
    /// `O_DIRECT` takes one write at a time; writers on several rings would spin on its lock, while those of one
    /// ring are queued by the kernel. One thread keeps any device busy with writes of this length.
    async fn write(self: &Arc<Self>, offset: u64, data: IoBuf) -> Result<(), CopyError> {
        let runs = if self.copy.options.sparse == 0 && !self.copy.options.compress {
            vec![Run { range: 0..data.len(), zero: false }]
        } else {
            runs(&data, offset, self.unit)
        };
        let here = IoThread::current().map(|thread| thread.index());
        match self.writer.as_ref().filter(|writer| Some(writer.index()) != here) {
            None => self.write_runs(offset, data, runs).await,
            Some(writer) => {
                let shared = Arc::clone(self);
                let written = writer
                    .spawn(move || async move { shared.write_runs(offset, data, runs).await });
                written.await.unwrap_or_else(|_| Err(stopped(offset, "An I/O thread ended early")))
            }
        }
    }

    async fn write_runs(&self, offset: u64, data: IoBuf, runs: Vec<Run>) -> Result<(), CopyError> {
        match runs.as_slice() {
            [Run { zero: false, .. }] => self.write_data(offset, data).await,
            _ => {
                let runs = runs.into_iter().map(|run| self.write_run(offset, &data, run));
                run_all(runs).await
            }
        }
    }

    async fn write_run(&self, offset: u64, data: &IoBuf, run: Run) -> Result<(), CopyError> {
        let start = u64::try_from(run.range.start).unwrap_or(u64::MAX);
        let len = u64::try_from(run.range.len()).unwrap_or(u64::MAX);
        let place = offset.saturating_add(start);
        if run.zero && self.copy.options.sparse != 0 {
            self.zero(place, len).await
        } else {
            self.write_data(place, data.slice(run.range)).await
        }
    }

    async fn write_data(&self, offset: u64, data: IoBuf) -> Result<(), CopyError> {
        let failed = |error| CopyError { stage: Stage::Writing, offset, error };
        if !self.copy.options.compress {
            let written = self.copy.target.write(offset, data, WriteFlags::empty()).await;
            return written.map_err(failed);
        }
        // One request a cluster: all cores compress at once.
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        let mut rest = data;
        let mut at = offset;
        let mut clusters = Vec::new();
        while !rest.is_empty() {
            let cluster = rest.split_to(unit.min(rest.len()));
            let len = u64::try_from(cluster.len()).unwrap_or(u64::MAX);
            clusters.push(self.copy.target.write(at, cluster, WriteFlags::COMPRESSED));
            at = at.saturating_add(len);
        }
        run_all(clusters).await.map_err(failed)
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), CopyError> {
        if self.copy.options.target_is_zero {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            self.go_on(at)?;
            let step = ZERO_STEP.min(end - at);
            let zeroed = self.copy.target.write_zeroes(at, step, ZeroFlags::MAY_UNMAP).await;
            zeroed.map_err(|error| CopyError { stage: Stage::Writing, offset: at, error })?;
            at = at.saturating_add(step);
        }
        Ok(())
    }
}
