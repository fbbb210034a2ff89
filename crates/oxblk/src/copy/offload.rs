//! Copy offload: the host copies data from file to file, and this process does not read it
//! ([`CopyOptions::offload`](super::CopyOptions)).
//!
//! Offloaded data is not searched for zeroes, so zeroes that the source stores as data are stored as data in the
//! target. At the first chunk whose data is compressed or encrypted, offload is switched off. That chunk and all later
//! chunks are read, searched for zeroes, and written. With ordered writes, the offset at which offload is switched off
//! does not depend on the number of workers.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::{Backend, ChildIdx};

use super::Copy;
use super::plan::Chunk;

/// Whether copy offload is used for the next chunks.
#[derive(Debug)]
pub(super) struct Offload(AtomicBool);

impl Offload {
    /// Switches offload on if the caller has requested it, and if the sources and the target store unencrypted data on
    /// one file system.
    pub(super) fn new(copy: &Copy) -> Self {
        let possible = || {
            let target = file_system(&copy.target);
            target.is_some() && copy.sources.iter().all(|source| file_system(source) == target)
        };
        Self(AtomicBool::new(copy.options.offload && possible()))
    }

    /// Whether offload is on.
    pub(super) fn is_on(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Whether a chunk can be offloaded. If not, offload is also switched off for all later chunks.
    pub(super) fn takes(&self, chunk: &Chunk) -> bool {
        if !chunk.is_plain {
            self.0.store(false, Relaxed);
        }
        self.is_on()
    }
}

/// The device number of the file system that contains the data of an image. `None`: the data is not in a host file, or it
/// is encrypted.
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
