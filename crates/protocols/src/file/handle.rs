//! An open host descriptor and its properties.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use oxblk_core::{Error, Result, names, strerror};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Block,
    Character,
    /// Not a host file: a simulated disk, or a file provided by the embedder.
    Given,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) read_only: bool,
    pub(super) direct: bool,
    /// Whether the path must not contain a symbolic link.
    pub(super) no_symlinks: bool,
}

/// A newly opened host descriptor.
pub(super) struct Handle {
    pub(super) fd: OwnedFd,
    pub(super) kind: Kind,
}

/// Opens an existing file. The file is opened non-blocking, because opening a pipe or a terminal must not block. When
/// the type of the file is known, the descriptor is made blocking. Otherwise io_uring would return `EAGAIN` instead
/// of waiting.
pub(super) fn open(path: &str, access: Access) -> Result<Handle, Errno> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    flags |= if access.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    flags.set(OFlags::DIRECT, access.direct);
    let fd = match access.no_symlinks {
        false => rustix::fs::open(&*names::to_path(path), flags, Mode::empty())?,
        true => open_without_links(path, flags)?,
    };
    let kind = kind_of(fd.as_fd())?;
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
    match kind {
        // The kernel allows some read-only devices to be opened for writing and then fails the writes.
        Some(Kind::Block) if !access.read_only && is_read_only(fd.as_fd())? => Err(Errno::ACCESS),
        Some(kind) => Ok(Handle { fd, kind }),
        None => Err(Errno::NOTSUP),
    }
}

/// Opens a path that must not contain a symbolic link. If the kernel does not support this check, compares the path
/// of the open file with the requested path.
fn open_without_links(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = names::to_path(path);
    match rustix::fs::openat2(CWD, &*path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Err(Errno::NOSYS | Errno::PERM) => {}
        opened => return opened,
    }
    let fd = rustix::fs::open(&*path, flags | OFlags::NOFOLLOW, Mode::empty())?;
    let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match real {
        Ok(real) if real == *path => Ok(fd),
        _ => Err(Errno::LOOP),
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

/// The error for a file that cannot be opened, with the message of QEMU's tools.
pub(super) fn open_error(path: &str, errno: Errno, direct: bool) -> Error {
    let code = errno.raw_os_error();
    if matches!(errno, Errno::MFILE | Errno::NFILE) {
        // The limit on open files is the cause, not the file.
        return Error::from_errno(code);
    }
    if direct && errno == Errno::INVAL {
        return Error::from_errno(code)
            .reword(format!("Could not open '{path}': filesystem does not support O_DIRECT"))
            .with_hint("Try cache.direct=off");
    }
    Error::from_errno(code).reword(format!("Could not open '{path}': {}", strerror(code)))
}

/// The sector size of a block device in bytes; `None` if the descriptor is not a block device.
pub(super) fn sector_size(fd: BorrowedFd<'_>) -> Option<u32> {
    rustix::fs::ioctl_blksszget(fd).ok().filter(|size| size.is_power_of_two())
}

fn is_read_only(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    match std::fs::read_to_string(format!("{}/ro", sysfs(fd)?)) {
        Ok(text) => Ok(text.trim() == "1"),
        // Without sysfs, writes report that the device is read-only.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

fn sysfs(fd: BorrowedFd<'_>) -> Result<String, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    Ok(format!("/sys/dev/block/{major}:{minor}"))
}

/// A number from the queue directory of a block device in sysfs; for a partition, from the queue directory of its
/// disk.
pub(super) fn queue_value(fd: BorrowedFd<'_>, name: &str) -> Option<u64> {
    let device = sysfs(fd).ok()?;
    let paths = [format!("{device}/queue/{name}"), format!("{device}/../queue/{name}")];
    let text = paths.iter().find_map(|path| std::fs::read_to_string(path).ok())?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_anywhere_on_the_path_is_refused_if_forbidden() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("dir")).unwrap();
        std::fs::write(root.join("dir/file"), "x").unwrap();
        std::os::unix::fs::symlink("dir", root.join("link")).unwrap();
        std::os::unix::fs::symlink("file", root.join("dir/link")).unwrap();
        let access = |no_symlinks| Access { read_only: true, direct: false, no_symlinks };
        for (name, expected) in
            [("dir/file", None), ("dir/link", Some(Errno::LOOP)), ("link/file", Some(Errno::LOOP))]
        {
            let path = root.join(name);
            assert_eq!(open(path.to_str().unwrap(), access(true)).err(), expected, "{name}");
            assert!(open(path.to_str().unwrap(), access(false)).is_ok(), "{name}");
        }
    }
}
