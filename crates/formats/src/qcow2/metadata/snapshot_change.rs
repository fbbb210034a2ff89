//! Writing a new snapshot table that replaces the old one.
//!
//! A table is never changed in place. A new table is written and flushed. Then one write makes the header refer to the new
//! table, and the old table is freed.

use oxblk_core::{Errno, Error, Result};

use super::Metadata;
use super::snapshot_table::{SnapshotTable, V3_EXTRA};
use crate::qcow2::clusters::ReleaseReason;
use crate::qcow2::layout::{
    MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, Snapshot, encode_snapshot, field_offsets,
};

impl Metadata {
    /// Writes and flushes a new table, makes the header refer to it, and frees the old table. The caller ensures that all
    /// clusters that the new table refers to were written and flushed.
    pub(in crate::qcow2) async fn store_snapshots(&self, list: &[Snapshot]) -> Result<()> {
        let place = self.write_snapshots(list).await?;
        self.activate_snapshot_table(place).await
    }

    /// Adds the extra data that version 3 requires to each entry of the snapshot table. Does nothing if all entries have
    /// this extra data.
    pub(in crate::qcow2) async fn complete_snapshots(&self) -> Result<()> {
        let mut list = self.snapshot_list().await?;
        if list.iter().all(|snapshot| snapshot.extra.len() >= V3_EXTRA) {
            return Ok(());
        }
        for snapshot in &mut list {
            snapshot.size = snapshot.size.or(Some(self.image_state.size()));
        }
        self.store_snapshots(&list).await?;
        // The first write-back cycle lowers the refcounts of the old table in memory, and the second one writes these
        // refcounts.
        self.write_back(true).await?;
        self.write_back(true).await
    }

    /// Drops the references to the clusters of a table.
    fn drop_table(&self, offset: u64, bytes: u64) {
        if bytes > 0 {
            let clusters = self.geometry.clusters_for(bytes);
            self.clusters.drop_clusters(
                self.geometry.cluster_index(offset),
                clusters,
                ReleaseReason::Table,
            );
        }
    }

    /// Writes and flushes a new table. The header does not refer to this table yet.
    ///
    /// # Errors
    /// `EFBIG` if the list has too many snapshots or the table would be too large, and the errors of requests to the image
    /// file.
    pub(in crate::qcow2) async fn write_snapshots(
        &self,
        list: &[Snapshot],
    ) -> Result<SnapshotTable> {
        let bytes: Vec<u8> = list.iter().flat_map(encode_snapshot).collect();
        let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if count > MAX_SNAPSHOTS || len > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::from_errno(Errno::FBIG));
        }
        let mut place = SnapshotTable { offset: 0, count, bytes: len, is_broken: false };
        if len > 0 {
            place.offset = self.store_table(bytes).await?;
        }
        Ok(place)
    }

    /// Makes the header refer to a table from [`Self::write_snapshots`], and frees the old table.
    ///
    /// # Errors
    /// The errors of requests to the image file. The new table is then freed, and the old table stays in use. If the header
    /// cannot be restored, the image accepts no further requests.
    pub(in crate::qcow2) async fn activate_snapshot_table(
        &self,
        place: SnapshotTable,
    ) -> Result<()> {
        let fields = |place: SnapshotTable| {
            [&place.count.to_be_bytes()[..], &place.offset.to_be_bytes()[..]].concat()
        };
        let (before, after) = (fields(self.snapshot_table()), fields(place));
        let written = self
            .image_state
            .exchange_header_field(field_offsets::SNAPSHOT_COUNT, &before, &after)
            .await;
        if written.is_err() {
            self.drop_table(place.offset, place.bytes);
            return written;
        }
        let old = std::mem::replace(&mut *self.snapshots(), place);
        self.drop_table(old.offset, old.bytes);
        Ok(())
    }
}
