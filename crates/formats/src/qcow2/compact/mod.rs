//! Compaction: clusters at the end of the file move into free ones in front of them, and what is free then is given back to
//! the host. Core has drained the node for each step.
//!
//! | file | concern |
//! |---|---|
//! | `usage` | which clusters are in use |
//! | `sources` | what refers to the clusters at the end |
//! | `moves` | moving guest data and L2 tables |
//! | `structures` | moving refcount blocks, the L1 table, snapshots |
//! | `release` | cutting the file off, punching holes |
//!
//! The file is worked off from its end. A cluster moves only if everything that refers to it is known, which is so if
//! there are as many references as its refcount says; others (of bitmaps, say, or compressed data) stay, and as nothing
//! in front of them would make the file shorter, that ends it.
//!
//! A crash at any point leaks at worst: a copy is durable and counted before the first reference to it is written, and the
//! old cluster's refcount is lowered when the last reference to it is gone from the disk. In between some references lead
//! to the copy and some to the original, which hold the same.

mod moves;
mod release;
mod sources;
mod structures;
mod usage;

use oxblk_core::compact::{Compact, Step};
use oxblk_core::{BoxFuture, Error, ErrorKind, Result};

use super::Qcow2;
use sources::Sources;

/// Clusters that one step looks at, at most.
const WINDOW: u64 = 1 << 16;

impl Qcow2 {
    async fn compact_step(&self, most: u64) -> Result<Step> {
        self.check_writable()?;
        self.settle_metadata().await?;
        let used = self.used_clusters().await?;
        let movable = used.boundary();
        let left = movable << self.geometry.cluster_bits;
        if movable == 0 {
            return Ok(Step::default());
        }
        let count = (most >> self.geometry.cluster_bits).clamp(1, WINDOW).min(movable);
        let window = used.last(count);
        let sources = self.sources_of(&window).await?;
        let moved = self.move_window(&window, sources).await?;
        self.settle_metadata().await?;
        let bytes = moved.clusters << self.geometry.cluster_bits;
        Ok(Step { moved: bytes, left: left.saturating_sub(bytes), obstacle: moved.obstacle })
    }

    /// Everything is on disk and nothing in the caches, and what was freed can be given out again.
    async fn settle_metadata(&self) -> Result<()> {
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        self.write_back(true).await?;
        self.recycle().await?;
        if self.l2.clear() && self.refcounts.cache().clear() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, "metadata is in use").errno(16))
    }

    /// Moves clusters of the window, from its end on, up to the first that stays.
    async fn move_window(&self, window: &[u64], sources: Sources) -> Result<Moved> {
        let mut moved = Moved::default();
        let (data, rest) = self.choose(window, &sources).await?;
        moved.clusters = self.move_data(&data).await?;
        if moved.clusters < data.clusters() {
            // There is no free cluster in front any more.
            return Ok(moved);
        }
        let tables = self.move_tables(&rest, &sources).await?;
        moved.clusters = moved.clusters.saturating_add(tables);
        // Structures move one at a time: they may be more than one cluster, and all else has to be in its place.
        if moved.clusters == 0 {
            return self.move_structure(window.first().copied().unwrap_or(0)).await;
        }
        Ok(moved)
    }
}

/// What came of a window.
#[derive(Debug, Default)]
struct Moved {
    clusters: u64,
    obstacle: Option<&'static str>,
}

impl Compact for Qcow2 {
    fn step(&self, most: u64) -> BoxFuture<'_, Result<Step>> {
        Box::pin(self.compact_step(most))
    }

    fn release(&self, from: u64) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(self.release_space(from))
    }
}
