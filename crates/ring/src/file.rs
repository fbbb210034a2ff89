//! Files and the operations on them.
//!
//! | file | concern |
//! |---|---|
//! | this file | the handle: opening, closing, size, allocation, copies |
//! | `transfer` | reads and writes |
//! | `extents` | data and holes |
//! | `registration` | the dense id, and the rings that have registered the file |
//!
//! A [`File`] is a handle that all I/O threads may use concurrently. Each ring registers the file when the ring first
//! uses it, with the dense id of the file as the index. When the last handle is dropped, the engine sends a request to
//! unregister the file to each of these rings, and closes the descriptor.
//!
//! A single read or write ([`File::read_at`] and similar methods) starts when the method is called, on the current I/O
//! thread, and owns its buffers. If its future is dropped, the operation continues. Most other operations are `async
//! fn`s.

mod extents;
mod registration;
mod transfer;

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Weak};

use crate::aio::Aio;
use crate::reactor::{Op, Payload, start_file};
use crate::runtime::offload::on_file;
use crate::sim::Disk;
pub use extents::Extent;
use registration::Registration;
pub use transfer::{ReadAt, ReadForeignAt, ReadvAt, WriteAt, WriteForeignAt, WritevAt};

/// The mode of [`File::fallocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Falloc {
    /// Allocate, and extend the file if necessary.
    Allocate,
    /// Allocate, also beyond the end, but keep the size.
    AllocateKeepSize,
    /// Free the space; reads return zeroes. Keeps the size.
    PunchHole,
    /// Make the range read as zeroes, and extend the file if necessary.
    ZeroRange,
    /// Make the range read as zeroes; keep the size.
    ZeroRangeKeepSize,
}

