//! Moving metadata from the end of the file: refcount blocks, the refcount table, L1 tables, the snapshot table, bitmaps, and
//! the LUKS header. (`moves` moves L2 tables.)

use oxblk_core::Result;

use super::super::clusters::ReleaseReason;
use super::super::layout::{Snapshot, field_offsets};
use super::Compaction;
use super::Moved;

impl Compaction<'_> {
    /// Moves the structure that uses `cluster`, the last cluster in use. `packed_end` is the number of clusters in use, that
    /// is, the number of clusters that the file would have without free clusters. If the structure cannot move, the result says
    /// why.
    pub(super) async fn move_structure(&self, cluster: u64, packed_end: u64) -> Result<Moved> {
        let moved = if let Some(block) = self.clusters.block_at(cluster) {
            self.clusters.move_block(block, cluster).await?
        } else if self.clusters.is_in_table(cluster) {
            self.clusters.move_table().await?
        } else if self
            .geometry
            .l1_clusters(self.mapping.l1_offset(), self.mapping.l1_entries())
            .contains(&cluster)
        {
            self.move_active_l1(cluster).await?
        } else if let Some(moved) = self.move_snapshots(cluster).await? {
            moved
        } else if let Some(moved) = self.move_bitmap(cluster, packed_end).await? {
            moved
        } else if let Some(moved) = self.move_luks_header(cluster).await? {
            moved
        } else {
            let obstacle = Some("clusters that cannot be moved (leaked clusters, broken bitmaps)");
            return Ok(Moved { clusters: 0, obstacle });
        };
        let obstacle = (moved == 0).then_some("metadata for which there is no room in front of it");
        Ok(Moved { clusters: moved, obstacle })
    }

    /// Moves the bitmap or the bitmap directory that uses `cluster`. Data of the bitmap in front of the cluster `packed_end`
    /// stays. If there is not enough space, all data in front of `cluster` stays.
    async fn move_bitmap(&self, cluster: u64, packed_end: u64) -> Result<Option<u64>> {
        let moved = self.bitmaps.move_bitmaps(cluster, packed_end).await?;
        if moved != Some(0) {
            return Ok(moved);
        }
        // Free the clusters that the failed attempt has allocated.
        self.metadata.write_all_metadata().await?;
        self.bitmaps.move_bitmaps(cluster, cluster).await
    }

    async fn move_active_l1(&self, cluster: u64) -> Result<u64> {
        let l1 = self.mapping.active_l1();
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let old = self.mapping.l1_offset();
        if !self.clusters.has_room(len, self.geometry.cluster_index(old)).await? {
            return Ok(0);
        }
        debug_assert!(self.geometry.l1_clusters(old, self.mapping.l1_entries()).contains(&cluster));
        let offset = self.metadata.store_table(bytes).await?;
        let (before, after) = (old.to_be_bytes(), offset.to_be_bytes());
        let written = self
            .image_state
            .exchange_header_field(field_offsets::L1_TABLE_OFFSET, &before, &after)
            .await;
        if written.is_err() {
            self.clusters.drop_l1_clusters(l1.len(), offset);
        }
        written?;
        self.mapping.set_l1_place(offset, self.mapping.l1_entries());
        let clusters = self.geometry.clusters_for(len);
        self.clusters.drop_clusters(
            self.geometry.cluster_index(old),
            clusters,
            ReleaseReason::Table,
        );
        Ok(clusters)
    }

    /// Moves the snapshot table or the L1 table of a snapshot, if `cluster` belongs to one of them. Returns the number of
    /// clusters that moved, 0 if there is not enough space, and `None` if `cluster` belongs to neither.
    async fn move_snapshots(&self, cluster: u64) -> Result<Option<u64>> {
        let place = self.metadata.snapshot_table();
        let table = self.geometry.cluster_index(place.offset)
            ..self.geometry.clusters_for(place.offset.saturating_add(place.bytes));
        let mut list = self.metadata.snapshot_list().await?;
        let of = |snapshot: &Snapshot| {
            self.geometry
                .l1_clusters(snapshot.l1_offset, snapshot.l1_entries.into())
                .contains(&cluster)
        };
        let Some(snapshot) = list.iter_mut().find(|snapshot| of(snapshot)) else {
            if !table.contains(&cluster) {
                return Ok(None);
            }
            let room = self.clusters.has_room(place.bytes, table.start).await?;
            if room {
                self.metadata.store_snapshots(&list).await?;
            }
            return Ok(Some(if room { table.end.saturating_sub(table.start) } else { 0 }));
        };
        let (old, entries) = (snapshot.l1_offset, snapshot.l1_entries);
        let bytes = u64::from(entries).saturating_mul(8);
        if !self.clusters.has_room(bytes, self.geometry.cluster_index(old)).await? {
            return Ok(Some(0));
        }
        let l1 = self.metadata.read_inactive_l1(old, entries).await?;
        let words: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        snapshot.l1_offset = self.metadata.store_table(words).await?;
        let new = snapshot.l1_offset;
        if let Err(error) = self.metadata.store_snapshots(&list).await {
            self.clusters.drop_l1_clusters(l1.len(), new);
            return Err(error);
        }
        self.clusters.drop_l1_clusters(l1.len(), old);
        Ok(Some(self.geometry.clusters_for(bytes)))
    }
}
