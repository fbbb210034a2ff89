//! An open descriptor of the host and what is known of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use oxblk_core::{Error, Result, names, strerror};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// What sort of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Block,
    Character,
    /// Not a file of the host: a simulated disk, or one handed in by the embedder.
    Given,
}

/// How to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) read_only: bool,
    pub(super) direct: bool,
}

/// A descriptor fresh from the host.
pub(super) struct Handle {
    pub(super) fd: OwnedFd,
    pub(super) kind: Kind,
}

/// Opens an existing file. A pipe or a terminal must not make us wait, so it is opened without blocking
/// and made blocking again (io_uring would give up where it should wait) once its kind is known.
pub(super) fn open(path: &str, access: Access) -> Result<Handle, Errno> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    flags |= if access.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    flags.set(OFlags::DIRECT, access.direct);
    let fd = rustix::fs::open(&*names::to_path(path), flags, Mode::empty())?;
    let kind = kind_of(fd.as_fd())?;
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
    match kind {
        // The kernel lets some read-only devices be opened for writing and fails the writes.
        Some(Kind::Block) if !access.read_only && is_read_only(fd.as_fd()) => Err(Errno::ACCESS),
        Some(kind) => Ok(Handle { fd, kind }),
        None => Err(Errno::NOTSUP),
    }
}

fn kind_of(fd: BorrowedFd<'_>) -> Result<Option<Kind>, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(Kind::Regular),
        FileType::BlockDevice => Some(Kind::Block),
        FileType::CharacterDevice => Some(Kind::Character),
        _ => None,
    })
}

/// What the tools say when a file cannot be opened.
pub(super) fn open_error(path: &str, errno: Errno, direct: bool) -> Error {
    let code = errno.raw_os_error();
    if direct && errno == Errno::INVAL {
        return Error::from_errno(code)
            .reword(format!("Could not open '{path}': filesystem does not support O_DIRECT"))
            .with_hint("Try cache.direct=off");
    }
    Error::from_errno(code).reword(format!("Could not open '{path}': {}", strerror(code)))
}

/// The sectors of a block device, in bytes.
pub(super) fn sector_size(fd: BorrowedFd<'_>) -> Option<u32> {
    rustix::fs::ioctl_blksszget(fd).ok().filter(|size| size.is_power_of_two())
}

fn is_read_only(fd: BorrowedFd<'_>) -> bool {
    let flag = sysfs(fd).and_then(|device| std::fs::read_to_string(format!("{device}/ro")).ok());
    flag.is_some_and(|text| text.trim() == "1")
}

fn sysfs(fd: BorrowedFd<'_>) -> Option<String> {
    let stat = rustix::fs::fstat(fd).ok()?;
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    Some(format!("/sys/dev/block/{major}:{minor}"))
}

/// A number from a block device's queue directory in sysfs; partitions ask their disk.
pub(super) fn queue_value(fd: BorrowedFd<'_>, name: &str) -> Option<u64> {
    let device = sysfs(fd)?;
    let paths = [format!("{device}/queue/{name}"), format!("{device}/../queue/{name}")];
    let text = paths.iter().find_map(|path| std::fs::read_to_string(path).ok())?;
    text.trim().parse().ok()
}
