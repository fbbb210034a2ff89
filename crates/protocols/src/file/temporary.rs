//! Temporary files without a name, so that no other process can open or replace such a file by name, and no file
//! remains after a crash. If the file system does not support `O_TMPFILE`, the file is created with a name and unlinked
//! immediately.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oxblk_core::{Error, Result, strerror};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

const ATTEMPTS: u32 = 64;

/// Creates an empty file for reading and writing in `$TMPDIR`. If `TMPDIR` is not set, the file is in `/var/tmp`, because
/// this directory is intended for large files.
///
/// # Errors
/// The file system's error.
pub fn temporary() -> Result<OwnedFd> {
    let dir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
    let dir = dir.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    temporary_in(&dir).map_err(|errno| {
        let code = errno.raw_os_error();
        let text = format!("Could not open temporary file '{}': {}", dir.display(), strerror(code));
        Error::from_errno(code).reword(text)
    })
}

fn temporary_in(dir: &Path) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        opened => return opened,
    }
    for attempt in 0..ATTEMPTS {
        let path = dir.join(format!(".oxblk-{}-{:x}", std::process::id(), random(attempt)));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
            Ok(fd) => {
                rustix::fs::unlink(&path)?;
                return Ok(fd);
            }
        }
    }
    Err(Errno::EXIST)
}

/// A number for the file name. The number is probably different in each attempt. If a file of the same name exists,
/// `O_EXCL` makes the attempt fail.
fn random(attempt: u32) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one((attempt, io::stdin as fn() -> io::Stdin as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_file_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let fd = temporary_in(dir.path()).unwrap();
        assert_eq!(rustix::io::write(&fd, b"x").unwrap(), 1);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(temporary_in(Path::new("/nonexistent")).unwrap_err(), Errno::NOENT);
    }
}
