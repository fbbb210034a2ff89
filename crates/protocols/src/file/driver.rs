//! [`FileDriver`]: executes the requests of one open file.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use oxblk_core::driver::{CopyRange, Reopen, Resize};
use oxblk_core::{
    BoxFuture, Driver, Error, HostFile, ImageInfo, Limits, MapOp, Permissions, Result, Status,
    Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{File, IoBuf, IoBufMut};
use rustix::io::Errno;
use serde_json::json;

use super::align::Alignment;
use super::durable::Durable;
use super::extents::{self, ExtentCache};
use super::handle::{self, Kind};
use super::locks::FileLocks;
use super::options::AioOption;
use super::reopen::Prepared;
use super::zero::Refused;

/// A file or block device of the host, or a file that the embedder (for example a test) provides.
pub struct FileDriver {
    /// The current file. A reopen replaces the file while the node is drained.
    pub(super) file: ArcSwap<File>,
    pub(super) kind: Kind,
    pub(super) path: String,
    pub(super) size: AtomicU64,
    /// The `aio` option of the current file.
    pub(super) aio: Mutex<AioOption>,
    pub(super) direct: AtomicBool,
    pub(super) no_flush: AtomicBool,
    request_alignment: AtomicU32,
    memory_alignment: AtomicU32,
    pub(super) refused: Refused,
    pub(super) extents: ExtentCache,
    durable: Durable,
    pub(super) read_only: AtomicBool,
    /// The current permissions of the parents of the node.
    pub(super) permissions: Mutex<Permissions>,
    pub(super) locks: Option<FileLocks>,
    pub(super) prepared: Mutex<Option<Prepared>>,
}

/// The parts from which a driver is built.
pub(super) struct Parts {
    pub(super) file: File,
    pub(super) kind: Kind,
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) aio: AioOption,
    pub(super) read_only: bool,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    pub(super) alignment: Alignment,
    pub(super) locks: Option<FileLocks>,
}

impl FileDriver {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            file: ArcSwap::from_pointee(parts.file),
            kind: parts.kind,
            path: parts.path,
            size: AtomicU64::new(parts.size),
            aio: Mutex::new(parts.aio),
            direct: AtomicBool::new(parts.direct),
            no_flush: AtomicBool::new(parts.no_flush),
            request_alignment: AtomicU32::new(parts.alignment.request),
            memory_alignment: AtomicU32::new(parts.alignment.memory),
            refused: Refused::default(),
            extents: ExtentCache::default(),
            durable: Durable::default(),
            read_only: AtomicBool::new(parts.read_only),
            permissions: Mutex::new(Permissions::NONE),
            locks: parts.locks,
            prepared: Mutex::new(None),
        }
    }

    /// A driver for a file that is already open: a simulated disk, or a temporary file. `size` is its size in bytes.
    /// The file has no name, and the driver takes no locks.
    pub fn from_ring_file(file: File, size: u64) -> Self {
        Self::new(Parts {
            file,
            kind: Kind::Given,
            path: String::new(),
            size,
            aio: AioOption::Default,
            read_only: false,
            direct: false,
            no_flush: false,
            alignment: Alignment::NONE,
            locks: None,
        })
    }

    /// Makes the driver require that requests and memory are aligned to `alignment` bytes (a power of two).
    #[must_use]
    pub fn with_alignment(self, alignment: u32) -> Self {
        self.set_alignment(Alignment { request: alignment, memory: alignment });
        self
    }

    pub(super) fn set_alignment(&self, alignment: Alignment) {
        self.request_alignment.store(alignment.request, Ordering::Release);
        self.memory_alignment.store(alignment.memory, Ordering::Release);
    }

    /// A handle to the current file.
    pub(super) fn current(&self) -> File {
        File::clone(&self.file.load())
    }

    fn grow_to(&self, end: u64) {
        self.size.fetch_max(end, Ordering::AcqRel);
    }

    async fn flush_host(&self) -> Result<()> {
        self.sync_host(true).await
    }

    /// Flushes the file. All flushes of the node use this function, because the host reports a failure to write data
    /// only once, to the first caller.
    pub(super) async fn sync_host(&self, data_only: bool) -> Result<()> {
        self.durable.sync(self.current(), data_only, self.is_cached()).await
    }

    /// Closes a duplicate of the file descriptor. Some file systems (NFS) then report the errors of earlier writes. The
    /// driver keeps its own descriptor.
    pub(super) async fn close_handle(&self) -> Result<()> {
        self.durable.close(self.current(), self.is_cached()).await
    }

    /// Records the data of earlier writes in the page cache, before a reopen changes the cache mode.
    pub(super) fn keep_cached_data(&self) {
        if self.is_cached() {
            self.durable.keep_cached_data();
        }
    }

    /// Whether writes go through the page cache. After a failed writeback, the kernel drops the dirty data, and a later
    /// flush would wrongly succeed. This cannot happen with direct I/O.
    fn is_cached(&self) -> bool {
        !self.direct.load(Ordering::Acquire)
    }

    /// Closes the file, then releases its locks. If the file was writable, an error of the host on close is returned.
    /// For a read-only file, such an error is only logged.
    async fn close_file(&self) -> Result<()> {
        let file = self.file.swap(Arc::new(File::closed()));
        let file = Arc::try_unwrap(file).unwrap_or_else(|shared| File::clone(&shared));
        let closed = file
            .close()
            .await
            .map_err(|error| Error::from(error).prefix(format!("Could not close '{}'", self.path)));
        self.extents.set_permissions(Permissions::NONE);
        let unlocked = self.locks.as_ref().map_or(Ok(()), |locks| locks.set(Permissions::NONE));
        if let (Err(error), true) = (&closed, self.read_only.load(Ordering::Acquire)) {
            tracing::warn!(%error, "cannot close a file that was opened read-only");
            return unlocked;
        }
        closed.and(unlocked)
    }

    async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let end = offset.saturating_add(len);
        let grows = end > self.size.load(Ordering::Acquire) && self.kind != Kind::Block;
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let file = self.current();
        let outcome = self.refused.zero(&file, self.kind, (offset, len), unmap, grows).await;
        self.extents.invalidate();
        outcome?;
        self.grow_to(end);
        Ok(())
    }
}

