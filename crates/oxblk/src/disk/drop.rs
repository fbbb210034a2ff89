//! What happens to a disk that is dropped without having been closed.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Backend;
use oxblk_ring::try_thread_index;

use crate::IoThreads;

/// The one owner of a disk's backend.
pub(super) struct OpenDisk {
    pub(super) backend: Backend,
    pub(super) threads: IoThreads,
    /// Closing has begun.
    pub(super) is_closed: AtomicBool,
}

impl OpenDisk {
    pub(super) fn new(backend: Backend, threads: IoThreads) -> Self {
        Self { backend, threads, is_closed: AtomicBool::new(false) }
    }
}

impl Drop for OpenDisk {
    /// Closes the disk, so that its locks and descriptors are given back and the image is whole. Outside of I/O threads that has
    /// happened when this returns. Nobody hears of a failure but the log.
    fn drop(&mut self) {
        if self.is_closed.load(Relaxed) {
            return;
        }
        let node = self.backend.node().ok();
        let name = node.as_ref().and_then(|node| node.filename()).unwrap_or_default();
        drop(node);
        tracing::error!(
            image = name,
            "a disk was dropped without being closed; it is closed now, and failures are only logged"
        );
        let backend = self.backend.clone();
        let closing = self.threads.spawn(move || async move {
            if let Err(error) = backend.close().await {
                tracing::error!(image = name, %error, "closing a disk that was dropped");
            }
        });
        // On an I/O thread this would keep the closing itself from running.
        if let Some(closing) = closing.filter(|_| try_thread_index().is_none())
            && closing.wait().is_err()
        {
            tracing::error!("the I/O thread ended before a disk that was dropped was closed");
        }
    }
}
