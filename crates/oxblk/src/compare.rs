//! Comparing two disks: where do they first differ?
//!
//! Workers on several I/O threads take pieces of the disks in order, read both sides and compare. The
//! first difference or failure found bounds what is still looked at, so the answer is the lowest offset
//! whatever the number of workers, and nothing far behind it is read. Parts that neither side stores are not
//! read at all; a part that only one side stores is compared with zeroes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use oxblk_core::{Backend, ChainStatus, Error, ErrorKind, StatusFlags, Want};
use oxblk_ring::Mutex as AsyncMutex;
use oxblk_ring::{IoBuf, IoThread, transfer_in_place};

use crate::buffer::buffer;
use crate::first_by_offset::FirstByOffset;
use crate::progress::{InOrder, Piece};

/// Longest piece that a worker takes at once, in bytes. Progress is told in these steps, which are QEMU's.
const PIECE: u64 = 2 << 20;
/// Bytes read of each disk at once: what has been read is still in the processor's caches when it is compared.
const STEP: u64 = 256 << 10;
/// Unit in which a difference is told, in bytes.
const SECTOR: usize = 512;

/// A comparison to be made.
pub struct Compare {
    /// The two disks; with one of them, the other is all zeroes.
    pub disks: (Backend, Option<Backend>),
    /// Bytes from here…
    pub from: u64,
    /// …to here are compared; both disks are at least that large.
    pub to: u64,
    /// A part stored by one disk and not by the other is a difference.
    pub strict: bool,
    /// Requests in flight over all threads.
    pub parallel: usize,
    /// Hears from several threads how many bytes have been compared, in the order of the disk.
    pub progress: Arc<dyn Fn(u64) + Send + Sync>,
    /// Set from anywhere, this stops the comparison between two requests.
    pub stop: Arc<AtomicBool>,
}

/// The first difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The sector at this byte offset differs.
    Content(u64),
    /// The disks store the part at this byte offset differently (strict comparison).
    Status(u64),
}

impl Difference {
    /// Its byte offset.
    pub fn offset(self) -> u64 {
        match self {
            Self::Content(offset) | Self::Status(offset) => offset,
        }
    }
}

/// What a comparison was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareStage {
    /// Asking a disk which parts it stores.
    Status,
    /// Reading it.
    Reading,
    /// It was told to stop.
    Stopped,
}

/// A comparison that failed.
#[derive(Debug)]
pub struct CompareError {
    /// At what.
    pub stage: CompareStage,
    /// Which disk: 0 or 1.
    pub disk: usize,
    /// Byte offset.
    pub offset: u64,
    /// Why.
    pub error: Error,
}

/// Which sides of a piece must be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sides {
    Neither,
    First,
    Second,
    Both,
}

struct Cursor {
    offset: u64,
    known: u64,
    sides: Sides,
}

struct Shared {
    job: Compare,
    cursor: AsyncMutex<Cursor>,
    /// Nothing at or behind this offset can change the answer.
    bound: AtomicU64,
    found: FirstByOffset<Difference>,
    progress: InOrder,
    failure: FirstByOffset<CompareError>,
}

/// Finds the first difference, on the current I/O thread and on `helpers`.
///
/// # Errors
/// The failure at the lowest offset, if no difference was found before it.
pub async fn compare(
    job: Compare,
    helpers: &[IoThread],
) -> Result<Option<Difference>, CompareError> {
    let parallel = job.parallel.max(1);
    let (from, to) = (job.from, job.to);
    let shared = Arc::new(Shared {
        job,
        cursor: AsyncMutex::new(Cursor { offset: from, known: from, sides: Sides::Neither }),
        bound: AtomicU64::new(to),
        found: FirstByOffset::default(),
        progress: InOrder::new(from),
        failure: FirstByOffset::default(),
    });
    let threads = helpers.len().saturating_add(1).min(parallel);
    let each = parallel.div_ceil(threads);
    let mut remote = Vec::new();
    for helper in helpers.iter().take(threads - 1) {
        let shared = Arc::clone(&shared);
        remote.push(helper.spawn(move || on_one_thread(shared, each)));
    }
    on_one_thread(Arc::clone(&shared), each).await;
    let mut lost = false;
    for thread in remote {
        lost |= thread.await.is_err();
    }
    if lost {
        shared.stopped();
    }
    let found = shared.found.take();
    match shared.failure.take() {
        // What was found before the failure is the answer, as if all had been compared in order.
        Some(failure) if found.is_none_or(|found| failure.offset <= found.offset()) => Err(failure),
        _ => Ok(found),
    }
}

