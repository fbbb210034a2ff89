//! The runtime option `overlap-check`: refuses writes to clusters that contain protected metadata.
//!
//! Metadata clusters are never allocated for another purpose (see `clusters/allocator`). So structures overlap only in an
//! image that is damaged or that another program has written. The overlaps are computed when the image is opened, or
//! reopened, for writing. A write to a structure that overlaps a protected structure is refused, and the image is marked
//! corrupt. Writing guest data to a cluster with protected metadata, and freeing such a cluster as guest data, are refused
//! in the same way. The option selects the structures that are protected.

use std::collections::BTreeMap;

use oxblk_core::Result;
use roaring::RoaringTreemap;

use super::Metadata;
use crate::qcow2::image_state::run_options::{Modes, structure_names};

/// Collects the clusters of one structure after another, and finds the clusters that several of them use.
#[derive(Default)]
struct OverlapFinder {
    seen: Vec<(Modes, RoaringTreemap)>,
    shared: BTreeMap<u64, Modes>,
}

impl OverlapFinder {
    fn add(&mut self, structure: Modes, clusters: RoaringTreemap) {
        for (other, theirs) in &self.seen {
            for cluster in theirs & &clusters {
                *self.shared.entry(cluster).or_insert(Modes::empty()) |= structure | *other;
            }
        }
        self.seen.push((structure, clusters));
    }
}

impl Metadata {
    /// Computes which of these structures overlap: header, active L1 and L2 tables, refcount table, refcount blocks,
    /// snapshot table, and the L1 tables of snapshots. `inactive` is the set of the clusters of these last tables. The
    /// caller has read the offsets of all structures.
    pub(in crate::qcow2) fn find_overlaps(&self, inactive: RoaringTreemap) {
        let run = |offset: u64, bytes: u64| {
            let end = self.geometry.clusters_for(offset.saturating_add(bytes));
            let mut clusters = RoaringTreemap::new();
            if bytes > 0 {
                clusters.insert_range(self.geometry.cluster_index(offset)..end);
            }
            clusters
        };
        let size = self.geometry.cluster_size();
        let mut finder = OverlapFinder::default();
        finder.add(Modes::MAIN_HEADER, run(0, size));
        let l1 = (self.mapping.l1_offset(), self.mapping.l1_entries().saturating_mul(8));
        finder.add(Modes::ACTIVE_L1, run(l1.0, l1.1));
        let table = self.clusters.table_place();
        let table = run(table.offset, table.clusters.saturating_mul(size));
        finder.add(Modes::REFCOUNT_TABLE, table);
        let blocks = self.clusters.blocks().into_iter();
        let blocks = blocks.map(|block| self.clusters.block_offset(block));
        finder
            .add(Modes::REFCOUNT_BLOCK, blocks.map(|at| self.geometry.cluster_index(at)).collect());
        let snapshots = self.snapshot_table();
        finder.add(Modes::SNAPSHOT_TABLE, run(snapshots.offset, snapshots.bytes));
        finder.add(Modes::INACTIVE_L1, inactive);
        // L2 tables that the active L1 table shares with snapshots are never written in place, so they are left out.
        let tables = (0..self.mapping.l1_entries()).map(|index| self.mapping.l1_entry(index));
        let tables = tables.filter(|entry| entry.copied()).filter_map(|entry| {
            entry.l2_offset(self.geometry).ok().flatten().map(|at| self.geometry.cluster_index(at))
        });
        finder.add(Modes::ACTIVE_L2, tables.collect());
        self.clusters.set_overlaps(finder.shared);
    }

    /// The same as [`Self::find_overlaps`], for an image that has become writable. Reads the snapshot table first.
    ///
    /// # Errors
    /// The errors of [`Self::note_snapshots`].
    pub(in crate::qcow2) async fn note_overlaps(&self) -> Result<()> {
        let file = self.image_state.file()?;
        let inactive = self.note_snapshots(&file).await?;
        self.find_overlaps(inactive);
        Ok(())
    }

    /// Whether a range of the file contains metadata that `overlap-check` protects. Guest data must not be written there.
    pub(super) fn is_protected(&self, offset: u64, bytes: u64) -> bool {
        if !self.clusters.is_metadata(offset, bytes) {
            return false;
        }
        let protected = self.image_state.modes() & Modes::EVERYTHING;
        protected.contains(Modes::CACHED) || self.structures_in(offset, bytes).intersects(protected)
    }

    /// The names of the structures in a range of the file that contains metadata.
    pub(super) fn overlapped(&self, offset: u64, bytes: u64) -> String {
        structure_names(self.structures_in(offset, bytes))
    }

    /// The structures in a range of the file that contains metadata.
    pub(in crate::qcow2) fn structures_in(&self, offset: u64, bytes: u64) -> Modes {
        let end = offset.saturating_add(bytes);
        let overlaps = |start: u64, len: u64| start < end && offset < start.saturating_add(len);
        let size = self.geometry.cluster_size();
        let (table, snapshots) = (self.clusters.table_place(), self.snapshot_table());
        let mut found = Modes::empty();
        found.set(Modes::MAIN_HEADER, overlaps(0, size));
        let l1 = (self.mapping.l1_offset(), self.mapping.l1_entries().saturating_mul(8));
        found.set(Modes::ACTIVE_L1, overlaps(l1.0, l1.1));
        found.set(
            Modes::REFCOUNT_TABLE,
            overlaps(table.offset, table.clusters.saturating_mul(size)),
        );
        found.set(Modes::SNAPSHOT_TABLE, overlaps(snapshots.offset, snapshots.bytes));
        let clusters = self.geometry.cluster_index(offset)..self.geometry.clusters_for(end);
        let blocks = self.clusters.refcount_structures();
        let is_block = blocks.range(clusters).next().is_some();
        found.set(Modes::REFCOUNT_BLOCK, is_block && !found.contains(Modes::REFCOUNT_TABLE));
        let tables =
            (0..self.mapping.l1_entries()).map(|index| self.mapping.l1_entry(index).raw_offset());
        let mut tables = tables.filter(|table| *table != 0);
        found.set(Modes::ACTIVE_L2, tables.any(|table| overlaps(table, size)));
        if found.is_empty() {
            // The range contains other metadata, for example an inactive table or the bitmap directory. The kind of this
            // metadata is not distinguished.
            found = Modes::INACTIVE_L1 | Modes::INACTIVE_L2 | Modes::BITMAP_DIRECTORY;
        }
        found
    }
}
