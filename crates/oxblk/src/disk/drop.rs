//! Close of a disk whose last handle is dropped without [`Disk::close`](super::Disk::close).
//!
//! A backend must be closed, to write the cached metadata of the image and to release the file locks. [`OpenDisk`] owns the
//! backend and starts the close when it is dropped. Outside of I/O threads the drop waits for the close; on an I/O thread the
//! close runs in the background. Failures are only logged, since a drop cannot return them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::Backend;
use oxblk_ring::{Remote, try_thread_index};

use crate::IoThreads;

/// The owner of a disk's backend. All clones of the disk refer to the same owner.
pub(super) struct OpenDisk {
    pub(super) backend: Backend,
    pub(super) threads: IoThreads,
    /// Set when the close has begun.
    pub(super) is_closed: AtomicBool,
}

impl OpenDisk {
    pub(super) fn new(backend: Backend, threads: IoThreads) -> Self {
        Self { backend, threads, is_closed: AtomicBool::new(false) }
    }
}

impl OpenDisk {
    /// Closes the disk and waits for the close. Returns immediately if a close has already begun. Use this on I/O threads,
    /// where a drop cannot wait.
    pub(super) async fn release(self) {
        if let Some(closing) = self.begin_closing() {
            closing.await.unwrap_or_else(|_| log_unfinished_close());
        }
    }

    /// Starts to close the disk on an I/O thread, unless the close has already begun. Failures are logged.
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
                tracing::error!(image = name, %error, "cannot close a disk that was dropped");
            }
        })
    }
}

impl Drop for OpenDisk {
    /// Closes the disk, so that its metadata is written and its locks and descriptors are released. Outside of I/O threads, the
    /// drop waits until the close has ended. Failures are only logged.
    fn drop(&mut self) {
        // An I/O thread must not wait here: the close may have to run on the same thread.
        if let Some(closing) = self.begin_closing().filter(|_| try_thread_index().is_none())
            && closing.wait().is_err()
        {
            log_unfinished_close();
        }
    }
}

fn log_unfinished_close() {
    tracing::error!("the I/O thread ended before it had closed a dropped disk");
}
