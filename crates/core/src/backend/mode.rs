//! What a backend does in addition to passing requests on. Each request reads this with one load.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

bitflags::bitflags! {
    /// See [`ModeCell`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct Mode: u8 {
        /// Every write is on stable storage when it completes.
        const WRITE_THROUGH = 1;
        /// Requests are counted ([`accounting`](super::accounting)).
        const ACCOUNTED = 2;
        /// A device is attached, so errors are handled by its policies ([`device`](super::device)).
        const DEVICE = 4;
    }
}

/// The mode of a backend.
#[derive(Debug, Default)]
pub(super) struct ModeCell(AtomicU8);

impl ModeCell {
    pub(super) fn get(&self) -> Mode {
        Mode::from_bits_truncate(self.0.load(Relaxed))
    }

    pub(super) fn set(&self, flag: Mode, on: bool) {
        if on {
            self.0.fetch_or(flag.bits(), Relaxed);
        } else {
            self.0.fetch_and(!flag.bits(), Relaxed);
        }
    }
}
