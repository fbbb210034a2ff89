//! The workers of a copy, and their common state.
//!
//! Each worker takes chunks from the plan until no chunk is left. It reads a chunk, prepares the parts to be written, and
//! writes them in the order of the disk ([`super::order`]) or immediately ([`super::write`]). After a failure no worker takes
//! another chunk. Chunks are taken in the order of the disk, and each chunk below a failure that has been taken is processed to
//! its end. So the failure at the lowest offset is found, even if a chunk at a higher offset fails first.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_ring::Mutex as AsyncMutex;
use oxblk_ring::{IoBufMut, IoThread, TaskGone};

use super::offload::Offload;
use super::order::{Order, Ticket};
use super::plan::{Action, Chunk, Plan};
use super::rate::Rate;
use super::source::Sources;
use super::write::{Job, Part, Parts};
use super::{Copy, CopyError, CopyOptions, Stage};
use crate::first_by_offset::FirstByOffset;
use crate::progress::{InOrder, Piece};
use crate::stop::unless_stopped;
use crate::workers::Workers;

/// Longest transfer of a tmpfs file that an I/O thread executes inline, instead of in a kernel worker, in bytes.
const LONGEST_IN_PLACE: usize = 1 << 20;
/// Length of one read when unreadable data is salvaged, in bytes. If a read fails, this number of bytes is replaced by zeroes.
const SALVAGE_UNIT: usize = 512;

pub(super) struct Shared {
    pub(super) copy: Copy,
    sources: Arc<Sources>,
    plan: AsyncMutex<Plan>,
    /// The order of writes; `None`: writes may run in any order.
    order: Option<Arc<Order<Job>>>,
    /// Unit of zero detection in bytes.
    pub(super) unit: u64,
    rate: Option<Rate>,
    pub(super) offload: Offload,
    /// The offset in the concatenated sources at which the copy begins.
    pub(super) begin: u64,
    /// Total number of bytes for progress: the bytes of data, or all bytes.
    total: u64,
    /// Progress counts only data, not zeroes.
    only_data: bool,
    progress: InOrder,
    /// The thread that issues the unordered data writes of all workers. `None`: each worker writes on its own thread.
    pub(super) writer: Option<IoThread>,
    /// The failure at the lowest offset. Chunks at lower offsets were taken earlier and may still be in progress.
    pub(super) failure: FirstByOffset<CopyError>,
}

/// Runs a copy on the current I/O thread and on `helpers`.
///
/// # Errors
/// The failure at the lowest offset, as if the chunks had been copied in order. No request is in flight when this returns, unless
/// the copy was stopped: then the copy waits for no request, and writes may be in flight. A close of the target waits for them.
pub async fn run(copy: Copy, helpers: &[IoThread]) -> Result<(), CopyError> {
    let CopyOptions { parallel: count, chunk, .. } = copy.options;
    let stop = Arc::clone(&copy.stop);
    let Some(shared) = unless_stopped(&stop, Shared::new(copy)).await else {
        return Err(CopyError::stopped(0, "Interrupted"));
    };
    let shared = Arc::new(shared?);
    let in_place = Some(chunk.min(LONGEST_IN_PLACE));
    let work = |shared: Arc<Shared>| async move { shared.work().await };
    let workers = Workers { count, in_place, helpers, stop: Some(&stop) };
    if let Err(TaskGone) = workers.run(&shared, work, Shared::cancel).await {
        shared.fail(CopyError::stopped(0, "An I/O thread ended early"));
    }
    shared.failure.take().map_or(Ok(()), Err)
}

impl Shared {
    async fn new(copy: Copy) -> Result<Self, CopyError> {
        let CopyOptions { sparse, compress, rate, in_order, .. } = copy.options;
        let node = copy.target.node().ok();
        let cluster = node.as_ref().map_or(0, |node| node.driver().info().cluster_size).max(512);
        let zeroes = node.as_ref().map_or(1, |node| node.limits().write_zeroes_alignment);
        // The order of writes changes the layout only if the target allocates clusters. For a file in the page cache, ordered
        // writes are not slower, since the host executes buffered writes to one file one at a time. Other targets are faster
        // with several writes in flight.
        let order_matters = node.as_ref().is_none_or(|node| {
            node.driver().info().cluster_size > 0 || node.limits().request_alignment <= 1
        });
        let sources = Sources::new(&copy.sources);
        let aligned = if compress { cluster } else { 1 };
        let range = copy.range.clone().unwrap_or(0..sources.size());
        let (begin, all) = (range.start, range.end.saturating_sub(range.start));
        let plan = || Plan::new(Arc::clone(&sources), copy.options.clone(), range.clone(), aligned);
        let only_data = copy.observer.wants_total();
        let total = if only_data { plan().count(&copy.stop).await? } else { all };
        let plan = plan();
        Ok(Self {
            only_data,
            plan: AsyncMutex::new(plan),
            order: (in_order && order_matters).then(Arc::default),
            unit: if compress { cluster } else { sparse.max(u64::from(zeroes)).max(1) },
            rate: rate.map(Rate::new),
            offload: Offload::new(&copy),
            begin,
            total,
            sources,
            progress: InOrder::new(begin),
            writer: IoThread::current().filter(|_| !compress),
            failure: FirstByOffset::default(),
            copy,
        })
    }