async fn on_one_thread(shared: Arc<Shared>, workers: usize) {
    let _in_place = transfer_in_place(usize::try_from(STEP).unwrap_or(0));
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

impl Shared {
    async fn work(&self) {
        loop {
            match self.step().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(failure) => {
                    self.failed(failure);
                    return;
                }
            }
        }
    }

    /// The comparison ends before it has an answer, whatever has been found.
    fn stopped(&self) {
        let error = Error::new(ErrorKind::Cancelled, "Interrupted");
        self.failed(CompareError { stage: CompareStage::Stopped, disk: 0, offset: 0, error });
    }

    /// Keeps the failure at the lowest offset; what lies before it is still compared.
    fn failed(&self, failure: CompareError) {
        self.bound.fetch_min(failure.offset, Relaxed);
        self.failure.keep(failure.offset, failure);
    }

    fn found(&self, difference: Difference) {
        self.found.keep(difference.offset(), difference);
        self.bound.fetch_min(difference.offset(), Relaxed);
    }

    /// Compares one piece; `false` when there is none left.
    async fn step(&self) -> Result<bool, CompareError> {
        let Some((offset, len, sides)) = self.next().await? else { return Ok(false) };
        if self.job.stop.load(Relaxed) {
            self.stopped();
            return Ok(false);
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end && sides != Sides::Neither {
            let step = STEP.min(end - at);
            if let Some(differs) = self.compare(at, step, sides).await? {
                let differs = at.saturating_add(u64::try_from(differs).unwrap_or(u64::MAX));
                self.found(Difference::Content(differs));
                break;
            }
            at = at.saturating_add(step);
        }
        self.progress.done(offset, Piece::whole(offset..end), |bytes| (self.job.progress)(bytes));
        Ok(true)
    }

    /// The first difference in a range, counted from its start.
    async fn compare(
        &self,
        offset: u64,
        len: u64,
        sides: Sides,
    ) -> Result<Option<usize>, CompareError> {
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(match sides {
            Sides::Neither => None,
            Sides::First => first_data(&self.read(0, offset, size).await?),
            Sides::Second => first_data(&self.read(1, offset, size).await?),
            Sides::Both => {
                let reads = (self.read(0, offset, size), self.read(1, offset, size));
                let (a, b) = futures_util::future::try_join(reads.0, reads.1).await?;
                first_difference(&a, &b)
            }
        })
    }

    async fn read(&self, disk: usize, offset: u64, len: usize) -> Result<IoBuf, CompareError> {
        let backend = match (&self.job.disks, disk) {
            ((first, _), 0) => first,
            ((_, Some(second)), _) => second,
            ((first, None), _) => first,
        };
        match backend.read(offset, buffer(len)).await {
            Ok(buf) => Ok(buf.freeze()),
            Err(error) => Err(CompareError { stage: CompareStage::Reading, disk, offset, error }),
        }
    }

    async fn next(&self) -> Result<Option<(u64, u64, Sides)>, CompareError> {
        let mut cursor = self.cursor.lock().await;
        if cursor.offset >= self.bound.load(Relaxed).min(self.job.to) {
            return Ok(None);
        }
        if cursor.offset >= cursor.known {
            match self.sides(cursor.offset).await? {
                Some((len, sides)) => {
                    cursor.known = cursor.offset.saturating_add(len);
                    cursor.sides = sides;
                }
                None => return Ok(None),
            }
        }
        let left = cursor.known - cursor.offset;
        let len = if cursor.sides == Sides::Neither { left } else { left.min(PIECE) };
        let piece = (cursor.offset, len, cursor.sides);
        cursor.offset = cursor.offset.saturating_add(len);
        Ok(Some(piece))
    }

    /// How far the status at `offset` reaches, and what must be read there; `None` where the disks
    /// differ in status and that counts.
    async fn sides(&self, offset: u64) -> Result<Option<(u64, Sides)>, CompareError> {
        let left = self.job.to - offset;
        let first = self.status(0, &self.job.disks.0, offset, left).await?;
        let Some(second) = &self.job.disks.1 else {
            let sides = if is_stored(&first) { Sides::First } else { Sides::Neither };
            return Ok(Some((first.status.len, sides)));
        };
        let second = self.status(1, second, offset, left).await?;
        let len = first.status.len.min(second.status.len);
        if self.job.strict && kept_as(&first) != kept_as(&second) {
            self.found(Difference::Status(offset));
            return Ok(None);
        }
        let sides = match (is_stored(&first), is_stored(&second)) {
            (false, false) => Sides::Neither,
            (true, false) => Sides::First,
            (false, true) => Sides::Second,
            (true, true) => Sides::Both,
        };
        Ok(Some((len, sides)))
    }

    async fn status(
        &self,
        disk: usize,
        backend: &Backend,
        offset: u64,
        len: u64,
    ) -> Result<ChainStatus, CompareError> {
        let failed = |error| CompareError { stage: CompareStage::Status, disk, offset, error };
        let mut found = backend.block_status(offset, len, Want::Precise).await.map_err(failed)?;
        found.status.len = found.status.len.clamp(1, len);
        Ok(found)
    }
}

fn is_stored(found: &ChainStatus) -> bool {
    !found.status.is_zero()
}

/// The part of a status that a strict comparison looks at: all but what only the walk through the layers needs. That an
/// extent reaches the end of the disk counts too, as it does in QEMU.
fn kept_as(found: &ChainStatus) -> StatusFlags {
    found.status.flags - (StatusFlags::RECURSE | StatusFlags::PASSED_ON)
}

/// The offset of the first sector that is not all zero.
fn first_data(bytes: &[u8]) -> Option<usize> {
    if oxblk_ring::is_zero(bytes) {
        return None;
    }
    let sectors = bytes.chunks(SECTOR).enumerate();
    sectors
        .map(|(i, sector)| (i * SECTOR, sector))
        .find(|(_, s)| !oxblk_ring::is_zero(s))
        .map(|f| f.0)
}

/// The offset of the first sector in which the buffers differ.
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    let sectors = a.chunks(SECTOR).zip(b.chunks(SECTOR)).enumerate();
    sectors.map(|(i, (a, b))| (i * SECTOR, a != b)).find(|(_, differ)| *differ).map(|f| f.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told_by_its_sector() {
        let a = vec![0_u8; 2000];
        let mut b = a.clone();
        *b.get_mut(1700).unwrap() = 1;
        assert_eq!(first_difference(&a, &b), Some(1536));
        assert_eq!(first_data(&b), Some(1536));
        assert_eq!(first_difference(&a, &a), None);
        assert_eq!(first_data(&a), None);
    }
}
