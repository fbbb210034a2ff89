//! Files and the operations on them.
//!
//! A [`File`] is a handle that all I/O threads may use at once. Each ring registers the file at its first use, under
//! the file's dense id. When the last handle is dropped the descriptor is closed, and every ring that has registered
//! the file is asked to unregister it.
//!
//! Reads and writes start when the method is called, on the current I/O thread, and own their buffers. Dropping their
//! future only detaches the operation. All other operations are `async fn`s.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use crate::buf::{IoBuf, IoBufMut, IoVec, IoVecMut};
use crate::reactor::{Op, Payload, Pending, start_file};
use crate::runtime::offload::on_file;
use crate::runtime::shared::{Message, send_to};
use crate::sim::Disk;

/// How a file's reads and writes are carried out (QEMU's `aio=`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring; on an I/O thread without one it means [`Threads`](Aio::Threads).
    #[default]
    IoUring,
    /// Linux AIO. For files opened with `O_DIRECT`.
    Native,
    /// Blocking calls on worker threads.
    Threads,
}

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

/// A run of a file that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Whether it is data; a hole reads as zeroes.
    pub is_data: bool,
    /// Its end, in bytes from the start of the file.
    pub end: u64,
}

/// `f_type` of tmpfs and ramfs, see `statfs(2)`.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// A small number that no other open file has. When dropped, another file may use it.
struct FileId(u32);

struct FreeIds {
    next: u32,
    free: Vec<u32>,
}

static IDS: Mutex<FreeIds> = Mutex::new(FreeIds { next: 0, free: Vec::new() });

impl FileId {
    fn new() -> FileId {
        let mut ids = IDS.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ids.free.pop().unwrap_or_else(|| {
            let id = ids.next;
            ids.next += 1;
            id
        });
        FileId(id)
    }
}

impl Drop for FileId {
    fn drop(&mut self) {
        IDS.lock().unwrap_or_else(PoisonError::into_inner).free.push(self.0);
    }
}

struct Host {
    // The fields drop in this order: rings are asked to unregister the file before the descriptor is closed.
    registration: Registration,
    fd: OwnedFd,
    aio: Aio,
    /// The file's data exists in memory only (tmpfs): reads and writes never wait for a device.
    in_memory: bool,
}

/// The file's index in the registered-file tables of rings.
struct Registration {
    id: Arc<FileId>,
    /// I/O threads whose ring may have registered the file, by index.
    rings: AtomicU64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // The id becomes free when the last ring has unregistered the file.
        let rings = *self.rings.get_mut();
        send_to(rings, || Message::Unregister(self.id.0, Arc::clone(&self.id) as _));
    }
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
    /// The file; `None` if all its handles are dropped.
    pub(crate) fn upgrade(&self) -> Option<File> {
        self.0.upgrade().map(|host| File(Inner::Host(host)))
    }
}

impl File {
    /// Takes over a descriptor.
    pub fn from_fd(fd: OwnedFd, aio: Aio) -> File {
        let in_memory =
            rustix::fs::fstatfs(&fd).is_ok_and(|stat| MEMORY_FILE_SYSTEMS.contains(&stat.f_type));
        File(Inner::Host(Arc::new(Host {
            registration: Registration { id: Arc::new(FileId::new()), rings: AtomicU64::new(0) },
            fd,
            aio,
            in_memory,
        })))
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

    /// Closes this handle and returns the error that the host reports: some file systems (network file systems,
    /// quotas) report only at this point that data could not be stored. If other handles remain, the descriptor stays
    /// open for them, but the host still reports.
    ///
    /// # Errors
    /// The errors of `close(2)`. The handle is closed in this case too.
    pub async fn close(self) -> io::Result<()> {
        match self.0 {
            Inner::Host(host) => on_file(move || close_host(host)).await,
            Inner::Sim(disk) => disk.close(),
            Inner::Closed => Err(bad_descriptor()),
        }
    }

    /// The descriptor; `None` for a simulated disk.
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

    /// Whether its reads and writes wait for nothing but memory.
    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(&self.0, Inner::Host(host) if host.in_memory)
    }

    /// The dense id; for a simulated disk, an id beyond the end of every table.
    pub(crate) fn id(&self) -> u32 {
        match &self.0 {
            Inner::Host(host) => host.registration.id.0,
            Inner::Sim(_) | Inner::Closed => u32::MAX,
        }
    }

    /// Remembers that the ring of the I/O thread `index` has registered the file.
    pub(crate) fn note_ring(&self, index: usize) {
        if let Inner::Host(host) = &self.0 {
            host.registration.rings.fetch_or(1 << index, Ordering::Relaxed);
        }
    }

