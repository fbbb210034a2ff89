//! Writing metadata back in an order that survives a crash, and changing L2 tables, the L1 table and the snapshot table.
//!
//! | file | concern |
//! |---|---|
//! | `snapshot_table` | the location of the snapshot table, and reading the table |
//! | `overlap` | metadata that overlaps other metadata |
//! | `dirty_bit` | the dirty bit of the header: lazy refcounts, changes of snapshots |
//! | `header` | rewriting the complete header |
//! | `write_back` | write-back cycles; reservations that may need one |
//! | `slices` | loading slices of L2 tables |
//! | `tables` | making L2 tables and other tables |
//! | `entries`, `extended_entries` | changing L2 entries |
//! | `l1_table` | replacing the L1 table by a larger one |
//! | `snapshot_change` | replacing the snapshot table |
//! | `close` | writing everything, so that the image on disk is complete |
//!
//! Each file uses only files above it in this table.
//!
//! [`Metadata`] uses [`ImageState`], [`Clusters`] and [`Mapping`]. `Clusters` and `Mapping` do not use each other. Only
//! `Metadata` writes active L2 tables and L1 entries, except in operations that drain the node.
//!
//! Invariant: a reference is written to the disk only after the cluster that it refers to and the refcount of that cluster.
//! (With lazy refcounts, the dirty bit is on disk instead of the refcount. Clusters of a data file have no refcounts.) A
//! refcount is lowered only after the reference is gone from the disk.
//!
//! Locks, in the order in which they are taken: `tables` (making an L2 table), `writing_back` (one write-back cycle at a time).
//! Of the locks of [`Clusters`], `Tail::lock` is taken before these two, and all others after them.

mod close;
mod dirty_bit;
mod entries;
mod extended_entries;
mod header;
mod l1_table;
mod overlap;
mod slices;
mod snapshot_change;
mod snapshot_table;
mod tables;
mod write_back;

use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use std::sync::{Arc, Mutex};

use oxblk_ring::Mutex as AsyncMutex;

use super::clusters::Clusters;
use super::image_state::ImageState;
use super::layout::Geometry;
use super::mapping::Mapping;
use crate::write_barrier::WriteBarrier;
use dirty_bit::DirtyBit;

pub(super) use snapshot_table::{SnapshotTable, V3_EXTRA, visit_snapshots};

/// Writes the metadata of an open image. One of the owners in the table of [`crate::qcow2`].
pub(super) struct Metadata {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    clusters: Arc<Clusters>,
    mapping: Arc<Mapping>,
    /// Held while an L2 table is created or copied.
    tables: AsyncMutex<()>,
    /// Held during a write-back cycle.
    writing_back: AsyncMutex<()>,
    barrier: WriteBarrier,
    /// The location of the snapshot table.
    snapshots: Mutex<SnapshotTable>,
    dirty_bit: DirtyBit,
    /// A change of snapshots did not complete. The image stays marked dirty, so that the next writable open repairs it.
    unfinished: AtomicBool,
}

impl Metadata {
    /// Creates the [`Metadata`] of an image with this snapshot table.
    pub(super) fn new(
        image_state: Arc<ImageState>,
        clusters: Arc<Clusters>,
        mapping: Arc<Mapping>,
        snapshots: SnapshotTable,
    ) -> Self {
        Self {
            geometry: image_state.geometry(),
            image_state,
            clusters,
            mapping,
            tables: AsyncMutex::new(()),
            writing_back: AsyncMutex::new(()),
            barrier: WriteBarrier::default(),
            snapshots: Mutex::new(snapshots),
            dirty_bit: DirtyBit::default(),
            unfinished: AtomicBool::new(false),
        }
    }

    /// Whether a change of snapshots did not complete.
    pub(super) fn is_unfinished(&self) -> bool {
        self.unfinished.load(Acquire)
    }

    /// Records that a change of snapshots did not complete.
    pub(super) fn set_unfinished(&self) {
        self.unfinished.store(true, Release);
    }

    fn clear_unfinished(&self) {
        self.unfinished.store(false, Release);
    }

    /// The barrier of all writes that must end before the next write-back cycle writes.
    pub(super) fn barrier(&self) -> &WriteBarrier {
        &self.barrier
    }
}