impl Driver for FileDriver {
    fn info(&self) -> ImageInfo {
        let specific = json!({ "type": "file", "data": {} });
        ImageInfo { specific: Some(specific), ..ImageInfo::default() }
    }

    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Host { offset, len }
    }

    fn host_file(&self) -> Option<HostFile<'_>> {
        Some(HostFile::Current(self.file.load()))
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { Ok(self.current().read_full_at(buf, offset).await?.0) })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let end = offset.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
            let fua = flags.contains(WriteFlags::FUA) && !self.no_flush.load(Ordering::Relaxed);
            // A write with `RWF_DSYNC` flushes its range of the page cache. It could get, and so use up, the error of another
            // write that the host reports only once. Therefore a file in the page cache is flushed by the function that
            // records such an error. Direct writes leave no data in the page cache.
            let with_write = fua && !self.durable.must_record(self.is_cached());
            self.current().write_all_at(data, offset, with_write).await?;
            self.grow_to(end);
            if fua && !with_write {
                self.flush_host().await?;
            }
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.zero(offset, len, flags)))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let file = self.current();
            let outcome = self.refused.discard(&file, self.kind, offset, len).await;
            self.extents.invalidate();
            outcome
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        if self.no_flush.load(Ordering::Relaxed) {
            return None;
        }
        Some(Box::pin(self.flush_host()))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            if want == Want::Allocation {
                return Ok(extents::assume_data(offset, len));
            }
            let alignment = u64::from(self.request_alignment.load(Ordering::Relaxed));
            extents::status(&self.current(), &self.extents, offset, len, alignment).await
        }))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn refresh_size(&self) -> Option<BoxFuture<'_, Result<u64>>> {
        Some(Box::pin(async move {
            let size = self.current().len().await?;
            self.size.store(size, Ordering::Release);
            self.extents.invalidate();
            Ok(size)
        }))
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits {
            request_alignment: self.request_alignment.load(Ordering::Acquire),
            mem_alignment: self.memory_alignment.load(Ordering::Acquire),
            write_flags: WriteFlags::FUA,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: matches!(self.kind, Kind::Regular | Kind::Given),
            grows: matches!(self.kind, Kind::Regular | Kind::Given),
            ..Limits::default()
        };
        if self.kind == Kind::Block {
            limits.discard_alignment = self.discard_granularity();
        }
        limits
    }

    fn allocated_size(&self) -> Option<u64> {
        let file = self.current();
        let stat = rustix::fs::fstat(file.as_fd()?).ok()?;
        u64::try_from(stat.st_blocks).ok()?.checked_mul(512)
    }

    fn filename(&self) -> Option<String> {
        (!self.path.is_empty()).then(|| self.path.clone())
    }

    fn prepare_permissions(&self, permissions: Permissions) -> Result<()> {
        match &self.locks {
            Some(locks) => locks.prepare(permissions),
            None => Ok(()),
        }
    }

    fn commit_permissions(&self, permissions: Permissions) {
        if let Some(locks) = &self.locks {
            locks.commit(permissions);
            self.extents.set_permissions(permissions);
        }
        *self.permissions.lock().unwrap_or_else(PoisonError::into_inner) = permissions;
    }

    fn abort_permissions(&self) {
        if let Some(locks) = &self.locks {
            locks.abort();
        }
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.close_file()))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn copy_range(&self) -> Option<&dyn CopyRange> {
        Some(self)
    }
}

impl FileDriver {
    fn discard_granularity(&self) -> u32 {
        let file = self.current();
        let reported = file.as_fd().and_then(|fd| handle::queue_value(fd, "discard_granularity"));
        let reported = reported.and_then(|value| u32::try_from(value).ok());
        reported.filter(|value| value.is_power_of_two()).unwrap_or(1)
    }
}

impl std::fmt::Debug for FileDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileDriver")
            .field("path", &self.path)
            .field("kind", &self.kind)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// The error for a file of the wrong type: the driver requires a regular file, or a device.
pub(super) fn wrong_kind(driver: &str, path: &str, wanted: &str) -> Error {
    Error::from_errno(Errno::INVAL.raw_os_error())
        .reword(format!("'{driver}' driver requires '{path}' to be {wanted}"))
}

pub(super) type SharedFile = Arc<File>;
