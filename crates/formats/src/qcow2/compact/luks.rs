//! Moving the LUKS header of an encrypted image to lower clusters.
//!
//! The copy is written, counted and durable before the extension of the image header names it. A change of passwords
//! takes the header lock, and changes the LUKS header that the extension names.
//!
//! The old LUKS header is overwritten with zeroes before its clusters are freed. Otherwise a password that is erased
//! later could still open the disk with the old copy. After a crash in between, the old copy stays in leaked clusters
//! until a repair.

use std::ops::Range;

use oxblk_core::{ChildIdx, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::Qcow2;
use super::super::layout::CryptoHeader;
use super::super::run_options::Modes;
use super::super::dropped::ReleaseReason;

/// The maximum length of a LUKS header that is moved. With eight key slots it is a few MiB long.
const MOST: u64 = 16 << 20;

impl Qcow2 {
    /// Moves the LUKS header to lower clusters if it uses `cluster`. Returns the number of freed clusters, 0 if there
    /// is no space, and `None` if `cluster` does not belong to a movable LUKS header.
    pub(super) async fn move_luks_header(&self, cluster: u64) -> Result<Option<u64>> {
        let Some(old) = self.header().extensions.crypto else { return Ok(None) };
        let Some(end) = old.offset.checked_add(old.length) else { return Ok(None) };
        let clusters = self.geometry.cluster_index(old.offset)..self.geometry.clusters_for(end);
        if old.length > MOST
            || !clusters.contains(&cluster)
            || !self.is_luks_alone(&clusters).await?
        {
            return Ok(None);
        }
        if !self.has_room(old.length, clusters.start).await? {
            return Ok(Some(0));
        }
        let file = self.children.require(ChildIdx::FILE)?;
        let len = usize::try_from(old.length).unwrap_or(0);
        let copy = file.read(old.offset, IoBufMut::new(len)).await?;
        let offset = self.store_table(copy.to_vec()).await?;
        let turn = self.hold_header().await;
        let now = file.read(old.offset, IoBufMut::new(len)).await?;
        if now[..] != copy[..] {
            // A password was changed after the copy was read.
            file.write(offset, now.freeze(), WriteFlags::empty()).await?;
            file.flush().await?;
        }
        let new = CryptoHeader { offset, ..old };
        let named = self.rewrite_held_header(&turn, |header| header.extensions.crypto = Some(new));
        self.stop_unless_known(named).await?;
        drop(turn);
        let count = clusters.end.saturating_sub(clusters.start);
        let zeroes =
            IoBuf::zeroes(usize::try_from(count << self.geometry.cluster_bits).unwrap_or(0));
        file.write(old.offset, zeroes, WriteFlags::empty()).await?;
        file.flush().await?;
        self.drop_clusters(clusters.start, count, ReleaseReason::Table);
        Ok(Some(count))
    }

    /// Whether no other structure or guest data uses the clusters of the LUKS header.
    async fn is_luks_alone(&self, clusters: &Range<u64>) -> Result<bool> {
        for cluster in clusters.clone() {
            if self.refcounts.get(cluster).await? != 1 {
                return Ok(false);
            }
        }
        let bits = self.geometry.cluster_bits;
        let len = clusters.end.saturating_sub(clusters.start) << bits;
        let others = Modes::MAIN_HEADER
            | Modes::ACTIVE_L1
            | Modes::REFCOUNT_TABLE
            | Modes::REFCOUNT_BLOCK
            | Modes::SNAPSHOT_TABLE;
        if self.structures_in(clusters.start << bits, len).intersects(others) {
            return Ok(false);
        }
        for snapshot in self.snapshot_list().await? {
            let l1 = self.clusters_of(snapshot.l1_offset, snapshot.l1_entries.into());
            if l1.start < clusters.end && clusters.start < l1.end {
                return Ok(false);
            }
        }
        let window: Vec<u64> = clusters.clone().rev().collect();
        let sources = self.sources_of(&window).await?;
        Ok(sources.window.len() == window.len()
            && sources.entries.is_empty()
            && sources.tables.is_empty()
            && sources.shared.is_empty())
    }
}
