//! Comparison of two disks: finds the lowest offset at which they differ.
//!
//! Workers on several I/O threads take pieces of the disks in order, read both disks and compare the data. After a
//! worker has found a difference or a failure, only pieces below the offset of the difference or failure are compared.
//! So the result is the lowest offset for every number of workers, and little data above that offset is read. Ranges
//! that are zero on both disks are not read. A range that is zero on one disk is read from the other disk and compared
//! with zeroes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use oxblk_core::{Backend, ChainStatus, Error, ErrorKind, StatusFlags, Want};
use oxblk_ring::Mutex as AsyncMutex;
use oxblk_ring::{IoBuf, IoThread, TaskGone};

use crate::buffer::buffer;
use crate::first_by_offset::FirstByOffset;
use crate::progress::{InOrder, Piece};
use crate::workers::Workers;

/// Longest piece that is read, in bytes. Progress is reported in these steps, as in QEMU.
const PIECE: u64 = 2 << 20;
/// Number of bytes to read after which a worker takes no further piece in one step; at most [`MAX_PIECES`] pieces.
/// Workers take pieces under a lock, the cursor. To wake a thread that waits for the lock takes longer than to compare
/// a short piece, so each worker takes the lock rarely.
const BATCH: u64 = 8 << 20;
/// Maximum number of pieces that a worker takes in one step.
const MAX_PIECES: usize = 16;
/// Length of one read from each disk, in bytes. It is short, so that the data is still in the processor's caches when it is
/// compared.
const STEP: u64 = 256 << 10;
/// Unit of the offset of a difference, in bytes.
const SECTOR: usize = 512;

/// A comparison to be run.
pub struct Compare {
    /// The two disks. If the second is `None`, the first is compared with zeroes.
    pub disks: (Backend, Option<Backend>),
    /// Start of the compared range, as a byte offset.
    pub from: u64,
    /// End of the compared range, as a byte offset. Both disks are at least this large.
    pub to: u64,
    /// Strict comparison: a range whose block status differs between the disks is a difference too.
    pub strict: bool,
    /// Maximum number of pieces that are compared concurrently, on all threads together.
    pub parallel: usize,
    /// Is called with the number of compared bytes, in the order of the disk, from several threads.
    pub progress: Arc<dyn Fn(u64) + Send + Sync>,
    /// Any thread may set this flag to stop the comparison. The comparison then ends soon, also if its requests wait.
    pub stop: Arc<AtomicBool>,
}

/// The first difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The sector at this byte offset differs.
    Content(u64),
    /// The block status at this byte offset differs (strict comparison).
    Status(u64),
}

impl Difference {
    /// The byte offset of the difference.
    pub fn offset(self) -> u64 {
        match self {
            Self::Content(offset) | Self::Status(offset) => offset,
        }
    }
}

/// The step at which a comparison failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareStage {
    /// Querying the block status of a disk.
    Status,
    /// Reading a disk.
    Reading,
    /// The comparison was stopped on request.
    Stopped,
}

/// The failure of a comparison.
#[derive(Debug)]
pub struct CompareError {
    /// The step that failed.
    pub stage: CompareStage,
    /// The disk: 0 or 1.
    pub disk: usize,
    /// The byte offset.
    pub offset: u64,
    /// The cause.
    pub error: Error,
}

/// Which disks must be read to compare a piece.
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

/// A range to compare.
struct Range {
    offset: u64,
    len: u64,
    sides: Sides,
}

struct Shared {
    job: Compare,
    cursor: AsyncMutex<Cursor>,
    /// The lowest offset of a difference or failure that has been found. Pieces at or above this offset are not compared.
    bound: AtomicU64,
    found: FirstByOffset<Difference>,
    progress: InOrder,
    failure: FirstByOffset<CompareError>,
}

/// Finds the first difference, on the current I/O thread and on `helpers`.
///
/// # Errors
/// The failure at the lowest offset, if no difference was found below that offset. A stop is a failure at offset 0.
pub async fn compare(
    job: Compare,
    helpers: &[IoThread],
) -> Result<Option<Difference>, CompareError> {
    let (count, stop) = (job.parallel, Arc::clone(&job.stop));
    let (from, to) = (job.from, job.to);
    let shared = Arc::new(Shared {
        job,
        cursor: AsyncMutex::new(Cursor { offset: from, known: from, sides: Sides::Neither }),
        bound: AtomicU64::new(to),
        found: FirstByOffset::default(),
        progress: InOrder::new(from),
        failure: FirstByOffset::default(),
    });
    let in_place = usize::try_from(STEP).ok();
    let work = |shared: Arc<Shared>| async move { shared.work().await };
    let workers = Workers { count, in_place, helpers, stop: Some(&stop) };
    if let Err(TaskGone) = workers.run(&shared, work, Shared::stopped).await {
        shared.stopped();
    }
    let found = shared.found.take();
    match shared.failure.take() {
        // If a difference lies below the failure, the difference is the result, as if the pieces had been compared in order.
        Some(failure) if found.is_none_or(|found| failure.offset <= found.offset()) => Err(failure),
        _ => Ok(found),
    }
}

