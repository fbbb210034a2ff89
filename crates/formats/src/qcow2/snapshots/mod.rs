//! Internal snapshots (section "Snapshots" of the qcow2 specification). `oxblk_core` drains the node before a snapshot is
//! created, applied or deleted.
//!
//! | file | concern |
//! |---|---|
//! | `references` | counting the references of an L1 table |
//! | `refcounts` | raising and lowering refcounts by these counts |
//! | `copied` | setting and clearing copied flags |
//! | `change` | creating, applying and deleting a snapshot |
//! | `expand` | replacing zero clusters of snapshots, for version 2 |
//! | `vm_state` | freeing the VM state that the active L1 table maps |
//! | `show` | reading a snapshot without changing the image |
//!
//! A crash at any point leaves either the old state or the new one. One write makes the change effective. This write
//! changes the snapshot table fields of the header, the L1 table fields of the header, or one sector of the active L1
//! table. Refcounts of new references are raised before this write, and refcounts of lost references are lowered after
//! it. Between these steps, refcounts are correct or too high, so a crash leaks clusters at worst.
//!
//! A set copied flag is always right. During the operation, copied flags may be missing. For this reason, the dirty bit of a
//! version 3 image is set during the operation: after a crash, the next open for writing repairs the flags. In version 2,
//! flags may stay missing after a crash. A missing flag only causes a copy of the cluster or of the L2 table at the next
//! write.

mod change;
mod copied;
mod expand;
mod refcounts;
mod references;
mod show;
mod vm_state;

use std::sync::Arc;

use oxblk_core::snapshot::SnapshotInfo;

use super::bitmaps::Bitmaps;
use super::clusters::Clusters;
use super::image_state::ImageState;
use super::layout::{Geometry, Snapshot};
use super::mapping::Mapping;
use super::metadata::Metadata;

/// Creates, applies and deletes the snapshots of an open image. One of the owners in the table of [`crate::qcow2`].
pub(super) struct ImageSnapshots {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    clusters: Arc<Clusters>,
    mapping: Arc<Mapping>,
    metadata: Arc<Metadata>,
    bitmaps: Arc<Bitmaps>,
}

impl ImageSnapshots {
    /// Creates an [`ImageSnapshots`] that uses these parts of the image.
    pub(super) fn new(
        image_state: Arc<ImageState>,
        clusters: Arc<Clusters>,
        mapping: Arc<Mapping>,
        metadata: Arc<Metadata>,
        bitmaps: Arc<Bitmaps>,
    ) -> Self {
        Self { geometry: image_state.geometry(), image_state, clusters, mapping, metadata, bitmaps }
    }
}

/// The description of a snapshot for users.
pub(super) fn describe(snapshot: &Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
        date: snapshot.date,
        vm_clock: snapshot.vm_clock,
        vm_state_size: snapshot.vm_state_size,
        icount: snapshot.icount(),
        size: snapshot.size,
    }
}
