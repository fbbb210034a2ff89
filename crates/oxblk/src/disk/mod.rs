//! [`Disk`]: an open image with its backing chain. Any thread may use a disk.
//!
//! A method that does I/O sends a closure to an I/O thread, where the closure uses the disk's backend, and returns a
//! [`Request`]. All clones of a disk share one backend ([`OpenDisk`]). If the last clone is dropped without
//! [`Disk::close`], the drop closes the backend (`drop.rs`).

mod bitmaps;
mod cursor;
mod drop;
mod examine;
mod open;
mod sharing;
mod snapshots;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{Backend, Errno, Error, ErrorKind, Graph, Preallocation, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

pub use bitmaps::TakenRanges;
pub use cursor::Cursor;
pub use open::OpenOptions;
pub use sharing::Sharing;

use crate::{Extent, Extents, ImageInfo, IoThreads, Request};
use drop::OpenDisk;

/// An open disk image with its chain of backing files.
///
/// A `Disk` may be used from every thread and every executor. Methods that do I/O start a [`Request`] on an I/O thread;
/// the caller awaits the request or blocks on it. Clones refer to the same disk. [Close](Self::close) the disk at the
/// end: see the [front page](crate#closing).
#[derive(Clone)]
pub struct Disk(Arc<OpenDisk>);

impl Disk {
    /// Opens an image for reading and writing. Its format is probed.
    ///
    /// # Errors
    /// The errors of the system and the format.
    pub fn open(path: impl AsRef<Path>) -> Request<Self> {
        Self::options().open(path)
    }

    /// Opens an image for reading. Its format is probed.
    ///
    /// # Errors
    /// The errors of [`Self::open`].
    pub fn open_read_only(path: impl AsRef<Path>) -> Request<Self> {
        Self::options().read_only(true).open(path)
    }

    /// Options for opening an image; [`OpenOptions`] has the defaults and the methods to change them.
    pub fn options() -> OpenOptions {
        OpenOptions::default()
    }

    pub(crate) fn new(backend: Backend, threads: IoThreads) -> Self {
        Self(Arc::new(OpenDisk::new(backend, threads)))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.backend().size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.backend().is_read_only()
    }

    /// The block graph that contains the disk's nodes.
    pub fn graph(&self) -> &Graph {
        self.backend().graph()
    }

    /// The backend of the disk. Code on an I/O thread can make requests through the backend without changing threads. Futures
    /// of the backend run only on I/O threads.
    pub fn backend(&self) -> &Backend {
        &self.0.backend
    }

    /// The I/O threads that run the requests of the disk.
    pub fn threads(&self) -> &IoThreads {
        &self.0.threads
    }

    /// Runs `work` on an I/O thread with the disk's backend. `work` can make many requests without changing threads again.
    ///
    /// # Errors
    /// The errors of `work`; an error if the disk is closed.
    pub fn run<F, Fut, T>(&self, work: F) -> Request<T>
    where
        F: FnOnce(Backend) -> Fut + Send + 'static,
        Fut: Future<Output = crate::Result<T>> + 'static,
        T: Send + 'static,
    {
        if self.0.is_closed.load(Relaxed) {
            return Request::failed(closed());
        }
        self.begin(work)
    }

    fn begin<F, Fut, T>(&self, work: F) -> Request<T>
    where
        F: FnOnce(Backend) -> Fut + Send + 'static,
        Fut: Future<Output = crate::Result<T>> + 'static,
        T: Send + 'static,
    {
        let backend = self.backend().clone();
        Request::begin(self.threads(), move || work(backend))
    }

    /// Reads `len` bytes at the byte offset `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) past the end; otherwise the errors of the images of the chain and the
    /// system.
    pub fn read(&self, offset: u64, len: usize) -> Request<IoBufMut> {
        self.run(move |disk| async move {
            // Check the range first, so that an invalid length allocates no buffer.
            let end = u64::try_from(len).ok().and_then(|len| offset.checked_add(len));
            if end.is_none_or(|end| end > disk.size()) {
                return Err(outside(offset));
            }
            disk.read(offset, IoBufMut::new(len)).await
        })
    }

