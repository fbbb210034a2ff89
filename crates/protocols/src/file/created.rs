//! The identity of a file that was created, for its removal.
//!
//! A name is not enough to remove an incomplete image: another program may have put another file in its place meanwhile. A
//! descriptor identifies the file itself. While the descriptor is open, the host cannot give the file's inode number to
//! another file. The descriptor has no access to the data, and it has no effect on the locks of the file.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use oxblk_core::create::{CreatedFile, Removal};
use oxblk_core::{Error, Result, names};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// A regular file that was created.
struct Created {
    fd: OwnedFd,
    path: PathBuf,
}

/// Opens a descriptor that identifies the new file at `path`. `None`: it is a device, which is not removed.
pub(super) fn hold(path: &str) -> Result<Option<Box<dyn CreatedFile>>> {
    let failed = |error: Error| error.prefix(format!("Could not open the new file '{path}'"));
    // The file, not a symbolic link to it, is what was created.
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
            // The inode number of the removed file must not be used again for the other file.
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
