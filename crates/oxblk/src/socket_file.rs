//! [`SocketFile`]: the file of a listening Unix socket.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The file of a listening Unix socket. If this value is dropped, the file is removed, unless another program has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode number.
    identity: (u64, u64),
}

impl SocketFile {
    /// The file at `path`, on which the caller listens; `None` if the file has already been removed.
    pub fn new(path: &Path) -> Option<Self> {
        // After a change of the working directory, a relative path would refer to another file.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Some(Self { identity: identity(&path)?, path })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), "cannot remove a socket: {error}");
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_file_that_was_replaced_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        drop(SocketFile::new(&path).unwrap());
        assert!(!path.exists());
        assert!(SocketFile::new(&path).is_none());
        drop(listener);

        let first = UnixListener::bind(&path).unwrap();
        let file = SocketFile::new(&path).unwrap();
        // The other file exists while the first one does, so they have different inode numbers.
        let other = folder.path().join("other");
        let second = UnixListener::bind(&other).unwrap();
        std::fs::rename(&other, &path).unwrap();
        drop(file);
        assert!(path.exists());
        drop((first, second));
    }
}
