//! Moving the refcount table towards the front of the file.
//!
//! Core has drained the node, and no refcount is dirty.

use std::sync::atomic::Ordering::Acquire;

use oxblk_core::{Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::super::layout::field_offsets;
use super::Refcounts;

impl Refcounts {
    /// Whether the table lies in a cluster.
    pub(in super::super) fn table_is_in(&self, cluster: u64) -> bool {
        let place = self.table_place();
        let first = self.geometry.cluster_index(place.offset);
        (first..first.saturating_add(place.clusters)).contains(&cluster)
    }

    /// Moves the table to free clusters in front of it, and gives how many have become free; none if there is no room.
    ///
    /// The new one is written and counted, durably, before the header names it.
    pub(in super::super) async fn move_table(&self) -> Result<u64> {
        let old = self.table_place();
        let mut run = self.reserve_contiguous(old.clusters).await?;
        let start = run.start();
        if start.saturating_add(old.clusters) > self.geometry.cluster_index(old.offset) {
            run.give_back();
            return Ok(0);
        }
        run.begin_write();
        // This may make a block, which the table then has as well.
        self.add(start, old.clusters).await?;
        run.keep();
        self.write_back().await?;
        let growing = self.growing.lock().await;
        if self.table_place().offset != old.offset {
            return Err(Error::new(ErrorKind::Busy, "the refcount table has moved").errno(16));
        }
        let entries = self.table_entries.load(Acquire);
        let table = self.encode_table(entries, &[], 0)?;
        let file = self.file()?;
        file.write(self.host(start), table, WriteFlags::empty()).await?;
        file.flush().await?;
        let place = self.host(start).to_be_bytes().to_vec();
        file.write(field_offsets::REFCOUNT_TABLE_OFFSET, IoBuf::from(place), WriteFlags::empty())
            .await?;
        file.flush().await?;
        self.adopt_table(&[], start, start, entries);
        drop(growing);
        self.free_old_table(old.offset, entries).await?;
        Ok(old.clusters)
    }
}
