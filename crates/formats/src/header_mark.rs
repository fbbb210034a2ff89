//! The header's mark of an image that is open for writing.
//!
//! A metadata entry is written only while the header on disk certainly has the mark. When the image is closed, the mark is
//! removed if the header may have it. A write to the header that fails may have reached the disk or not.

use std::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Release},
};

const ABSENT: u8 = 0;
const PRESENT: u8 = 1;
const UNKNOWN: u8 = 2;

/// What is known about the mark in the header on disk.
#[derive(Debug)]
pub(crate) struct Mark(AtomicU8);

impl Mark {
    pub(crate) fn new(is_present: bool) -> Self {
        Self(AtomicU8::new(if is_present { PRESENT } else { ABSENT }))
    }

    /// Whether the header certainly has the mark.
    pub(crate) fn is_certain(&self) -> bool {
        self.0.load(Acquire) == PRESENT
    }

    /// Whether the header may have the mark.
    pub(crate) fn is_possible(&self) -> bool {
        self.0.load(Acquire) != ABSENT
    }

    /// Records that the mark is being written or removed.
    pub(crate) fn begin_change(&self) {
        self.0.store(UNKNOWN, Release);
    }

    /// Records that the header has the mark.
    pub(crate) fn note_present(&self) {
        self.0.store(PRESENT, Release);
    }

    /// Records that the header does not have the mark, durably.
    pub(crate) fn note_absent(&self) {
        self.0.store(ABSENT, Release);
    }
}