    /// Reads once, at most `buf.len()` bytes. The read may be short; it returns 0 at the end of the file.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn read_at(&self, buf: IoBufMut, offset: u64) -> ReadAt {
        ReadAt(start_file(self, Op::Read { offset }, Payload::Read(buf)))
    }

    /// Writes once; the write may be short. With `fua` the data is durable on completion (`RWF_DSYNC`).
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn write_at(&self, buf: IoBuf, offset: u64, fua: bool) -> WriteAt {
        WriteAt(start_file(self, Op::Write { offset, fua }, Payload::Write(buf)))
    }

    /// Reads once into several buffers in order; the read may be short.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn read_vectored_at(&self, bufs: IoVecMut, offset: u64) -> ReadvAt {
        ReadvAt(start_file(self, Op::Read { offset }, Payload::ReadV(bufs)))
    }

    /// Writes several buffers in order; the write may be short.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn write_vectored_at(&self, bufs: IoVec, offset: u64, fua: bool) -> WritevAt {
        WritevAt(start_file(self, Op::Write { offset, fua }, Payload::WriteV(bufs)))
    }

    /// Reads until the buffer is full or the file ends. Returns the number of bytes that were before the end; the
    /// rest of the buffer is zeroed.
    ///
    /// # Errors
    /// The read's error.
    pub async fn read_full_at(&self, buf: IoBufMut, offset: u64) -> io::Result<(IoBufMut, usize)> {
        let len = buf.len();
        let (mut front, mut rest, mut filled) = (None::<IoBufMut>, buf, 0usize);
        while !rest.is_empty() {
            let (result, buf) = self.read_at(rest, at(offset, filled)?).await;
            rest = buf;
            match result {
                Ok(0) => break,
                Ok(n) => {
                    filled += n;
                    if filled == len && front.is_none() {
                        return Ok((rest, len));
                    }
                    let piece = rest.split_to(n);
                    front = Some(join(front, piece));
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        rest.fill(0);
        Ok((join(front, rest), filled))
    }

    /// Writes everything.
    ///
    /// # Errors
    /// The write's error; [`io::ErrorKind::WriteZero`] if the file accepts no more data.
    pub async fn write_all_at(&self, mut buf: IoBuf, offset: u64, fua: bool) -> io::Result<()> {
        let mut written = 0;
        while !buf.is_empty() {
            match self.write_at(buf.clone(), at(offset, written)?, fua).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n;
                    if n == buf.len() {
                        break;
                    }
                    drop(buf.split_to(n));
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes several buffers completely, in order.
    ///
    /// # Errors
    /// The write's error; [`io::ErrorKind::WriteZero`] if the file accepts no more data.
    pub async fn write_all_vectored_at(
        &self,
        mut bufs: IoVec,
        offset: u64,
        fua: bool,
    ) -> io::Result<()> {
        let mut written = 0;
        bufs.retain(|buf| !buf.is_empty());
        while !bufs.is_empty() {
            match self.write_vectored_at(bufs.clone(), at(offset, written)?, fua).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n;
                    crate::net::advance(&mut bufs, n);
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes what has been written durable; with `data_only`, only the metadata needed to read it back (`fdatasync`).
    ///
    /// # Errors
    /// The file's error. After an error it is unknown what is durable.
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
    /// The errors of `ftruncate(2)`.
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

    /// Runs a host system call on this file that may block, on a worker thread. Like every other operation it
    /// continues if the future is dropped, and [`settled`](crate::settled) waits for it.
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
    /// The errors of `fstat(2)` and `lseek(2)`.
    #[expect(
        clippy::unused_async,
        reason = "part of the interface: a remote file system may have to send a request"
    )]
    pub async fn len(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::Sim(disk) => Ok(disk.len()),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                // SAFETY: no memory involved. Nothing uses the descriptor's position.
                check(unsafe { libc::lseek(host.fd.as_raw_fd(), 0, libc::SEEK_END) })
            }
        }
    }

    /// Finds the extent that contains `offset`.
    ///
    /// # Errors
    /// `ENXIO` at and past the end; the file system's error. If the file system does not report holes, all is data.
    pub async fn seek_extent(&self, offset: u64) -> io::Result<Extent> {
        match &self.0 {
            Inner::Sim(disk) => disk.seek_extent(offset),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                let host = Arc::clone(host);
                on_file(move || seek_extent(host.fd.as_fd(), offset)).await
            }
        }
    }

    /// Finds the extent that contains `offset` and the extents that follow it, up to and including the extent of data with
    /// number `data_extents`, counted from 1.
    ///
    /// # Errors
    /// Those of [`File::seek_extent`] at `offset`. If a later extent cannot be found, the list ends before it.
    pub async fn seek_extents(&self, offset: u64, data_extents: usize) -> io::Result<Vec<Extent>> {
        match &self.0 {
            Inner::Sim(disk) => extents_with(offset, data_extents, |at| disk.seek_extent(at)),
            Inner::Closed => Err(bad_descriptor()),
            Inner::Host(host) => {
                let host = Arc::clone(host);
                let seek = move |at| seek_extent(host.fd.as_fd(), at);
                on_file(move || extents_with(offset, data_extents, seek)).await
            }
        }
    }

    /// Copies inside the kernel (`copy_file_range`); the copy may be short.
    ///
    /// # Errors
    /// `EXDEV`, `EOPNOTSUPP` or `EINVAL` if the kernel cannot copy between these files.
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

/// Each close of a descriptor makes the file system write back and report errors, also the close of a duplicate.
fn close_host(host: Arc<Host>) -> io::Result<()> {
    let fd = match Arc::try_unwrap(host) {
        Ok(Host { registration, fd, .. }) => {
            drop(registration);
            fd
        }
        Err(shared) => shared.fd.try_clone()?,
    };
    // SAFETY: no memory involved; the descriptor is ours, and Linux closes it whatever `close` returns.
    check(i64::from(unsafe { libc::close(fd.into_raw_fd()) })).map(drop)
}

fn join(front: Option<IoBufMut>, piece: IoBufMut) -> IoBufMut {
    match front {
        None => piece,
        Some(mut front) => match front.unsplit(piece) {
            Ok(()) => front,
            Err(_) => unreachable!("pieces of one buffer follow each other"),
        },
    }
}

fn at(offset: u64, done: usize) -> io::Result<u64> {
    offset.checked_add(done as u64).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
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

fn extents_with(
    offset: u64,
    data_extents: usize,
    seek: impl Fn(u64) -> io::Result<Extent>,
) -> io::Result<Vec<Extent>> {
    let mut last = seek(offset)?;
    let mut extents = vec![last];
    let mut data = usize::from(last.is_data);
    while data < data_extents {
        // An error may only mean that the file ends here.
        let Ok(next) = seek(last.end) else { break };
        data = data.saturating_add(usize::from(next.is_data));
        extents.push(next);
        last = next;
    }
    Ok(extents)
}

fn seek_extent(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Extent> {
    let at = signed(offset)?;
    // SAFETY: no memory involved. Nothing uses the descriptor's position.
    let seek = |at, whence| check(unsafe { libc::lseek(fd.as_raw_fd(), at, whence) });
    match seek(at, libc::SEEK_DATA) {
        Ok(data) if data > offset => Ok(Extent { is_data: false, end: data }),
        Ok(_) => match seek(at, libc::SEEK_HOLE) {
            Ok(hole) if hole > offset => Ok(Extent { is_data: true, end: hole }),
            // The range was punched between the two calls: a hole of unknown length. One sector is a safe lower
            // bound.
            Ok(_) => Ok(Extent { is_data: false, end: offset.saturating_add(1) }),
            Err(error) => Err(error),
        },
        // There is no data behind the offset, or the offset is not in the file.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => match seek(0, libc::SEEK_END)? {
            size if size > offset => Ok(Extent { is_data: false, end: size }),
            _ => Err(error),
        },
        // The file system does not know holes.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match seek(0, libc::SEEK_END)? {
                size if size > offset => Ok(Extent { is_data: true, end: size }),
                _ => Err(io::Error::from_raw_os_error(libc::ENXIO)),
            }
        }
        Err(error) => Err(error),
    }
}

macro_rules! transfer_future {
    ($(#[$doc:meta])* $name:ident, $output:ty, |$result:ident, $payload:ident| $map:expr) => {
        $(#[$doc])*
        #[must_use = "the operation has started; dropping this loses its result"]
        pub struct $name(Pending);

        impl Future for $name {
            type Output = $output;

            fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
                Pin::new(&mut self.0).poll(cx).map(|($result, $payload)| $map)
            }
        }
    };
}

transfer_future!(
    /// A read in flight; see [`File::read_at`].
    ReadAt,
    (io::Result<usize>, IoBufMut),
    |result, payload| match payload {
        Payload::Read(buf) => (count(result), buf),
        other => unreachable!("a read completed with {other:?}"),
    }
);
transfer_future!(
    /// A vectored read in flight; see [`File::read_vectored_at`].
    ReadvAt,
    (io::Result<usize>, IoVecMut),
    |result, payload| match payload {
        Payload::ReadV(bufs) => (count(result), bufs),
        other => unreachable!("a read completed with {other:?}"),
    }
);
transfer_future!(
    /// A write in flight; see [`File::write_at`].
    WriteAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
transfer_future!(
    /// A vectored write in flight; see [`File::write_vectored_at`].
    WritevAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
