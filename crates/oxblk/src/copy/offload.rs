//! Copies that the host makes by itself ([`CopyOptions::offload`](super::CopyOptions)).
//!
//! Such a copy takes data as it is: nothing is searched for zeroes, so that a target has all clusters that hold data in
//! the source. The first data that the host cannot copy (compressed, encrypted, or on another file system) ends it, and
//! the rest of the disk is read, searched for zeroes, and written. Chunks are written in the order of the disk, so
//! that where this happens does not depend on the number of workers.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::{Backend, ChildIdx};

use super::Copy;
use super::plan::Chunk;

/// Whether the host is to copy.
#[derive(Debug)]
pub(super) struct Offload(AtomicBool);

impl Offload {
    /// As asked for, where all data lies on one file system and is stored there as it is.
    pub(super) fn new(copy: &Copy) -> Self {
        let possible = || {
            let target = file_system(&copy.target);
            target.is_some() && copy.sources.iter().all(|source| file_system(source) == target)
        };
        Self(AtomicBool::new(copy.options.offload && possible()))
    }

    /// Whether chunks are to be copied by the host at present.
    pub(super) fn is_on(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Whether a chunk is to be copied as it is. If not, so it is with all that follow.
    pub(super) fn takes(&self, chunk: &Chunk) -> bool {
        if !chunk.is_plain {
            self.0.store(false, Relaxed);
        }
        self.is_on()
    }
}

/// The device number of the file system that holds the data of an image; `None` if the data is not in a file, or encrypted.
fn file_system(backend: &Backend) -> Option<u64> {
    let mut node = backend.node().ok()?;
    if node.driver().info().is_encrypted {
        return None;
    }
    while let Some(child) = node.child(ChildIdx::DATA).or_else(|| node.child(ChildIdx::FILE)) {
        node = child;
    }
    let file = node.driver().host_file()?;
    let file = std::fs::File::from(file.as_fd()?.try_clone_to_owned().ok()?);
    Some(file.metadata().ok()?.dev())
}
