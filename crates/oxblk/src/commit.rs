//! Commit of an overlay: the data of the overlay is copied into an image of its backing chain, the base.
//!
//! 1. Make the base writable. If the base is smaller than the overlay, grow the base to the size of the overlay.
//! 2. Copy all data and zeroes of the images above the base into the base ([`crate::copy`]).
//! 3. Flush the base and make it read-only again.
//! 4. If requested, empty the overlay. This is the last step, so that a crash loses no data. An overlay below a filter is not
//!    emptied, as in QEMU.
//!
//! The guest-visible contents of the overlay do not change at any time. Images between the overlay and the base have
//! inconsistent contents afterwards, since their backing file has changed.
//!
//! Nobody writes to the overlay during a commit ([`SoleWriter`]): emptying the overlay would lose data that was written after
//! its range had been copied. A commit fails if the overlay has another writer. Writes through the backend of the commit and
//! its clones are refused until the commit ends.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[cfg(doc)]
use oxblk_core::SoleWriter;
use oxblk_core::{Backend, Error, Node, Preallocation};
use oxblk_ring::IoThread;

use crate::copy::{self, Copy, CopyError, CopyOptions, Observer};

/// A commit to be run.
pub struct Commit {
    /// The overlay. It must be writable if `empty` is set. Writes through this backend fail during the commit.
    pub top: Backend,
    /// The node of the overlay's backing chain that receives the data. Filters may be above the overlay and in the chain.
    pub base: Arc<Node>,
    /// If true, the overlay is emptied at the end.
    pub empty: bool,
    /// Maximum number of chunks that are copied concurrently, on all threads together.
    pub parallel: usize,
    /// Maximum rate in bytes per second.
    pub rate: Option<u64>,
    /// Receives the progress.
    pub observer: Arc<dyn Observer>,
    /// Any thread may set this flag to stop the copy. The overlay is not emptied then.
    pub stop: Arc<AtomicBool>,
}

/// The failure of a commit. The guest-visible contents of the overlay are unchanged.
#[derive(Debug)]
pub enum CommitError {
    /// The overlay has another writer.
    Top(Error),
    /// The base could not be made writable or large enough, or the overlay was closed.
    Base(Error),
    /// The copy failed.
    Copy(CopyError),
    /// The base has all data, but the base could not be flushed or made read-only again, or the close of the overlay failed
    /// (the overlay is closed if it has no other user).
    Close(Error),
    /// The base has all data, but the overlay could not be emptied.
    Empty(Error),
}

/// Commits an overlay, on the current I/O thread and on `helpers`.
///
/// # Errors
/// The first failure.
pub async fn run(commit: Commit, helpers: &[IoThread]) -> Result<(), CommitError> {
    let writer = commit.top.sole_writer("commit job").await.map_err(CommitError::Top)?;
    let outcome = run_alone(&commit, writer.backend(), helpers).await;
    outcome.and(writer.end().await.map_err(CommitError::Close))
}

/// Commits the overlay `top`, to which nobody writes.
async fn run_alone(
    commit: &Commit,
    top: &Backend,
    helpers: &[IoThread],
) -> Result<(), CommitError> {
    let node = top.node().map_err(CommitError::Base)?;
    let writable = top.graph().write_base(&node, &commit.base).await.map_err(CommitError::Base)?;
    let copied = copy_to_base(commit, top, writable.backend(), helpers).await;
    let closed = writable.close().await.map_err(CommitError::Close);
    copied.and(closed)?;
    if commit.empty && node.filtered_child().is_none() {
        top.make_empty().await.map_err(CommitError::Empty)?;
    }
    Ok(())
}

async fn copy_to_base(
    commit: &Commit,
    top: &Backend,
    base: &Backend,
    helpers: &[IoThread],
) -> Result<(), CommitError> {
    let size = top.size();
    if base.size() < size {
        base.resize(size, Preallocation::Off).await.map_err(CommitError::Base)?;
    }
    let copy = Copy {
        sources: vec![top.clone()],
        range: Some(0..size),
        target: base.clone(),
        options: CopyOptions {
            parallel: commit.parallel,
            rate: commit.rate,
            above: Some(Arc::clone(&commit.base)),
            ..CopyOptions::default()
        },
        observer: Arc::clone(&commit.observer),
        stop: Arc::clone(&commit.stop),
    };
    copy::run(copy, helpers).await.map_err(CommitError::Copy)
}
