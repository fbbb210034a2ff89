//! The identity of a new file. The identity is checked before the file is removed.
//!
//! A name is not enough to remove an incomplete image, because another program may have replaced the file with
//! another file of the same name. A descriptor identifies the file itself: while the descriptor is open, no other
//! file gets the same inode number. The descriptor gives no access to the data (`O_PATH`) and has no effect on the
//! locks of the file. If another program replaces the file between the check and `unlink`, its file is removed.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use oxblk_core::create::{CreatedFile, Removal};
use oxblk_core::{Error, Result, names};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// A new regular file.
struct Created {
    fd: OwnedFd,
    path: PathBuf,
}

/// Opens a descriptor that identifies the new file at `path`. Returns `None` if the file is not a regular file, because
/// devices are never removed.
pub(super) fn hold(path: &str) -> Result<Option<Box<dyn CreatedFile>>> {
    let failed = |error: Error| error.prefix(format!("Could not open the new file '{path}'"));
    // If `path` is a symbolic link, the new file is the target of the link.
    let real = std::fs::canonicalize(&*names::to_path(path)).map_err(|e| failed(e.into()))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&real, flags, Mode::empty()).map_err(|e| failed(error(e)))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed(error(e)))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    Ok(Some(Box::new(Created { fd, path: real })))
}

fn error(errno: Errno) -> Error {
    Error::from_errno(errno.raw_os_error())
}

impl CreatedFile for Created {
    fn remove(&self) -> Result<Removal> {
        let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
        let own = rustix::fs::fstat(self.fd.as_fd()).map(identity).map_err(error)?;
        match rustix::fs::lstat(&self.path).map(identity) {
            Ok(named) if named == own => {}
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Removal::Replaced),
            Err(errno) => return Err(error(errno)),
        }
        match rustix::fs::unlink(&self.path) {
            Ok(()) => Ok(Removal::Removed),
            Err(Errno::NOENT) => Ok(Removal::Replaced),
            Err(errno) => Err(error(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removal(change: impl FnOnce(&std::path::Path)) -> (Removal, Option<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"new").unwrap();
        let created = hold(path.to_str().unwrap()).unwrap().unwrap();
        change(&path);
        (created.remove().unwrap(), std::fs::read(&path).ok())
    }

    #[test]
    fn a_created_file_is_removed() {
        assert_eq!(removal(|_| ()), (Removal::Removed, None));
    }

    #[test]
    fn a_file_that_has_replaced_the_created_one_is_kept() {
        let kept = (Removal::Replaced, Some(b"other".to_vec()));
        let replaced = removal(|path| {
            // The host must not give the inode number of the removed file to the other file.
            std::fs::remove_file(path).unwrap();
            std::fs::write(path, b"other").unwrap();
        });
        assert_eq!(replaced, kept);
        let renamed = removal(|path| {
            std::fs::write(path.with_extension("new"), b"other").unwrap();
            std::fs::rename(path.with_extension("new"), path).unwrap();
        });
        assert_eq!(renamed, kept);
        let linked = removal(|path| {
            std::fs::rename(path, path.with_extension("old")).unwrap();
            std::fs::write(path.with_extension("other"), b"other").unwrap();
            std::os::unix::fs::symlink(path.with_extension("other"), path).unwrap();
        });
        assert_eq!(linked, kept);
        assert_eq!(removal(|path| std::fs::remove_file(path).unwrap()), (Removal::Replaced, None));
    }

    #[test]
    fn the_file_behind_a_symbolic_link_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        std::fs::write(&file, b"new").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let created = hold(link.to_str().unwrap()).unwrap().unwrap();
        assert_eq!(created.remove().unwrap(), Removal::Removed);
        assert!(!file.exists());
        assert!(link.is_symlink());
    }

    #[test]
    fn a_device_is_never_removed() {
        assert!(hold("/dev/null").unwrap().is_none());
    }
}
