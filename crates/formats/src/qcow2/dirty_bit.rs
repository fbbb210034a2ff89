//! The dirty bit of the header of an open image. A set bit says that refcounts on disk may be wrong, and causes a repair when
//! the image is opened next.
//!
//! The bit is set durably before refcounts on disk become too low (lazy refcounts), and during a change of snapshots. It is
//! cleared when all refcounts are on disk. A write that fails may have reached the disk nevertheless. So [`DirtyBit`] forgets
//! the value before each write, and knows it again only after the write and its flush have succeeded. While the value is
//! unknown, the bit is written again before anything relies on it.

use std::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Release},
};

use oxblk_core::{ChildIdx, Result};

use super::Qcow2;
use super::layout::Incompatible;
use super::run_options::Modes;

const CLEAR: u8 = 0;
const UNKNOWN: u8 = 1;
const SET: u8 = 2;

/// The value of the dirty bit on disk, as far as it is known. Clear in an image that was just opened for writing.
#[derive(Debug, Default)]
pub(super) struct DirtyBit(AtomicU8);

impl DirtyBit {
    fn is_set(&self) -> bool {
        self.0.load(Acquire) == SET
    }

    fn is_clear(&self) -> bool {
        self.0.load(Acquire) == CLEAR
    }

    fn forget(&self) {
        self.0.store(UNKNOWN, Release);
    }

    /// The bit on disk was cleared by a repair.
    pub(super) fn was_cleared(&self) {
        self.learn(false);
    }

    fn learn(&self, set: bool) {
        self.0.store(if set { SET } else { CLEAR }, Release);
    }
}

impl Qcow2 {
    /// Sets the dirty bit, durably, unless it is known to be set.
    pub(super) async fn postpone_refcounts(&self) -> Result<()> {
        if self.dirty_bit.is_set() { Ok(()) } else { self.write_dirty_bit(true).await }
    }

    /// Writes all refcounts durably, then clears the dirty bit. The dirty bit stays set if a change of snapshots did not
    /// complete.
    pub(super) async fn write_postponed(&self) -> Result<()> {
        if self.dirty_bit.is_clear() && !self.modes().contains(Modes::LAZY) {
            return Ok(());
        }
        self.write_refcounts_durably().await?;
        if self.dirty_bit.is_clear() || self.unfinished.load(Acquire) {
            return Ok(());
        }
        self.write_dirty_bit(false).await
    }

    /// Sets or clears the dirty bit, durably. Version 2 has no such bit.
    pub(super) async fn set_dirty(&self, dirty: bool) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        if !dirty {
            // Postponed refcounts must be on disk before the image counts as clean.
            self.write_refcounts_durably().await?;
        }
        self.write_dirty_bit(dirty).await
    }

    async fn write_refcounts_durably(&self) -> Result<()> {
        self.write_back_refcounts().await?;
        self.children.require(ChildIdx::FILE)?.flush().await
    }

    async fn write_dirty_bit(&self, dirty: bool) -> Result<()> {
        self.dirty_bit.forget();
        self.set_incompatible(Incompatible::DIRTY, dirty).await?;
        self.dirty_bit.learn(dirty);
        Ok(())
    }
}
