//! Copying disks: any images to any image, with many requests in flight on several I/O threads.
//!
//! A [`Copy`](struct@Copy) reads one or more sources end to end and writes what they hold to a target. Each worker
//! takes the next chunk of the disk, reads it, looks for zeroes in it and writes the rest, so
//! the bytes in memory are never more than workers × [`CopyOptions::chunk`], whatever the size of the
//! disk. They read and compress side by side; they write in the order of the disk, so that a target which allocates as it
//! is written gets the same bytes on every run, whatever the number of workers ([`CopyOptions::in_order`]).
//!
//! Nothing is flushed; closing the target does that.

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

/// How to copy.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Requests in flight over all threads.
    pub parallel: usize,
    /// Longest piece read at once in bytes; a multiple of 512.
    pub chunk: usize,
    /// Runs of at least this many zero bytes are not written as data; 0 writes everything as data.
    pub sparse: u64,
    /// Write compressed clusters.
    pub compress: bool,
    /// The target reads as zeroes where it is not written.
    pub target_is_zero: bool,
    /// The target has a backing file with what the top layer of the source does not have; its size in
    /// bytes. Only that top layer is copied.
    pub backing: Option<u64>,
    /// A layer of the source's chain, which the target is: only what the layers above it hold is copied.
    pub above: Option<Arc<Node>>,
    /// Have the host copy data where it can, zeroes in it included.
    pub offload: bool,
    /// Take what cannot be read for zeroes.
    pub salvage: bool,
    /// Bytes a second, at most.
    pub rate: Option<u64>,
    /// Write in the order of the disk, one request at a time. Otherwise writes are made side by side, and how the
    /// target is laid out differs from run to run.
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

/// Who hears of a copy under way. Called from several threads, in the order of the disk.
pub trait Observer: Send + Sync {
    /// `done` of `total` bytes have been dealt with.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether progress is to count what there is to copy, and not holes. All sources are then asked for their data
    /// before the copy begins.
    fn wants_total(&self) -> bool {
        false
    }

    /// Bytes that cannot be read have been taken for zeroes.
    fn salvaged(&self, offset: u64, error: &Error) {
        let _ = (offset, error);
    }
}

/// An observer that does not care.
impl Observer for () {}

/// A copy to be made.
pub struct Copy {
    /// What is read, one after the other.
    pub sources: Vec<Backend>,
    /// The part of it that is copied, in bytes; it goes to the start of the target. `None`: all.
    pub range: Option<Range<u64>>,
    /// What is written; at least as large as the part copied.
    pub target: Backend,
    /// How.
    pub options: CopyOptions,
    /// Who hears of it.
    pub observer: Arc<dyn Observer>,
    /// Set from anywhere, this stops the copy between two requests.
    pub stop: Arc<AtomicBool>,
}

/// What a copy was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Asking a source which parts hold data.
    Status,
    /// Reading a source.
    Reading,
    /// Writing the target.
    Writing,
    /// It was told to stop.
    Stopped,
}

/// A copy that failed.
#[derive(Debug)]
pub struct CopyError {
    /// At what.
    pub stage: Stage,
    /// Byte offset, counted over all sources.
    pub offset: u64,
    /// Why.
    pub error: Error,
}

impl CopyError {
    /// The copy has ended before `offset` because of `why`, which is no failed request.
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