    /// Writes `data` at the byte offset `offset`. The data survives a power cut after a successful [`flush`](Self::flush) that
    /// began after the write had completed.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) past the end; otherwise the errors of the images of the chain and the
    /// system.
    pub fn write(&self, offset: u64, data: impl Into<IoBuf>) -> Request<()> {
        let data = data.into();
        self.run(move |disk| async move { disk.write(offset, data, WriteFlags::empty()).await })
    }

    /// Makes `len` bytes read as zeroes, and frees their space if the format and the host can do this.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Request<()> {
        self.run(
            move |disk| async move { disk.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await },
        )
    }

    /// Discards a range: its contents are no longer needed, and its space may be freed.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub fn discard(&self, offset: u64, len: u64) -> Request<()> {
        self.run(move |disk| async move { disk.discard(offset, len).await })
    }

    /// Flushes: all writes that completed before this call survive a power cut when the request has succeeded. With
    /// [`Cache::Unsafe`](crate::Cache::Unsafe), a flush does nothing.
    ///
    /// # Errors
    /// The errors of the system. If a flush of a file that uses the page cache fails, every later flush of the file fails too,
    /// because it is unknown which writes were lost.
    pub fn flush(&self) -> Request<()> {
        self.run(|disk| async move { disk.flush().await })
    }

    /// Sets the size in bytes. Added space reads as zeroes.
    ///
    /// # Errors
    /// The errors of the format and the system. After an error, the disk has the old or the new size: see [`Self::size`].
    pub fn resize(&self, size: u64) -> Request<()> {
        self.run(move |disk| async move { disk.resize(size, Preallocation::Off).await })
    }

    /// The part of the extent from the byte offset `offset` to the end of the extent. On an I/O thread,
    /// [`Extents`](crate::Extents) returns all extents.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) at or past the end; otherwise the errors of the images of the chain
    /// and the system.
    pub fn extent_at(&self, offset: u64) -> Request<Extent> {
        self.run(move |disk| async move {
            let mut extents = Extents::new(&disk, offset, None);
            extents.next().await?.ok_or_else(|| outside(offset))
        })
    }

    /// Information on the image: size, format, files, snapshots.
    ///
    /// # Errors
    /// If the disk is closed, or if the snapshots of an image cannot be read.
    pub fn info(&self) -> Request<ImageInfo> {
        self.run(|disk| async move { ImageInfo::read(&disk).await })
    }

    /// The disk as a [`std::io`] stream, for code that reads and writes streams. Calls of its methods block.
    pub fn cursor(&self) -> Cursor {
        Cursor::new(self.clone())
    }

    /// Writes cached metadata, flushes, and closes all files. If other handles of the disk exist, their later requests fail.
    /// The close runs to completion, even if the request is dropped.
    ///
    /// # Errors
    /// The first failure. All files are closed after a failure too. If the disk is already closed: an error.
    pub fn close(self) -> Request<()> {
        if self.0.is_closed.swap(true, Relaxed) {
            return Request::failed(closed());
        }
        self.begin(|disk| async move { disk.close().await })
    }
}

impl Disk {
    /// Drops this handle on an I/O thread. If it was the last handle, this waits until the disk is closed.
    pub(crate) async fn release(self) {
        if let Some(disk) = Arc::into_inner(self.0) {
            disk.release().await;
        }
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::NotFound, "The disk is closed").errno(Errno::NOMEDIUM)
}

fn outside(offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, "Request lies outside the device").at(offset)
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.backend().node().ok().and_then(|node| node.filename());
        f.debug_struct("Disk").field("name", &name).field("size", &self.size()).finish()
    }
}
