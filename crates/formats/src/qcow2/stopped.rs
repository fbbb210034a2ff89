//! Why an open image accepts no further requests.
//!
//! The flag [`Qcow2::corrupt`] stops all requests. This file makes the error that such requests get: it says why the image has
//! stopped, and what the user can do. The errno is `EIO`, as in QEMU.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Relaxed, Release};

use oxblk_core::{Errno, Error};

use super::Qcow2;

/// A control operation that has replaced metadata on disk, so that the metadata in memory is outdated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replaced {
    Repair,
    Amend,
}

/// The control operation, if there was one, that has made the metadata in memory outdated.
#[derive(Debug, Default)]
pub(super) struct ReplacedBy(OnceLock<Replaced>);

impl Qcow2 {
    /// Stops all requests, because `cause` replaces metadata on disk.
    pub(super) fn stop_for(&self, cause: Replaced) {
        let _ = self.replaced.0.set(cause);
        self.corrupt.store(true, Release);
    }

    /// The error of all requests of an image that has stopped.
    pub(super) fn stopped(&self) -> Error {
        let text = match self.replaced.0.get() {
            Some(Replaced::Repair) => {
                "A repair may have changed metadata of the open image: it must be closed and opened again before it is used"
            }
            Some(Replaced::Amend) => {
                "The format of the image was changed while it was open: it must be closed and opened again before it is used"
            }
            None if self.signalled.load(Relaxed) => {
                "The image is corrupt and accepts no further requests: it must be closed and repaired with 'check -r all'"
            }
            None => {
                "The image accepts no further requests, because the state of its metadata on disk is unknown after an error: \
                 it must be closed, checked and opened again"
            }
        };
        Error::from_errno(Errno::IO).reword(text)
    }
}
