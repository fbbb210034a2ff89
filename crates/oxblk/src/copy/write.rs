//! Writes of a copy: a chunk that has been read is cut into parts, and the parts are written to the target.
//!
//! With ordered writes, workers hand in the parts of a chunk ([`super::order`]), compressed if requested. One worker writes the
//! parts, one request after the other, so that the target allocates clusters in the order of the disk. With unordered writes,
//! the parts of each chunk are written immediately.

use std::sync::Arc;

use oxblk_core::{CompressedCluster, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::{IoBuf, IoThread};

use super::order::{Ticket, Writer};
use super::plan::Chunk;
use super::run::Shared;
use super::sparse::{Run, runs};
use super::{CopyError, Stage};

/// Longest zero write in bytes. The limit lets a stop take effect soon.
const ZERO_STEP: u64 = 1 << 30;

/// A write to an offset of the target.
pub(super) enum Part {
    Zero(u64),
    Data(IoBuf),
    Compressed(CompressedCluster),
    /// The host copies the chunk if possible; otherwise the chunk is read and written.
    Move(Chunk),
}

/// Parts, each with its offset in the target.
pub(super) type Parts = Vec<(u64, Part)>;

/// A chunk to be written.
pub(super) struct Job {
    pub(super) chunk: Chunk,
    pub(super) parts: Parts,
}

impl Shared {
    /// The parts to be written for `data`, compressed if requested.
    pub(super) async fn parts(&self, offset: u64, data: IoBuf) -> Result<Parts, CopyError> {
        let parts = self.cut(offset, &data);
        if self.copy.options.compress { self.compress(parts).await } else { Ok(parts) }
    }

    fn cut(&self, offset: u64, data: &IoBuf) -> Parts {
        let runs = if self.copy.options.sparse == 0 && !self.copy.options.compress {
            vec![Run { range: 0..data.len(), zero: false }]
        } else {
            runs(data, offset, self.unit)
        };
        let mut parts = Vec::with_capacity(runs.len());
        for run in runs {
            self.add_parts(offset, data, run, &mut parts);
        }
        parts
    }

    fn add_parts(&self, offset: u64, data: &IoBuf, run: Run, parts: &mut Parts) {
        let Run { range, zero } = run;
        let mut at = offset.saturating_add(as_u64(range.start));
        if zero && self.copy.options.sparse != 0 {
            parts.push((at, Part::Zero(as_u64(range.len()))));
            return;
        }
        let mut rest = data.slice(range);
        if !self.copy.options.compress {
            parts.push((at, Part::Data(rest)));
            return;
        }
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        while !rest.is_empty() {
            let cluster = rest.split_to(unit.min(rest.len()));
            let len = as_u64(cluster.len());
            parts.push((at, Part::Data(cluster)));
            at = at.saturating_add(len);
        }
    }

    /// Compresses all data parts in parallel.
    async fn compress(&self, parts: Parts) -> Result<Parts, CopyError> {
        let one = |(at, part)| async move {
            let Part::Data(data) = part else { return Ok((at, part)) };
            match self.copy.target.compress(data).await {
                Ok(cluster) => Ok((at, Part::Compressed(cluster))),
                Err(error) => Err(CopyError { stage: Stage::Writing, offset: at, error }),
            }
        };
        futures_util::future::try_join_all(parts.into_iter().map(one)).await
    }

    /// Hands in a chunk and waits until this worker or another one has written it.
    pub(super) async fn write_in_order(self: &Arc<Self>, ticket: &Ticket<Job>, job: Job) {
        if let Some((job, writer)) = ticket.submit(job).await {
            self.write_jobs(job, writer).await;
        }
    }

    /// Writes a chunk and then the following chunks that have been handed in. Chunks above a failure are not written.
    async fn write_jobs(self: &Arc<Self>, first: Job, mut writer: Writer<Job>) {
        let mut next = Some(first);
        while let Some(Job { chunk, parts }) = next {
            if !self.failure.is_below(chunk.offset) {
                match self.write_one_by_one(chunk.offset, parts).await {
                    Ok(()) => self.report(&chunk),
                    Err(failure) => self.fail_writing(failure),
                }
            }
            next = writer.next();
        }
    }

    async fn write_one_by_one(&self, offset: u64, parts: Parts) -> Result<(), CopyError> {
        self.check_running(offset)?;
        for (at, part) in parts {
            match part {
                Part::Move(chunk) => {
                    let as_it_is = self.offload.takes(&chunk);
                    if as_it_is && self.copy_by_host(chunk).await {
                        continue;
                    }
                    let data = self.read(chunk).await?.freeze();
                    if as_it_is {
                        self.write_part(at, Part::Data(data)).await?;
                        continue;
                    }
                    for (at, part) in self.cut(at, &data) {
                        self.write_part(at, part).await?;
                    }
                }
                part => self.write_part(at, part).await?,
            }
        }
        Ok(())
    }

    async fn write_part(&self, offset: u64, part: Part) -> Result<(), CopyError> {
        let target = &self.copy.target;
        let written = match part {
            Part::Zero(len) => return self.zero(offset, len).await,
            Part::Data(data) => target.write(offset, data, WriteFlags::empty()).await,
            Part::Compressed(cluster) => target.write_compressed(offset, cluster).await,
            Part::Move(_) => Ok(()),
        };
        written.map_err(|error| CopyError { stage: Stage::Writing, offset, error })
    }

    /// Writes the parts of a chunk immediately, the requests of several parts in parallel.
    ///
    /// One thread writes the uncompressed data of all workers. The host executes buffered writes to one file one at a time:
    /// writers on several rings would spin on the inode lock, but the kernel queues the writes of one ring. For writes of this
    /// length, one thread is sufficient.
    pub(super) async fn write_any_time(
        self: &Arc<Self>,
        offset: u64,
        parts: Parts,
    ) -> Result<(), CopyError> {
        if let [(_, Part::Move(_) | Part::Zero(_))] = parts.as_slice() {
            return self.write_one_by_one(offset, parts).await;
        }
        let here = IoThread::current().map(|thread| thread.index());
        match self.writer.as_ref().filter(|writer| Some(writer.index()) != here) {
            None => self.write_side_by_side(parts).await,
            Some(writer) => {
                let shared = Arc::clone(self);
                let written =
                    writer.spawn(move || async move { shared.write_side_by_side(parts).await });
                written.await.unwrap_or_else(|_| {
                    Err(CopyError::stopped(offset, "An I/O thread ended early"))
                })
            }
        }
    }

    async fn write_side_by_side(&self, parts: Parts) -> Result<(), CopyError> {
        run_all(parts.into_iter().map(|(at, part)| self.write_part(at, part))).await
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), CopyError> {
        if self.copy.options.target_is_zero {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            self.check_running(at)?;
            let step = ZERO_STEP.min(end - at);
            let zeroed = self.copy.target.write_zeroes(at, step, ZeroFlags::MAY_UNMAP).await;
            zeroed.map_err(|error| CopyError { stage: Stage::Writing, offset: at, error })?;
            at = at.saturating_add(step);
        }
        Ok(())
    }
}

fn as_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