impl Shared {
    async fn work(&self) {
        loop {
            let ranges = self.next().await;
            if ranges.is_empty() {
                return;
            }
            for range in ranges {
                if let Err(failure) = self.step(&range).await {
                    self.failed(failure);
                }
            }
        }
    }

    /// Ends the comparison with an error, even if a difference was found.
    fn stopped(&self) {
        let error = Error::new(ErrorKind::Cancelled, "Interrupted");
        self.failed(CompareError { stage: CompareStage::Stopped, disk: 0, offset: 0, error });
    }

    /// Records a failure. Only the failure with the lowest offset is kept. Pieces below this offset are still compared.
    fn failed(&self, failure: CompareError) {
        self.bound.fetch_min(failure.offset, Relaxed);
        self.failure.keep(failure.offset, failure);
    }

    fn found(&self, difference: Difference) {
        self.found.keep(difference.offset(), difference);
        self.bound.fetch_min(difference.offset(), Relaxed);
    }

    /// Compares one piece, unless a difference or a failure at its offset or below is known, or the comparison was
    /// stopped.
    async fn step(&self, range: &Range) -> Result<(), CompareError> {
        let &Range { offset, len, sides } = range;
        if self.job.stop.load(Relaxed) {
            self.stopped();
        }
        if offset >= self.bound.load(Relaxed) {
            return Ok(());
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
        Ok(())
    }

    /// The offset of the first sector with a difference in a range, relative to the start of the range.
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

    /// Takes the next pieces, in the order of the disk. An empty list means that no piece below `bound` is left.
    async fn next(&self) -> Vec<Range> {
        let mut cursor = self.cursor.lock().await;
        let (mut ranges, mut bytes) = (Vec::new(), 0_u64);
        while bytes < BATCH
            && ranges.len() < MAX_PIECES
            && cursor.offset < self.bound.load(Relaxed).min(self.job.to)
        {
            if cursor.offset >= cursor.known {
                match self.sides(cursor.offset).await {
                    Ok(Some((len, sides))) => {
                        cursor.known = cursor.offset.saturating_add(len);
                        cursor.sides = sides;
                    }
                    Ok(None) => break,
                    Err(failure) => {
                        self.failed(failure);
                        break;
                    }
                }
            }
            let (offset, sides) = (cursor.offset, cursor.sides);
            let left = cursor.known - offset;
            let is_read = sides != Sides::Neither;
            let len = if is_read { left.min(PIECE) } else { left };
            bytes = bytes.saturating_add(if is_read { len } else { 0 });
            cursor.offset = offset.saturating_add(len);
            ranges.push(Range { offset, len, sides });
        }
        ranges
    }

    /// Queries the block status of both disks at `offset`. Returns the length of the range with this status, and the disks that
    /// must be read in the range; `None` if the status differs and the comparison is strict.
    async fn sides(&self, offset: u64) -> Result<Option<(u64, Sides)>, CompareError> {
        let left = self.job.to - offset;
        let first = self.status(0, &self.job.disks.0, offset, left).await?;
        let Some(second) = &self.job.disks.1 else {
            let sides = if is_stored(&first) { Sides::First } else { Sides::Neither };
            return Ok(Some((first.status.len, sides)));
        };
        let second = self.status(1, second, offset, left).await?;
        let len = first.status.len.min(second.status.len);
        if self.job.strict && compared_flags(&first) != compared_flags(&second) {
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

/// The status flags that a strict comparison compares. `RECURSE` and `PASSED_ON` are not compared, because they only
/// control the status query of the nodes below. The flag for the end of the disk is compared, as in QEMU.
fn compared_flags(found: &ChainStatus) -> StatusFlags {
    found.status.flags - (StatusFlags::RECURSE | StatusFlags::PASSED_ON)
}

/// The offset of the first sector that contains a nonzero byte.
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
    fn a_difference_has_the_offset_of_its_sector() {
        let a = vec![0_u8; 2000];
        let mut b = a.clone();
        *b.get_mut(1700).unwrap() = 1;
        assert_eq!(first_difference(&a, &b), Some(1536));
        assert_eq!(first_data(&b), Some(1536));
        assert_eq!(first_difference(&a, &a), None);
        assert_eq!(first_data(&a), None);
    }
}