impl Falloc {
    pub(crate) fn mode(self) -> i32 {
        match self {
            Falloc::Allocate => 0,
            Falloc::AllocateKeepSize => libc::FALLOC_FL_KEEP_SIZE,
            Falloc::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Falloc::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            Falloc::ZeroRangeKeepSize => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// `f_type` of tmpfs and ramfs, see `statfs(2)`.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

struct Host {
    // The order of the fields matters: `registration` is dropped before the descriptor is closed.
    registration: Registration,
    fd: OwnedFd,
    aio: Aio,
    /// The file is on tmpfs or ramfs, so reads and writes do not wait for a device (unless memory is swapped out).
    in_memory: bool,
}

#[derive(Clone)]
enum Inner {
    Host(Arc<Host>),
    Sim(Disk),
    /// Every operation fails with `EBADF`.
    Closed,
}

/// An open file or block device, or a simulated disk. Cloning makes another handle to the same file.
#[derive(Clone)]
pub struct File(Inner);

/// See [`File::downgrade`].
pub(crate) struct WeakFile(Weak<Host>);

impl WeakFile {
    /// A handle to the file; `None` if all handles are dropped.
    pub(crate) fn upgrade(&self) -> Option<File> {
        self.0.upgrade().map(|host| File(Inner::Host(host)))
    }
}

impl File {
    /// Takes over a descriptor.
    pub fn from_fd(fd: OwnedFd, aio: Aio) -> File {
        let in_memory =
            rustix::fs::fstatfs(&fd).is_ok_and(|stat| MEMORY_FILE_SYSTEMS.contains(&stat.f_type));
        File(Inner::Host(Arc::new(Host { registration: Registration::new(), fd, aio, in_memory })))
    }

    /// A weak reference: it does not keep a file of the host open.
    pub(crate) fn downgrade(&self) -> WeakFile {
        match &self.0 {
            Inner::Host(host) => WeakFile(Arc::downgrade(host)),
            Inner::Sim(_) | Inner::Closed => WeakFile(Weak::new()),
        }
    }

    /// A simulated disk as a file.
    pub fn sim(disk: &Disk) -> File {
        File(Inner::Sim(disk.clone()))
    }

    /// A file that has been closed: every operation fails with `EBADF`.
    pub fn closed() -> File {
        File(Inner::Closed)
    }

    /// Closes this handle and returns the error that the host reports. Some file systems (network file systems,
    /// quotas) report only on close that they could not store data. If other handles remain, a duplicate of the
    /// descriptor is closed, so that the host reports the error, and the descriptor stays open.
    ///
    /// # Errors
    /// The errors of `close(2)`; `EBADF` for [`File::closed`]. The handle is closed after an error too.
    pub async fn close(self) -> io::Result<()> {
        match self.0 {
            Inner::Host(host) => on_file(move || close_host(host)).await,
            Inner::Sim(disk) => disk.close(),
            Inner::Closed => Err(bad_descriptor()),
        }
    }

    /// The descriptor; `None` for a simulated disk and for [`File::closed`].
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.0 {
            Inner::Host(host) => Some(host.fd.as_fd()),
            Inner::Sim(_) | Inner::Closed => None,
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        match &self.0 {
            Inner::Host(host) => host.fd.as_raw_fd(),
            Inner::Sim(_) | Inner::Closed => -1,
        }
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        match &self.0 {
            Inner::Sim(disk) => Some(disk),
            Inner::Host(_) | Inner::Closed => None,
        }
    }

    pub(crate) fn aio(&self) -> Aio {
        match &self.0 {
            Inner::Host(host) => host.aio,
            Inner::Sim(_) | Inner::Closed => Aio::Threads,
        }
    }

    /// Whether the file is on tmpfs or ramfs, so that reads and writes do not wait for a device.
    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(&self.0, Inner::Host(host) if host.in_memory)
    }

    /// The dense id; for a simulated disk or a closed file, an id beyond the end of every table.
    pub(crate) fn id(&self) -> u32 {
        match &self.0 {
            Inner::Host(host) => host.registration.id(),
            Inner::Sim(_) | Inner::Closed => u32::MAX,
        }
    }

    /// Records that the ring of the I/O thread `index` has registered the file.
    pub(crate) fn note_ring(&self, index: usize) {
        if let Inner::Host(host) = &self.0 {
            host.registration.note_ring(index);
        }
    }

    /// Flushes: data of completed writes survives a power cut. With `data_only`, the flush includes only the metadata
    /// that is needed to read this data (`fdatasync`).
    ///
    /// # Errors
    /// The error of the host. After an error, a power cut may lose any data that was written after the last successful
    /// flush.
    pub async fn sync(&self, data_only: bool) -> io::Result<()> {
        self.unit(Op::Sync { data_only }).await
    }

    /// Allocates, frees or zeroes a range.
    ///
    /// # Errors
    /// The errors of `fallocate(2)`: `EOPNOTSUPP` if the file does not support the mode.
    pub async fn fallocate(&self, mode: Falloc, offset: u64, len: u64) -> io::Result<()> {
        self.unit(Op::Fallocate { mode: mode.mode(), offset, len }).await
    }

    async fn unit(&self, op: Op) -> io::Result<()> {
        loop {
            let (result, _) = start_file(self, op, Payload::None).await;
            match count(result) {
                Err(error) if is_transient(&error) => crate::yield_now().await,
                result => return result.map(drop),
            }
        }
    }

    /// Truncates the file or extends it with zeroes.
    ///
    /// # Errors
    /// The errors of `ftruncate(2)`; `EFBIG` if `len` exceeds the signed range.
    pub async fn set_len(&self, len: u64) -> io::Result<()> {
        let host = match &self.0 {
            Inner::Sim(_) => return self.unit(Op::Truncate { len }).await,
            Inner::Closed => return Err(bad_descriptor()),
            Inner::Host(host) => Arc::clone(host),
        };
        let len = signed(len)?;
        // SAFETY: no memory involved; the descriptor is kept open by `host`.
        on_file(move || check(i64::from(unsafe { libc::ftruncate(host.fd.as_raw_fd(), len) })))
            .await
            .map(drop)
    }

    /// Runs a blocking system call on this file on a worker thread. Like every other operation, the call continues if
    /// the future is dropped, and [`settled`](crate::settled) waits for the call.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn call<T, F>(&self, f: F) -> impl Future<Output = T> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce(&File) -> T + Send + 'static,
    {
        let file = self.clone();
        on_file(move || f(&file))
    }

    /// The size in bytes, also of a block device.
    ///
    /// # Errors
    /// The errors of `lseek(2)`.
    #[expect(
        clippy::unused_async,
        reason = "part of the interface: a remote file system may have to send a request"
    )]
    pub async fn len(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::Sim(disk) => disk.file_len(),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                // SAFETY: no memory involved. Nothing uses the descriptor's position.
                check(unsafe { libc::lseek(host.fd.as_raw_fd(), 0, libc::SEEK_END) })
            }
        }
    }

    /// Copies at most 1 GiB inside the kernel (`copy_file_range`), and returns the number of bytes copied. The copy may
    /// be short.
    ///
    /// # Errors
    /// The errors of `copy_file_range(2)`: `EXDEV`, `EOPNOTSUPP` or `EINVAL` if the kernel cannot copy between these
    /// files. `EOPNOTSUPP` if one of the files is a simulated disk or [`File::closed`]; `EFBIG` if an offset exceeds the
    /// signed range.
    pub async fn copy_range_to(
        &self,
        offset: u64,
        dst: &File,
        dst_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let (Inner::Host(from), Inner::Host(to)) = (&self.0, &dst.0) else {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        };
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        let (mut offset, mut dst_offset) = (signed(offset)?, signed(dst_offset)?);
        let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
        on_file(move || {
            // SAFETY: both offsets are local variables; the descriptors are kept open by `from` and `to`.
            check(unsafe {
                libc::copy_file_range(
                    from.fd.as_raw_fd(),
                    &raw mut offset,
                    to.fd.as_raw_fd(),
                    &raw mut dst_offset,
                    len,
                    0,
                ) as i64
            })
        })
        .await
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Host(host) => f.debug_tuple("File").field(&host.fd).finish(),
            Inner::Sim(_) => f.write_str("File(sim)"),
            Inner::Closed => f.write_str("File(closed)"),
        }
    }
}

fn bad_descriptor() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

/// Closes a handle. On each close of a descriptor, also of a duplicate, the file system writes back data and reports
/// errors.
fn close_host(host: Arc<Host>) -> io::Result<()> {
    let fd = match Arc::try_unwrap(host) {
        Ok(Host { registration, fd, .. }) => {
            drop(registration);
            fd
        }
        Err(shared) => shared.fd.try_clone()?,
    };
    // SAFETY: no memory involved; the descriptor is ours, and Linux closes it also if `close` returns an error.
    check(i64::from(unsafe { libc::close(fd.into_raw_fd()) })).map(drop)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn signed(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn check(result: i64) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Converts a count or a negative errno into a result.
pub(crate) fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
}
