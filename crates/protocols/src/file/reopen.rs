//! Reopen: opens the file again with other options (write access, page cache), and replaces the descriptor of the node.
//!
//! `prepare` opens and examines the new descriptor, and `commit` makes it the current descriptor. A reopen does not
//! change the locks, which have their own descriptor. The permissions of the node's parents decide whether writes are
//! allowed.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Error, OpenFlags, Options, Result};
use oxblk_ring::File;
use rustix::io::Errno;

use super::FileDriver;
use super::align::{self, Alignment};
use super::driver::SharedFile;
use super::handle::{self, Access, Kind};
use super::options::{AioOption, FileOptions, Locking};

/// A prepared reopen that waits for commit or abort.
pub(super) struct Prepared {
    /// The new file; `None` if the file is from the embedder, because such a file is not replaced.
    file: Option<SharedFile>,
    alignment: Alignment,
    aio: AioOption,
    read_only: bool,
    direct: bool,
    no_flush: bool,
}

impl FileDriver {
    async fn prepare_reopen(&self, flags: OpenFlags, options: Options) -> Result<Prepared> {
        let options = self.check_unchanged(options)?;
        let (direct, no_flush) = (flags.direct, flags.no_flush);
        let read_only = flags.read_only;
        let wanted = options.aio(direct, None)?;
        let aio = if options.aio.is_some() { wanted } else { *lock(&self.aio) };
        if self.kind == Kind::Given {
            let alignment = Alignment::NONE;
            return Ok(Prepared { file: None, alignment, aio, read_only, direct, no_flush });
        }
        self.settle_descriptor().await?;
        let (read_only, no_symlinks) = (flags.read_only, flags.no_symlinks);
        let access = Access { read_only, direct, no_symlinks };
        let failed = |errno| match errno {
            // `open_error` returns no file name for these errors, so add it here.
            Errno::MFILE | Errno::NFILE => Error::from_errno(errno.raw_os_error())
                .prefix(format!("Could not open '{}'", self.path)),
            errno => handle::open_error(&self.path, errno, direct),
        };
        let handle = handle::open(&self.path, access).map_err(failed)?;
        if !self.is_same_file(&handle.fd)? {
            return Err(Error::invalid(format!(
                "Could not open '{}': another file has its name now",
                self.path
            )));
        }
        let file = File::from_fd(handle.fd, aio.engine());
        let alignment = if direct { align::probe(&file).await? } else { Alignment::NONE };
        let permissions = *lock(&self.permissions);
        permissions.check_size(self.size.load(Ordering::Acquire), alignment.request)?;
        let file = Some(Arc::new(file));
        Ok(Prepared { file, alignment, aio, read_only, direct, no_flush })
    }

    /// Closes a duplicate of the current descriptor if the file is writable. The host then reports errors of earlier
    /// writes at a time when the reopen can still be refused. So the later close of the descriptor has no data to
    /// write.
    async fn settle_descriptor(&self) -> Result<()> {
        if self.read_only.load(Ordering::Acquire) {
            return Ok(());
        }
        let could_not_close = |e: Error| e.prefix(format!("Could not close '{}'", self.path));
        self.close_handle().await.map_err(could_not_close)
    }

    /// Checks the options of a reopen. An option that cannot change must have its current value.
    fn check_unchanged(&self, mut options: Options) -> Result<FileOptions> {
        let own: FileOptions = options.extract()?;
        if let Some(key) = options.first_key() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        if own.filename.as_ref().is_some_and(|name| *name != self.path) {
            return Err(Error::invalid("Cannot change the option 'filename'"));
        }
        let locks = self.locks.is_some();
        match own.locking()? {
            Locking::On if !locks => Err(Error::invalid("Cannot change the option 'locking'")),
            Locking::Off if locks => Err(Error::invalid("Cannot change the option 'locking'")),
            _ => Ok(own),
        }
    }

    fn is_same_file(&self, fd: impl std::os::fd::AsFd) -> Result<bool> {
        let current = self.current();
        let Some(old) = current.as_fd() else { return Ok(true) };
        let io = |errno: Errno| Error::from_errno(errno.raw_os_error());
        let (old, new) = (rustix::fs::fstat(old).map_err(io)?, rustix::fs::fstat(fd).map_err(io)?);
        Ok((old.st_dev, old.st_ino, old.st_rdev) == (new.st_dev, new.st_ino, new.st_rdev))
    }

    fn take_prepared(&self) -> Option<Prepared> {
        lock(&self.prepared).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reopen for FileDriver {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = options.clone();
        Box::pin(async move {
            let prepared = self.prepare_reopen(flags, options).await?;
            *lock(&self.prepared) = Some(prepared);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(prepared) = self.take_prepared() else { return };
            // Direct I/O needs no flush first: the kernel writes cached data back before it reads or writes the same range
            // directly. The data remains marked as unflushed, and the next flush of the file covers it.
            self.keep_cached_data();
            if let Some(file) = prepared.file {
                self.file.store(file);
                self.set_alignment(prepared.alignment);
            }
            *lock(&self.aio) = prepared.aio;
            self.direct.store(prepared.direct, Ordering::Release);
            self.no_flush.store(prepared.no_flush, Ordering::Release);
            self.read_only.store(prepared.read_only, Ordering::Release);
            self.extents.invalidate();
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move { drop(self.take_prepared()) })
    }
}
