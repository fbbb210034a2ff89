//! Handling of inconsistent metadata: reporting it, and marking the image corrupt.

use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{Error, ErrorKind, Result};

use super::ImageState;
use crate::qcow2::layout::Incompatible;

impl ImageState {
    /// Handles inconsistent metadata. The first call (also the first call after [`Self::log_next_corruption`]) logs an error.
    /// If the image is writable, this call also stops all later requests, and marks the image corrupt (in version 3). Later
    /// calls only return the error. Returns the error for the request that found the corruption.
    pub(in crate::qcow2) async fn mark_corrupt(&self, text: &str, offset: u64) -> Error {
        let error = Error::corrupt(text.to_owned()).at(offset);
        if self.corruption_logged.swap(true, Relaxed) {
            return error;
        }
        if self.is_read_only() {
            tracing::error!(
                "qcow2: Image is corrupt: {text}; further non-fatal corruption events will be suppressed"
            );
            return error;
        }
        self.disable();
        tracing::error!(
            "qcow2: Marking image as corrupt: {text}; further corruption events will be suppressed"
        );
        if self.version >= 3
            && let Err(failed) = self.set_incompatible(Incompatible::CORRUPT, true).await
        {
            tracing::error!("qcow2: the image could not be marked corrupt: {failed}");
        }
        error
    }

    /// Calls [`Self::mark_corrupt`] if `outcome` is a `Corrupt` error.
    pub(in crate::qcow2) async fn mark_if_corrupt<T>(
        &self,
        outcome: Result<T>,
        offset: u64,
    ) -> Result<T> {
        match outcome {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                Err(self.mark_corrupt(&error.to_string(), offset).await)
            }
            outcome => outcome,
        }
    }
}
