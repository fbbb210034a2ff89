//! What happens to a disk that is dropped without having been closed.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Backend;
use oxblk_ring::{Remote, try_thread_index};

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

impl OpenDisk {
    /// Drops it on an I/O thread and waits until it is closed, if it was not.
    pub(super) async fn release(self) {
        if let Some(closing) = self.begin_closing() {
            closing.await.unwrap_or_else(|_| log_lost());
        }
    }

    /// Starts to close the disk on an I/O thread, unless that has begun. Failures are logged.
    fn begin_closing(&self) -> Option<Remote<()>> {
        if self.is_closed.swap(true, Relaxed) {
            return None;
        }
        let node = self.backend.node().ok();
        let name = node.as_ref().and_then(|node| node.filename()).unwrap_or_default();
        drop(node);
        tracing::error!(
            image = name,
            "a disk was dropped without being closed; it is closed now, and failures are only logged"
        );
        let backend = self.backend.clone();
        self.threads.spawn(move || async move {
            if let Err(error) = backend.close().await {
                tracing::error!(image = name, %error, "closing a disk that was dropped");
            }
        })
    }
}

impl Drop for OpenDisk {
    /// Closes the disk, so that its locks and descriptors are given back and the image is whole. Outside of I/O threads that has
    /// happened when this returns. Nobody hears of a failure but the log.
    fn drop(&mut self) {
        // Waiting on an I/O thread would keep the closing itself from running.
        if let Some(closing) = self.begin_closing().filter(|_| try_thread_index().is_none())
            && closing.wait().is_err()
        {
            log_lost();
        }
    }
}

fn log_lost() {
    tracing::error!("the I/O thread ended before a disk that was dropped was closed");
}
