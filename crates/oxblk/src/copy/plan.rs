//! The plan of a copy: it returns the chunks of the disk in order, each with the action for it.
//!
//! The plan queries the block status of the sources in order. All workers use one plan, which a lock protects. The status of an
//! extent is queried once, and the extent is then cut into chunks, so most calls return without I/O.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::{ChildIdx, Status, StatusFlags, Want};

use super::source::Sources;
use super::{CopyError, CopyOptions, Stage};

/// Longest range of one status query, in bytes.
const STATUS_STEP: u64 = 1 << 30;

/// Distance of progress reports inside an extent, in bytes. QEMU copies in steps of this length.
const PROGRESS_STEP: u64 = 2 << 20;

/// What to do with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Copy the data of the chunk.
    Copy,
    /// Make the target read as zeroes in the range of the chunk.
    Zero,
    /// Do nothing, because the target already reads as the same data.
    Skip,
}

/// A piece of the disk that one worker processes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    /// Byte offset in the concatenated sources.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// What to do.
    pub(super) action: Action,
    /// The stored data equals the guest data: it is neither compressed nor encrypted.
    pub(super) is_plain: bool,
    /// The position of a progress report inside the chunk: the number of bytes from that position to the end of the chunk.
    /// `None`: the chunk causes no report.
    pub(super) reports: Option<u64>,
}

/// Returns the chunks of the sources in order.
pub(super) struct Plan {
    sources: Arc<Sources>,
    options: CopyOptions,
    /// Chunks to be copied begin and end at multiples of this number of bytes, or at the start or the end of the range.
    unit: u64,
    offset: u64,
    end: u64,
    /// Start of the extent whose status is known.
    begin: u64,
    /// End of this extent.
    known: u64,
    /// The action for this extent.
    action: Action,
    is_plain: bool,
}

impl Plan {
    /// Plans the copy of `range`. `unit` is the cluster size of a compressed target, otherwise 1.
    pub(super) fn new(
        sources: Arc<Sources>,
        options: CopyOptions,
        range: Range<u64>,
        unit: u64,
    ) -> Self {
        let Range { start, end } = range;
        let end = end.min(sources.size());
        let unit = unit.max(1);
        Self {
            sources,
            options,
            unit,
            offset: start,
            end,
            begin: start,
            known: 0,
            action: Action::Skip,
            is_plain: false,
        }
    }

    /// Returns the number of bytes to be copied. This consumes the plan.
    ///
    /// # Errors
    /// If the status of a source cannot be read (except with `salvage`), or if `stop` is set before the end.
    pub(super) async fn count(mut self, stop: &AtomicBool) -> Result<u64, CopyError> {
        self.options.chunk = usize::MAX;
        let mut bytes = 0_u64;
        while let Some(chunk) = self.next().await? {
            if stop.load(Relaxed) {
                return Err(CopyError::stopped(chunk.offset, "Interrupted"));
            }
            if chunk.action == Action::Copy {
                bytes = bytes.saturating_add(chunk.len);
            }
        }
        Ok(bytes)
    }

    /// The next chunk, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Chunk>, CopyError> {
        if self.offset >= self.end {
            return Ok(None);
        }
        if self.offset >= self.known {
            self.query().await?;
            self.known = self.known.min(self.end);
            self.round();
        }
        Ok(Some(self.cut()))
    }

    fn cut(&mut self) -> Chunk {
        let chunk = u64::try_from(self.options.chunk).unwrap_or(u64::MAX).max(self.unit);
        // Chunks end at multiples of the chunk length, so that a chunk rarely ends inside a cluster.
        let aligned = (self.offset / chunk).saturating_add(1).saturating_mul(chunk);
        let end = if self.action == Action::Copy { self.known.min(aligned) } else { self.known };
        let len = end.saturating_sub(self.offset);
        // Progress steps are counted from the start of the extent, as in QEMU.
        let since = |at: u64| at.saturating_sub(self.begin);
        let crosses = since(end) / PROGRESS_STEP > since(self.offset) / PROGRESS_STEP;
        let reports = match end == self.known {
            true => Some(0),
            false => crosses.then(|| since(end) % PROGRESS_STEP),
        };
        let Self { offset, action, is_plain, .. } = *self;
        let chunk = Chunk { offset, len, action, is_plain, reports };
        self.offset = end;
        chunk
    }

    /// Moves the end of the extent to a multiple of the unit. A unit that lies only partly in the extent is copied as
    /// data.
    fn round(&mut self) {
        let rest = self.known % self.unit;
        if rest == 0 || self.known >= self.end {
            return;
        }
        let down = self.known - rest;
        if self.action != Action::Copy && down > self.offset {
            self.known = down;
        } else {
            self.action = Action::Copy;
            self.known = down.saturating_add(self.unit).min(self.end);
        }
    }

    /// Queries the extent at the current offset.
    async fn query(&mut self) -> Result<(), CopyError> {
        let len = self.sources.left_in_source(self.offset).min(STATUS_STEP);
        let status = match self.status(len).await {
            Ok(status) => status,
            // The metadata is unreadable. Treat a part of the range as data. Its reads may succeed; otherwise the part
            // is salvaged in small pieces.
            Err(_) if self.options.salvage => Status::data(len.min(1 << 16)),
            Err(error) => {
                return Err(CopyError { stage: Stage::Status, offset: self.offset, error });
            }
        };
        self.begin = self.offset;
        self.known = self.offset.saturating_add(status.len.clamp(1, len));
        self.action = self.action_for(&status);
        self.is_plain = status.flags.contains(StatusFlags::OFFSET_VALID);
        Ok(())
    }

    async fn status(&self, len: u64) -> oxblk_core::Result<Status> {
        let Some((source, offset)) = self.sources.at(self.offset) else {
            return Ok(Status::zero(len));
        };
        let len = len.min(source.size().saturating_sub(offset));
        if len == 0 {
            // The offset lies in the padding after the end of a source.
            return Ok(Status::zero(self.sources.left_in_source(self.offset)));
        }
        if let Some(base) = &self.options.above {
            return Ok(source.status_above(Some(base), offset, len, Want::Precise).await?.status);
        }
        if self.options.backing.is_none() {
            return Ok(source.block_status(offset, len, Want::Precise).await?.status);
        }
        let below = source.node()?.child(ChildIdx::BACKING);
        Ok(source.status_above(below.as_ref(), offset, len, Want::Precise).await?.status)
    }

    fn action_for(&self, status: &Status) -> Action {
        if self.options.backing.is_some_and(|size| self.offset >= size) && status.is_zero() {
            return Action::Skip;
        }
        match (status.is_zero(), self.options.sparse) {
            (true, 0) => Action::Copy,
            (true, _) => Action::Zero,
            (false, _) if status.flags.contains(StatusFlags::DATA) => Action::Copy,
            (false, _) if self.options.above.is_some() => Action::Skip,
            (false, _) if self.options.backing.is_none() => Action::Copy,
            (false, _) => Action::Skip,
        }
    }
}