    /// Makes the workers end, because a stop was requested, or the future of the copy was dropped.
    fn cancel(&self) {
        self.fail(CopyError::stopped(0, "Cancelled"));
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

    /// Processes one chunk. Returns `false` if no chunk is left, or after a failure.
    async fn step(self: &Arc<Self>) -> Result<bool, CopyError> {
        if self.failure.is_some() {
            return Ok(false);
        }
        let Some((chunk, ticket)) = self.next().await? else { return Ok(false) };
        let outcome = match (self.prepare(chunk).await, &ticket) {
            (Ok(parts), Some(ticket)) => {
                self.write_in_order(ticket, Job { chunk, parts }).await;
                Ok(())
            }
            (Ok(parts), None) => {
                let written = self.write_any_time(chunk.offset - self.begin, parts).await;
                written.map(|()| self.report(&chunk))
            }
            (Err(failure), _) => Err(failure),
        };
        // Record the failure before the ticket is dropped, so that no later chunk is written after the failure.
        if let Err(failure) = outcome {
            self.fail_writing(failure);
        }
        drop(ticket);
        Ok(true)
    }

    /// Records a failure. If a write failed, its offset in the target is converted to an offset in the sources.
    pub(super) fn fail_writing(&self, mut failure: CopyError) {
        if failure.stage == Stage::Writing {
            failure.offset = failure.offset.saturating_add(self.begin);
        }
        self.fail(failure);
    }

    /// The next chunk, and its ticket in the order of writes. No ticket: writes have no order, or the chunk writes
    /// nothing.
    async fn next(&self) -> Result<Option<(Chunk, Option<Ticket<Job>>)>, CopyError> {
        let mut plan = self.plan.lock().await;
        let Some(chunk) = plan.next().await? else { return Ok(None) };
        let is_zero = chunk.action == Action::Zero && self.copy.options.target_is_zero;
        let writes = chunk.action != Action::Skip && !is_zero;
        let order = self.order.as_ref().filter(|_| writes);
        Ok(Some((chunk, order.map(Order::ticket))))
    }

    /// Returns the parts of a chunk that are written. The chunk is read if it contains data and is not offloaded.
    async fn prepare(&self, chunk: Chunk) -> Result<Parts, CopyError> {
        self.check_running(chunk.offset)?;
        let place = chunk.offset - self.begin;
        match chunk.action {
            Action::Skip => Ok(Vec::new()),
            Action::Zero => Ok(vec![(place, Part::Zero(chunk.len))]),
            Action::Copy => {
                if let Some(rate) = &self.rate {
                    rate.pass(chunk.len, || self.check_running(chunk.offset).is_err()).await;
                    self.check_running(chunk.offset)?;
                }
                if self.offload.is_on() {
                    return Ok(vec![(place, Part::Move(chunk))]);
                }
                self.parts(place, self.read(chunk).await?.freeze()).await
            }
        }
    }

    pub(super) fn report(&self, chunk: &Chunk) {
        let counts = !self.only_data || chunk.action == Action::Copy;
        let piece = Piece {
            end: chunk.offset.saturating_add(chunk.len),
            counts: if counts { chunk.len } else { 0 },
            reports: chunk.reports.filter(|_| counts),
        };
        let report = |done: u64| self.copy.observer.progress(done.min(self.total), self.total);
        self.progress.done(chunk.offset, piece, report);
    }

    /// Fails if a stop of the copy was requested, or after a failure below `offset`, the offset of a chunk. Such a chunk is no
    /// longer needed.
    pub(super) fn check_running(&self, offset: u64) -> Result<(), CopyError> {
        if self.copy.stop.load(Relaxed) {
            return Err(CopyError::stopped(offset, "Interrupted"));
        }
        if self.failure.is_below(offset) {
            return Err(CopyError::stopped(offset, "Cancelled"));
        }
        Ok(())
    }

    /// Copies a chunk with the host's copy offload. `false`: this is not possible, for example because the target has not
    /// allocated the range. The caller then reads and writes the chunk, so the reason is not returned.
    pub(super) async fn copy_by_host(&self, chunk: Chunk) -> bool {
        let Some((source, offset)) = self.sources.at(chunk.offset) else { return false };
        if source.size().saturating_sub(offset) < chunk.len {
            return false;
        }
        let place = chunk.offset - self.begin;
        source.copy_to(offset, &self.copy.target, place, chunk.len).await.is_ok()
    }

    /// Reads a chunk. With `salvage`, unreadable data becomes zeroes.
    pub(super) async fn read(&self, chunk: Chunk) -> Result<IoBufMut, CopyError> {
        let len = usize::try_from(chunk.len).unwrap_or(usize::MAX);
        match self.sources.read(chunk.offset, len).await {
            Ok(buf) => Ok(buf),
            Err(_) if self.copy.options.salvage => Ok(self.salvage(chunk).await),
            Err(error) => Err(CopyError { stage: Stage::Reading, offset: chunk.offset, error }),
        }
    }

    /// Reads a chunk in small pieces. Pieces that cannot be read are zeroes in the result.
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
}
