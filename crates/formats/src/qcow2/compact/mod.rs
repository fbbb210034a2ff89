//! Compaction: clusters at the end of the file move to free clusters nearer to the start of the file, and the free space is
//! returned to the host. `oxblk_core` drains the node for each step.
//!
//! | file | concern |
//! |---|---|
//! | `usage` | finding the clusters in use |
//! | `referrers` | finding the references to the clusters at the end |
//! | `moves` | choosing the clusters that move; moving guest data and L2 tables |
//! | `packed`, `packing` | moving compressed data; choosing its new location (without I/O) |
//! | `changes` | making L2 entries refer to the copies |
//! | `structures` | moving all other metadata, one structure at a time |
//! | `luks` | moving the LUKS header |
//! | `release` | truncating the file and punching holes |
//!
//! Compaction works from the end of the file to its start. A cluster moves only if all its references are known, that
//! is, if the number of known references equals its refcount. Other clusters, for example leaked clusters, stay. Compaction
//! ends at the first cluster that stays, because moving clusters in front of that cluster would not shorten the file.
//!
//! A crash at any point causes leaks at worst. A copy and its refcount are written and flushed before the first reference
//! to the copy is written. The refcount of the original is lowered after the last reference to the original has been
//! replaced on disk. Until then, some references may refer to the copy and some to the original. The copy and the
//! original have the same contents.

mod changes;
mod luks;
mod moves;
mod packed;
mod packing;
mod referrers;
mod release;
mod structures;
mod usage;

use oxblk_core::compact::Step;
use oxblk_core::{Error, Result};

use super::bitmaps::Bitmaps;
use super::clusters::Clusters;
use super::data::Data;
use super::image_state::ImageState;
use super::layout::Geometry;
use super::mapping::Mapping;
use super::metadata::Metadata;
use changes::Changes;

/// Maximum number of clusters in the window of one step. The window consists of the last clusters in use.
const WINDOW: u64 = 1 << 16;

/// One step of a compaction, with the parts of the image that the step uses.
pub(super) struct Compaction<'a> {
    geometry: Geometry,
    image_state: &'a ImageState,
    clusters: &'a Clusters,
    mapping: &'a Mapping,
    metadata: &'a Metadata,
    bitmaps: &'a Bitmaps,
    data: &'a Data,
}

impl<'a> Compaction<'a> {
    /// Prepares a step on the image with these parts.
    pub(super) fn new(
        image_state: &'a ImageState,
        clusters: &'a Clusters,
        mapping: &'a Mapping,
        metadata: &'a Metadata,
        bitmaps: &'a Bitmaps,
        data: &'a Data,
    ) -> Self {
        Self {
            geometry: image_state.geometry(),
            image_state,
            clusters,
            mapping,
            metadata,
            bitmaps,
            data,
        }
    }
}

impl Compaction<'_> {
    /// Moves up to `max_bytes` bytes of clusters, but at least one cluster, or one metadata structure of any length. Moves
    /// nothing if no cluster or structure can move.
    pub(super) async fn compact_step(&self, max_bytes: u64) -> Result<Step> {
        self.image_state.check_writable()?;
        // Bitmaps are added and removed without draining the node.
        let _bitmaps = self.bitmaps.lock().await;
        if self.clusters.have_overlaps() {
            // Moving a cluster would free the original, although other metadata also uses the original.
            return Err(Error::corrupt("metadata structures overlap: the image needs a check"));
        }
        self.metadata.write_all_metadata().await?;
        let used = self.used_clusters().await?;
        let movable = used.clusters_to_move();
        let left = movable << self.geometry.cluster_bits;
        if movable == 0 {
            return Ok(Step::default());
        }
        let count = (max_bytes >> self.geometry.cluster_bits).clamp(1, WINDOW).min(movable);
        let window = used.last(count);
        let moved = self.move_window(&window, used.count()).await?;
        self.metadata.write_all_metadata().await?;
        let bytes = moved.clusters << self.geometry.cluster_bits;
        Ok(Step { moved: bytes, left: left.saturating_sub(bytes), obstacle: moved.obstacle })
    }

    /// Moves the guest data and the L2 tables of the window that lie behind all clusters that must stay. If no such cluster can
    /// move, moves the metadata structure at the end of the file, or returns why it must stay. `packed_end` is the number of
    /// clusters that the file would have without free clusters.
    async fn move_window(&self, window: &[u64], packed_end: u64) -> Result<Moved> {
        let mut referrers = self.find_referrers(window).await?;
        let mut chosen = self.choose(&mut referrers).await?;
        let mut changes = Changes::default();
        let unmovable =
            self.move_packed(&chosen.packed, &mut referrers.pieces, &mut changes).await?;
        if let Some(unmovable) = unmovable {
            chosen.keep_behind(unmovable.cluster);
        }
        let complete = self.move_data(&chosen, &mut changes).await?;
        let mut moved = Moved { clusters: changes.free(), obstacle: None };
        self.write_changes(changes).await?;
        if !complete {
            // No free cluster is left in front of the window.
            return Ok(moved);
        }
        let tables = self.move_tables(&chosen.tables, &referrers).await?;
        moved.clusters = moved.clusters.saturating_add(tables);
        if moved.clusters == 0 {
            if unmovable.is_some() {
                moved.obstacle = unmovable.map(|unmovable| unmovable.reason);
                return Ok(moved);
            }
            // Structures move one at a time, because a structure may be longer than one cluster. A structure moves only if no
            // guest data and no L2 table lies behind it.
            return self.move_structure(window.first().copied().unwrap_or(0), packed_end).await;
        }
        Ok(moved)
    }
}

/// Result of moving the clusters of a window.
#[derive(Debug, Default)]
struct Moved {
    clusters: u64,
    obstacle: Option<&'static str>,
}
