//! Compaction: clusters at the end of the file move into free ones in front of them, and what is free then is given back to
//! the host. Core has drained the node for each step.
//!
//! | file | concern |
//! |---|---|
//! | `usage` | which clusters are in use |
//! | `sources` | what refers to the clusters at the end |
//! | `moves` | choosing what moves; moving guest data and L2 tables |
//! | `packed`, `packing` | moving compressed data; where it goes (pure) |
//! | `changes` | having entries refer to what has moved |
//! | `structures` | moving everything else, one thing at a time |
//! | `luks` | moving the LUKS header |
//! | `release` | cutting the file off, punching holes |
//!
//! The file is worked off from its end. A cluster moves only if everything that refers to it is known, which is so if
//! there are as many references as its refcount says; others (that leaked, say) stay, and as nothing in front of
//! them would make the file shorter, that ends it.
//!
//! A crash at any point leaks at worst: a copy is durable and counted before the first reference to it is written, and the
//! old cluster's refcount is lowered when the last reference to it is gone from the disk. In between some references lead
//! to the copy and some to the original, which hold the same.

mod changes;
mod luks;
mod moves;
mod packed;
mod packing;
mod release;
mod sources;
mod structures;
mod usage;

use oxblk_core::compact::{Compact, Step};
use oxblk_core::{BoxFuture, Errno, Error, ErrorKind, Result};

use super::Qcow2;
use changes::Changes;

/// Clusters that one step looks at, at most.
const WINDOW: u64 = 1 << 16;

impl Qcow2 {
    async fn compact_step(&self, most: u64) -> Result<Step> {
        self.check_writable()?;
        // They are added and removed without the node being drained.
        let _bitmaps = self.bitmaps.hold().await;
        if self.refcounts.allocator.overlaps.exist() {
            // What is moved would be freed, with what else lies there.
            return Err(Error::corrupt("metadata lies on other metadata: the image needs a check"));
        }
        self.settle_metadata().await?;
        let used = self.used_clusters().await?;
        let movable = used.boundary();
        let left = movable << self.geometry.cluster_bits;
        if movable == 0 {
            return Ok(Step::default());
        }
        let count = (most >> self.geometry.cluster_bits).clamp(1, WINDOW).min(movable);
        let window = used.last(count);
        let moved = self.move_window(&window, used.count()).await?;
        self.settle_metadata().await?;
        let bytes = moved.clusters << self.geometry.cluster_bits;
        Ok(Step { moved: bytes, left: left.saturating_sub(bytes), obstacle: moved.obstacle })
    }

    /// Everything is on disk and nothing in the caches, and what was freed can be given out again.
    pub(super) async fn settle_metadata(&self) -> Result<()> {
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        self.write_back(true).await?;
        self.write_postponed().await?;
        self.recycle().await?;
        if self.l2.clear() && self.refcounts.cache().clear() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, "metadata is in use").errno(Errno::BUSY))
    }

    /// Moves clusters of the window, from its end on, up to the first that stays. `packed_end` is where the file would end
    /// without a gap.
    async fn move_window(&self, window: &[u64], packed_end: u64) -> Result<Moved> {
        let mut sources = self.sources_of(window).await?;
        let mut chosen = self.choose(&mut sources).await?;
        let mut changes = Changes::default();
        let stays = self.move_packed(&chosen.packed, &mut sources.pieces, &mut changes).await?;
        if let Some(stays) = stays {
            chosen.keep_behind(stays.cluster);
        }
        let complete = self.move_data(&chosen, &mut changes).await?;
        let mut moved = Moved { clusters: changes.free(), obstacle: None };
        self.switch_over(changes).await?;
        if !complete {
            // There is no free cluster in front any more.
            return Ok(moved);
        }
        let tables = self.move_tables(&chosen.tables, &sources).await?;
        moved.clusters = moved.clusters.saturating_add(tables);
        if moved.clusters == 0 {
            if stays.is_some() {
                moved.obstacle = stays.map(|stays| stays.why);
                return Ok(moved);
            }
            // Structures move one at a time: they may be more than one cluster, and all else has to be in its place.
            return self.move_structure(window.first().copied().unwrap_or(0), packed_end).await;
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
