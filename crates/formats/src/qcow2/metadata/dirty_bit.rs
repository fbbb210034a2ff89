//! The dirty bit of the header of an open image. A set bit says that refcounts on disk may be wrong, and causes a repair when
//! the image is next opened for writing.
//!
//! The bit is set and flushed before refcounts on disk become too low (lazy refcounts), and before a change of snapshots. The
//! bit is cleared when all refcounts are on disk, unless a change of snapshots is incomplete. A write that fails may still have
//! reached the disk. So the value of [`DirtyBit`] is unknown from the start of each write until the write and its flush have
//! succeeded. While the value is unknown, the bit is written again before the image relies on its value.

use std::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Release},
};

use oxblk_core::{Error, Result};

use super::Metadata;
use crate::qcow2::image_state::run_options::Modes;
use crate::qcow2::layout::Incompatible;

const CLEAR: u8 = 0;
const UNKNOWN: u8 = 1;
const SET: u8 = 2;

/// What is known about the dirty bit on disk. The bit is clear in an image that was just opened for writing, because a dirty
/// image is repaired first.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct DirtyBit(AtomicU8);

impl DirtyBit {
    fn is_set(&self) -> bool {
        self.0.load(Acquire) == SET
    }

    fn is_clear(&self) -> bool {
        self.0.load(Acquire) == CLEAR
    }

    fn set_unknown(&self) {
        self.0.store(UNKNOWN, Release);
    }

    /// The bit on disk was cleared by a repair.
    fn set_cleared(&self) {
        self.set_known(false);
    }

    fn set_known(&self, set: bool) {
        self.0.store(if set { SET } else { CLEAR }, Release);
    }
}

impl Metadata {
    /// Call this after a repair. The repair has cleared the dirty bit on disk, and has also corrected what a failed change of
    /// snapshots left inconsistent.
    pub(in crate::qcow2) fn note_repair(&self) {
        self.dirty_bit.set_cleared();
        self.clear_unfinished();
    }

    /// Sets the dirty bit and flushes it, unless it is known to be set.
    pub(super) async fn postpone_refcounts(&self) -> Result<()> {
        if self.dirty_bit.is_set() { Ok(()) } else { self.write_dirty_bit(true).await }
    }

    /// Writes and flushes all refcounts, then clears the dirty bit. The dirty bit stays set if a change of snapshots did not
    /// complete. Does nothing if the dirty bit is clear and refcounts are not lazy.
    pub(super) async fn write_postponed(&self) -> Result<()> {
        if self.dirty_bit.is_clear() && !self.image_state.modes().contains(Modes::LAZY) {
            return Ok(());
        }
        self.write_refcounts_durably().await?;
        if self.dirty_bit.is_clear() || self.is_unfinished() {
            return Ok(());
        }
        self.write_dirty_bit(false).await
    }

    /// Sets or clears the dirty bit and flushes it. Does nothing in version 2: version 2 has no dirty bit.
    pub(in crate::qcow2) async fn set_dirty(&self, dirty: bool) -> Result<()> {
        if self.image_state.version() < 3 {
            return Ok(());
        }
        if !dirty {
            // Postponed refcounts must be on disk before the image counts as clean.
            self.write_refcounts_durably().await?;
        }
        self.write_dirty_bit(dirty).await
    }

    async fn write_refcounts_durably(&self) -> Result<()> {
        self.clusters.write_back_refcounts().await?;
        self.image_state.file()?.flush().await
    }

    async fn write_dirty_bit(&self, dirty: bool) -> Result<()> {
        self.dirty_bit.set_unknown();
        self.image_state.set_incompatible(Incompatible::DIRTY, dirty).await?;
        self.dirty_bit.set_known(dirty);
        Ok(())
    }

    /// Turns lazy refcounts off and writes all refcounts.
    pub(in crate::qcow2) async fn stop_postponing(&self) -> Result<()> {
        self.image_state.remove_modes(Modes::LAZY);
        self.write_postponed().await
    }

    /// Refuses a downgrade to version 2 if a change of snapshots did not complete. Such an image needs a repair, and version 2
    /// has no dirty bit.
    pub(in crate::qcow2) fn check_needs_no_repair(&self) -> Result<()> {
        if self.is_unfinished() {
            return Err(Error::unsupported("Cannot downgrade an image that needs a repair"));
        }
        Ok(())
    }
}
