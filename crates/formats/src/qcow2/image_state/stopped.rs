//! Whether an open image accepts requests, and why not.
//!
//! The flag `ImageState::disabled` stops requests. This file makes the error of a stopped request. The error says why the image
//! accepts no requests, and what the user can do. The errno is `EIO`.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{Errno, Error, ErrorKind, Result};

use super::ImageState;

/// A control operation that replaces metadata on disk, so that the metadata in memory is outdated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Replaced {
    Repair,
    Amend,
}

/// The control operation, if there was one, that has made the metadata in memory outdated.
#[derive(Debug, Default)]
pub(super) struct ReplacedBy(OnceLock<Replaced>);

impl ImageState {
    /// Stops all requests, because `cause` replaces metadata on disk.
    pub(in crate::qcow2) fn stop_requests(&self, cause: Replaced) {
        let _ = self.replaced.0.set(cause);
        self.disable();
    }

    /// The error of a request to an image that accepts no requests.
    fn stopped_error(&self) -> Error {
        let text = match self.replaced.0.get() {
            Some(Replaced::Repair) => {
                "A repair may have changed metadata of the open image: it must be closed and opened again before it is used"
            }
            Some(Replaced::Amend) => {
                "The format of the image was changed while it was open: it must be closed and opened again before it is used"
            }
            None if self.corruption_logged.load(Relaxed) => {
                "The image is corrupt and accepts no further requests: it must be closed and repaired with 'check -r all'"
            }
            None => {
                "The image accepts no further requests, because the state of its metadata on disk is unknown after an error: \
                 it must be closed, checked and opened again"
            }
        };
        Error::from_errno(Errno::IO).reword(text)
    }

    /// Refuses a request if the image accepts no requests.
    pub(in crate::qcow2) fn check_usable(&self) -> Result<()> {
        if !self.is_usable() {
            return Err(self.stopped_error());
        }
        Ok(())
    }

    /// Refuses a write if the image is read-only or accepts no requests.
    pub(in crate::qcow2) fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        self.check_usable()
    }
}
