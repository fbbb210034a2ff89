//! The mark in the header of an image whose metadata may be changing: `in_use` of parallels, "need check" of qed.
//!
//! The mark is set before the first metadata write: a metadata entry is written only while the header on disk certainly has
//! the mark. When an image that needs no repair is closed, the mark is removed, unless the header certainly has no mark.
//! After a failed write to the header, it is unknown whether the header has the mark.

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

    /// Records that the header without the mark was written and flushed.
    pub(crate) fn note_absent(&self) {
        self.0.store(ABSENT, Release);
    }
}
