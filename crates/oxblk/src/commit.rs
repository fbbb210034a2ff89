//! Committing an overlay: what it holds is written into an image below it.
//!
//! 1. The base is made writable, and as large as the overlay if it is smaller.
//! 2. What the layers above the base hold is copied into it, zeroes included ([`crate::copy`]).
//! 3. The base is made durable, and a backing file again.
//! 4. If wanted, the overlay is emptied: only now, so that a crash loses nothing.
//!
//! What the overlay shows is the same at every moment. Layers between it and the base, if there are any, are of no use by
//! themselves afterwards.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_core::{Backend, Error, Node, Preallocation};
use oxblk_ring::IoThread;

use crate::copy::{self, Copy, CopyError, CopyOptions, Observer};

/// An overlay to be committed.
pub struct Commit {
    /// The overlay; writable if it is to be emptied.
    pub top: Backend,
    /// A node of its backing chain, into which it is committed.
    pub base: Arc<Node>,
    /// The overlay gives up what it holds when all is done.
    pub empty: bool,
    /// Requests in flight over all threads.
    pub parallel: usize,
    /// Bytes a second, at most.
    pub rate: Option<u64>,
    /// Who hears of it.
    pub observer: Arc<dyn Observer>,
    /// Set from anywhere, this stops the copy between two requests. The overlay is not emptied then.
    pub stop: Arc<AtomicBool>,
}

/// A commit that failed. The overlay shows what it has shown before.
#[derive(Debug)]
pub enum CommitError {
    /// The base cannot be written, or not made large enough.
    Base(Error),
    /// While data was copied.
    Copy(CopyError),
    /// All is in the base, but it was not made durable.
    Close(Error),
    /// All is in the base, but the overlay could not be emptied.
    Empty(Error),
}

/// Commits an overlay, on the current I/O thread and on `helpers`.
///
/// # Errors
/// The first failure.
pub async fn run(commit: Commit, helpers: &[IoThread]) -> Result<(), CommitError> {
    let graph = commit.top.graph().clone();
    let top = commit.top.node().map_err(CommitError::Base)?;
    let writable = graph.write_base(&top, &commit.base).await.map_err(CommitError::Base)?;
    let copied = copy_down(&commit, writable.backend(), helpers).await;
    let closed = writable.close().await.map_err(CommitError::Close);
    copied.and(closed)?;
    if commit.empty {
        commit.top.make_empty().await.map_err(CommitError::Empty)?;
    }
    Ok(())
}

async fn copy_down(
    commit: &Commit,
    base: &Backend,
    helpers: &[IoThread],
) -> Result<(), CommitError> {
    let size = commit.top.size();
    if base.size() < size {
        base.resize(size, Preallocation::Off).await.map_err(CommitError::Base)?;
    }
    let copy = Copy {
        sources: vec![commit.top.clone()],
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
