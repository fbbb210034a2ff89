//! Copy of one or more disks to one target, with many requests in flight on several I/O threads.
//!
//! A [`Copy`](struct@Copy) reads the concatenated sources and writes their data to a target. Each worker takes the next
//! chunk of the disk, reads the chunk, searches it for zeroes, and writes the other data. So the data in memory is
//! limited to about workers × [`CopyOptions::chunk`] bytes. Workers read and compress in parallel. With
//! [`CopyOptions::in_order`], the default, they write in the order of the disk. So a target that allocates clusters has
//! the same layout on every run and for every number of workers.
//!
//! A copy does not flush the target. The caller closes the target, and the close flushes.

mod offload;
mod order;
mod plan;
mod rate;
mod run;
mod source;
mod sparse;
mod write;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_core::{Backend, Error, ErrorKind, Node, strerror};

pub use run::run;

/// Options of a copy.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Maximum number of chunks that are processed concurrently, on all threads together.
    pub parallel: usize,
    /// Longest chunk in bytes; a multiple of 512.
    pub chunk: usize,
    /// Aligned ranges of at least this number of bytes that contain only zeroes are written as zeroes, not as data. With
    /// `compress`, complete clusters of zeroes are written as zeroes. 0: all bytes are written as data.
    pub sparse: u64,
    /// If true, compressed clusters are written.
    pub compress: bool,
    /// The target already reads as zeroes everywhere, so zeroes are not written.
    pub target_is_zero: bool,
    /// The size of the target's backing file in bytes, if the copy relies on that backing file: it has the same
    /// contents as the backing file of the source, and only the data of the source's top image is copied.
    pub backing: Option<u64>,
    /// The node of the target, if it is in the backing chain of the source. Only the data of the images above this node
    /// is copied.
    pub above: Option<Arc<Node>>,
    /// If true, the host's copy offload is used where possible. Offloaded data is not searched for zeroes.
    pub offload: bool,
    /// If true, unreadable data is copied as zeroes and is not an error.
    pub salvage: bool,
    /// Maximum rate in bytes per second.
    pub rate: Option<u64>,
    /// If true, data is written in the order of the disk, one request at a time. A target without clusters whose requests
    /// must be aligned (direct I/O) is an exception: the order does not change its layout, so its writes run in parallel. If
    /// false, writes run in parallel, and the layout of the target can differ from run to run.
    pub in_order: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            parallel: 8,
            chunk: 512 << 10,
            sparse: 4096,
            compress: false,
            target_is_zero: false,
            backing: None,
            above: None,
            offload: false,
            salvage: false,
            rate: None,
            in_order: true,
        }
    }
}

/// Receives events of a running copy. The methods are called from several threads.
pub trait Observer: Send + Sync {
    /// `done` of `total` bytes have been processed. The calls are in the order of the disk.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether progress counts only data and not zeroes. If so, the block status of the complete range is queried
    /// before the copy begins.
    fn wants_total(&self) -> bool {
        false
    }

    /// Bytes at `offset` could not be read and have been replaced by zeroes.
    fn salvaged(&self, offset: u64, error: &Error) {
        let _ = (offset, error);
    }
}

/// An observer that ignores all events.
impl Observer for () {}

/// A copy to be run.
pub struct Copy {
    /// The sources. They are copied one after the other.
    pub sources: Vec<Backend>,
    /// The byte range of the concatenated sources to copy. Its start is copied to offset 0 of the target. `None`: the complete
    /// sources.
    pub range: Option<Range<u64>>,
    /// The target. It is at least as large as the range.
    pub target: Backend,
    /// Options.
    pub options: CopyOptions,
    /// Receives progress and salvaged ranges.
    pub observer: Arc<dyn Observer>,
    /// Any thread may set this flag to stop the copy. The copy then ends soon, also if its requests wait.
    pub stop: Arc<AtomicBool>,
}

/// The step at which a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Querying the block status of a source.
    Status,
    /// Reading a source.
    Reading,
    /// Writing the target.
    Writing,
    /// The copy was stopped on request.
    Stopped,
}

/// The failure of a copy.
#[derive(Debug)]
pub struct CopyError {
    /// The step that failed.
    pub stage: Stage,
    /// The byte offset in the concatenated sources.
    pub offset: u64,
    /// The cause.
    pub error: Error,
}

impl CopyError {
    /// An error for a copy that was stopped before `offset` without a failed request. `why` is the reason.
    fn stopped(offset: u64, why: &'static str) -> Self {
        Self { stage: Stage::Stopped, offset, error: Error::new(ErrorKind::Cancelled, why) }
    }
}

impl std::fmt::Display for CopyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { stage, offset, error } = self;
        let error = strerror(error.raw_errno());
        match stage {
            Stage::Status => {
                write!(f, "error while reading block status at offset {offset}: {error}")
            }
            Stage::Reading => write!(f, "error while reading at byte {offset}: {error}"),
            Stage::Writing => write!(f, "error while writing at byte {offset}: {error}"),
            Stage::Stopped => write!(f, "Interrupted"),
        }
    }
}

impl std::error::Error for CopyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}
