//! Where a node that is being opened stands in its chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

/// Longest chain: more is meant to exhaust us.
const MAX_DEPTH: u32 = 200;

/// The images above a node that is being opened.
#[derive(Clone, Default)]
pub(super) struct Above {
    depth: u32,
    files: Option<Arc<Link>>,
}

struct Link {
    path: PathBuf,
    above: Option<Arc<Link>>,
}

impl Drop for Link {
    /// Without recursion, however long the chain is.
    fn drop(&mut self) {
        let mut next = self.above.take();
        while let Some(link) = next.and_then(Arc::into_inner) {
            next = { link }.above.take();
        }
    }
}

impl Above {
    /// The same, a level further down.
    pub(super) fn deeper(&self) -> Self {
        Self { depth: self.depth.saturating_add(1), files: self.files.clone() }
    }

    /// The same below an image of this file name.
    pub(super) fn below(&self, filename: Option<&str>) -> Self {
        let mut deeper = self.deeper();
        if let Some(path) = filename.and_then(real_path) {
            deeper.files = Some(Arc::new(Link { path, above: deeper.files.take() }));
        }
        deeper
    }

    /// Refuses a chain that is too long.
    ///
    /// # Errors
    /// Says so.
    pub(super) fn check_depth(&self) -> Result<()> {
        if self.depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BackingChain, "The backing chain is too long"));
        }
        Ok(())
    }

    /// Refuses a backing file that is one of the images above it.
    ///
    /// # Errors
    /// Names it.
    pub(super) fn check_loop(&self, filename: &str) -> Result<()> {
        let Some(path) = real_path(filename) else { return Ok(()) };
        let mut next = self.files.as_deref();
        while let Some(link) = next {
            if link.path == path {
                let message = format!("Backing file '{filename}' creates an infinite loop.");
                return Err(Error::new(ErrorKind::BackingChain, message));
            }
            next = link.above.as_deref();
        }
        Ok(())
    }
}

/// The path of a file that is there.
fn real_path(filename: &str) -> Option<PathBuf> {
    Path::new(filename.strip_prefix("file:").unwrap_or(filename)).canonicalize().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_above_is_found_by_any_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("a"), "").unwrap();
        std::fs::write(path("b"), "").unwrap();
        std::os::unix::fs::symlink("a", path("link")).unwrap();
        let above = Above::default().below(Some(&path("a"))).below(None);
        for name in [path("a"), path("./a"), path("link"), format!("file:{}", path("a"))] {
            assert!(above.check_loop(&name).is_err(), "{name}");
        }
        for name in [path("b"), path("absent"), "nbd://h/".to_owned()] {
            assert!(above.check_loop(&name).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_chain_has_an_end() {
        let mut above = Above::default();
        for _ in 0..MAX_DEPTH {
            above = above.below(Some("/"));
        }
        assert!(above.check_depth().is_ok());
        assert!(above.deeper().check_depth().is_err());
    }
}
