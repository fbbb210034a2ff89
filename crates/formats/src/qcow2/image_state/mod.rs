//! The state of an open image that all its parts (`Clusters`, `Mapping`, `Metadata` and others) use: geometry, children,
//! header, runtime options, size, and whether the image accepts requests.
//!
//! | file | concern |
//! |---|---|
//! | `run_options` | runtime options of an open image |
//! | `stopped` | whether an open image accepts requests, and why not |
//! | `data_file` | which child contains the guest data |
//! | `header` | the header in memory; changing the header on disk so that a power cut leaves the old header or the new one |
//! | `corruption` | reporting inconsistent metadata, and marking the image corrupt |
//!
//! A file uses only files above it in this table. [`ImageState`] uses no other owner. All owners have a reference to
//! `ImageState`, so it also contains the functions that each owner needs: reporting a corruption, and refusing requests after
//! a corruption.
//!
//! Lock: `HeaderState::lock`, the header lock. A task holds this lock while it replaces the header, changes feature bits, or
//! changes passwords.

mod corruption;
mod data_file;
pub(super) mod header;
pub(super) mod run_options;
pub(super) mod stopped;

use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use oxblk_core::{ChildIdx, Children, ChildrenRef, DebugEvent, Edge, Epochs, Result};

use super::layout::{Geometry, Header};
use header::HeaderState;
use run_options::Modes;
use stopped::ReplacedBy;

/// The size of the disk that requests see is a multiple of this number of bytes.
const SECTOR: u64 = 512;

/// The state of an open image that all its parts share.
pub(super) struct ImageState {
    geometry: Geometry,
    version: u32,
    children: ChildrenRef,
    epochs: Arc<Epochs>,
    header: HeaderState,
    read_only: AtomicBool,
    /// Size of the disk in bytes, as in the header.
    size: AtomicU64,
    /// If set, reads and writes fail, and a flush fails if changed L1 or L2 entries or dropped references are not on disk.
    /// Examples of causes: a writable image was found corrupt, the value of a header field on disk is unknown after an I/O
    /// error, a repair or an amend replaces metadata, a reopen could not make the image writable.
    disabled: AtomicBool,
    /// Why requests fail, if a repair or an amend is the cause.
    replaced: ReplacedBy,
    /// A corruption was logged already, so later ones are not logged.
    corruption_logged: AtomicBool,
    /// The runtime options.
    modes: AtomicU32,
}

impl ImageState {
    /// The state of an image with this header.
    pub(super) fn new(
        header: Header,
        modes: Modes,
        children: ChildrenRef,
        epochs: Arc<Epochs>,
        read_only: bool,
    ) -> Self {
        Self {
            geometry: header.geometry,
            version: header.version,
            children,
            epochs,
            read_only: AtomicBool::new(read_only),
            size: AtomicU64::new(header.size),
            disabled: AtomicBool::new(false),
            replaced: ReplacedBy::default(),
            corruption_logged: AtomicBool::new(false),
            modes: AtomicU32::new(modes.bits()),
            header: HeaderState::new(header),
        }
    }

    /// The geometry. It does not change while the image is open, so owners keep a copy.
    #[inline]
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The version of the format.
    #[inline]
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// The children of the node.
    #[inline]
    pub(super) fn children(&self) -> &Children {
        &self.children
    }

    /// The child that is the image file.
    pub(super) fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    /// Reports a debug event to the image file.
    pub(super) async fn event(&self, event: DebugEvent) {
        self.children.debug_event(ChildIdx::FILE, event).await;
    }

    /// The epochs of the node's requests.
    pub(super) fn epochs(&self) -> &Arc<Epochs> {
        &self.epochs
    }

    /// Sets the size of the disk in bytes, in memory only.
    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Release);
    }

    /// Makes the image read-only or writable. Returns whether it was read-only.
    pub(super) fn set_read_only(&self, read_only: bool) -> bool {
        self.read_only.swap(read_only, Relaxed)
    }

    /// Whether the image accepts requests.
    #[inline]
    pub(super) fn is_usable(&self) -> bool {
        !self.disabled.load(Relaxed)
    }

    /// Stops all further requests (see the field `disabled`).
    pub(super) fn disable(&self) {
        self.disabled.store(true, Release);
    }

    /// The flag that stops all further requests.
    pub(super) fn disabled(&self) -> &AtomicBool {
        &self.disabled
    }

    /// After this call, the next corruption is logged even if an earlier one was logged.
    pub(super) fn log_next_corruption(&self) {
        self.corruption_logged.store(false, Relaxed);
    }

    /// The size of the disk in bytes as the header contains it. This size is not always a multiple of the sector size.
    #[inline]
    pub(super) fn size_in_header(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// The size of the disk: the size in the header, rounded up to whole sectors.
    pub(super) fn size(&self) -> u64 {
        let size = self.size_in_header();
        size.checked_next_multiple_of(SECTOR).unwrap_or(size)
    }

    /// Guest offset of the area for VM state. The area begins behind the guest range of the L1 entries that the disk needs.
    pub(super) fn vm_state_offset(&self) -> u64 {
        let reach = self.geometry.cluster_size().checked_shl(self.geometry.l2_bits()).unwrap_or(0);
        self.geometry.l1_entries_for(self.size()).unwrap_or(0).saturating_mul(reach)
    }

    /// Whether the image is open read-only.
    #[inline]
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }
}
