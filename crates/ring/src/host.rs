//! System calls of the host that have no safe wrapper elsewhere: locks of open file descriptions, ioctls of block
//! devices and file systems, limits of the process, and a limit of the allocator. These calls accept any descriptor and
//! need no I/O thread. All of them return quickly, except [`discard_blocks`]: I/O threads call it through
//! [`File::call`](crate::File::call).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Limits the allocator of the C library to a few arenas. Each arena reserves 64 MiB of address space, which is too
/// much for a process with many threads and a limit on its address space. Only a program should call this function,
/// not a library, because it affects the whole process.
pub fn limit_allocator_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a numeric parameter of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// The number of arenas, including the main arena (the heap of the process), which reserves no address space in
/// advance.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 3;

/// A range of bytes to lock. The range may lie after the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    /// First byte.
    pub start: u32,
    /// Number of bytes.
    pub len: u32,
}

impl LockRange {
    /// The range that contains only the byte `start`.
    pub fn byte(start: u32) -> Self {
        Self { start, len: 1 }
    }

    fn request(self, kind: libc::c_int) -> libc::flock {
        libc::flock {
            // The constants are 0, 1 and 2 on every platform, so they fit.
            l_type: i16::try_from(kind).unwrap_or_default(),
            l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
            l_start: libc::off_t::from(self.start),
            l_len: libc::off_t::from(self.len),
            l_pid: 0,
        }
    }
}

/// Takes a shared lock for the open file description behind `fd`. `fd` must be open for reading.
///
/// # Errors
/// `EAGAIN` if an exclusive lock conflicts; otherwise the errors of `fcntl(2)` with `F_OFD_SETLK`.
pub fn lock_shared(fd: BorrowedFd<'_>, range: LockRange) -> io::Result<()> {
    set_lock(fd, range.request(libc::F_RDLCK))
}

/// Releases the lock of the open file description on `range`.
///
/// # Errors
/// The errors of `fcntl(2)` with `F_OFD_SETLK`.
pub fn unlock(fd: BorrowedFd<'_>, range: LockRange) -> io::Result<()> {
    set_lock(fd, range.request(libc::F_UNLCK))
}

fn set_lock(fd: BorrowedFd<'_>, request: libc::flock) -> io::Result<()> {
    // SAFETY: F_OFD_SETLK reads one `flock`, which lives until the call returns; `fd` is open.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    check(done)
}

/// Whether there is any lock in `range` that the open file description behind `fd` does not hold.
///
/// # Errors
/// The errors of `fcntl(2)` with `F_OFD_GETLK`: `EINVAL` if the kernel or the file system does not support such
/// locks.
pub fn is_locked_elsewhere(fd: BorrowedFd<'_>, range: LockRange) -> io::Result<bool> {
    let mut request = range.request(libc::F_WRLCK);
    // SAFETY: F_OFD_GETLK reads and writes one `flock`, which lives until the call returns; `fd` is open.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) })?;
    Ok(libc::c_int::from(request.l_type) != libc::F_UNLCK)
}

/// Raises the limit on open files to its maximum (the hard limit of `RLIMIT_NOFILE`). A backing chain of a thousand
/// images needs more than the usual soft limit.
///
/// # Errors
/// The errors of `setrlimit(2)`. The limit is then unchanged.
pub fn raise_open_files_limit() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// The size limit of the main thread's stack in bytes (the soft limit of `RLIMIT_STACK`); `None` if there is no
/// limit.
pub fn main_stack_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Stack).current
}

/// Discards a range of a block device (`BLKDISCARD`). The call may take a long time.
///
/// # Errors
/// The device's error: `EOPNOTSUPP` if it does not support discard.
pub fn discard_blocks(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two `u64` from its argument, an array of two that lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Asks the file system to allocate a new file in extents of `bytes` bytes (`FS_IOC_FSSETXATTR`).
///
/// # Errors
/// The file system's error: most file systems do not support this hint.
pub fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    /// `struct fsxattr` of the kernel's interface.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        flags: u32,
        extent_size: u32,
        extents: u32,
        project: u32,
        cow_extent_size: u32,
        padding: [u8; 8],
    }
    const _: () = assert!(size_of::<Attributes>() == 28);
    const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
    const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
    const EXTENT_SIZE: u32 = 0x800;
    let mut attributes = Attributes::default();
    // SAFETY: the request writes one `struct fsxattr`, whose size is part of the request number; `attributes` is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) })?;
    attributes.flags |= EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the request reads one `struct fsxattr`, whose size is part of the request number; `attributes` is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_shared_lock_is_seen_by_other_descriptions_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mine = std::fs::File::create_new(&path).unwrap();
        let mine = (std::fs::File::open(&path).unwrap(), mine).0;
        let other = std::fs::File::open(&path).unwrap();
        lock_shared(mine.as_fd(), LockRange::byte(101)).unwrap();
        assert!(!is_locked_elsewhere(mine.as_fd(), LockRange::byte(101)).unwrap());
        assert!(is_locked_elsewhere(other.as_fd(), LockRange { start: 100, len: 4 }).unwrap());
        lock_shared(other.as_fd(), LockRange::byte(101)).unwrap();
        unlock(mine.as_fd(), LockRange::byte(101)).unwrap();
        assert!(!is_locked_elsewhere(other.as_fd(), LockRange { start: 0, len: 300 }).unwrap());
        assert!(is_locked_elsewhere(mine.as_fd(), LockRange::byte(101)).unwrap());
    }

    #[test]
    fn a_regular_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        assert!(discard_blocks(file.as_fd(), 0, 512).is_err());
    }
}
