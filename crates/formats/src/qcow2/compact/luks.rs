//! Moving the LUKS header of an encrypted image to lower clusters.
//!
//! The copy of the LUKS header and the refcounts of the copy are written and flushed before the full disk encryption header
//! pointer (a header extension) refers to the copy. A change of passwords takes the header lock, and changes the LUKS
//! header to which this pointer refers. The move also holds this lock while it copies the LUKS header.
//!
//! A LUKS header that is no longer in use is overwritten with zeroes before its clusters are freed. This is the old LUKS
//! header after the move, or the copy if the move fails. Otherwise a password could still unlock the disk with the unused LUKS
//! header after the password was erased from the active LUKS header. If the machine crashes before the unused LUKS header is
//! overwritten, the unused LUKS header stays in leaked clusters. A repair frees these clusters without overwriting them.

use std::ops::Range;

use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::clusters::ReleaseReason;
use super::super::image_state::run_options::Modes;
use super::super::layout::CryptoHeader;
use super::Compaction;

/// The maximum length of a LUKS header that is moved. With eight key slots, a LUKS header is a few MiB long.
const MAX_LENGTH: u64 = 16 << 20;

impl Compaction<'_> {
    /// Moves the LUKS header to lower clusters if it uses `cluster`. Returns the number of freed clusters, 0 if there
    /// is no space, and `None` if `cluster` does not belong to a movable LUKS header.
    pub(super) async fn move_luks_header(&self, cluster: u64) -> Result<Option<u64>> {
        let Some(old) = self.image_state.header().extensions.crypto else { return Ok(None) };
        let Some(end) = old.offset.checked_add(old.length) else { return Ok(None) };
        let clusters = self.geometry.cluster_index(old.offset)..self.geometry.clusters_for(end);
        if old.length > MAX_LENGTH
            || !clusters.contains(&cluster)
            || !self.is_luks_unshared(&clusters).await?
        {
            return Ok(None);
        }
        if !self.clusters.has_room(old.length, clusters.start).await? {
            return Ok(Some(0));
        }
        let file = self.image_state.file()?;
        let len = usize::try_from(old.length).unwrap_or(0);
        // The new clusters have refcounts before key material is written to them.
        let (offset, counted) = self.metadata.store_unreferenced_table(vec![0; len]).await?;
        let guard = self.image_state.lock_header().await;
        let copied = async {
            // While the header lock is held, no password can be changed.
            let keys = file.read(old.offset, IoBufMut::new(len)).await?.freeze();
            file.write(offset, keys, WriteFlags::empty()).await?;
            file.flush().await?;
            let new = CryptoHeader { offset, ..old };
            self.metadata
                .rewrite_locked_header(&guard, |header| header.extensions.crypto = Some(new))
                .await
        };
        if let Err(error) = copied.await {
            if self.image_state.check_usable().is_err() {
                // It is unknown whether the image header refers to the copy.
                counted.keep();
            } else if let Err(left) = wipe(&file, offset, len).await {
                counted.keep();
                tracing::warn!(
                    "qcow2: a copy of the LUKS header at {offset:#x} stays in leaked clusters: {left}"
                );
            }
            return Err(error);
        }
        counted.keep();
        drop(guard);
        let count = clusters.end.saturating_sub(clusters.start);
        let len = usize::try_from(count << self.geometry.cluster_bits).unwrap_or(0);
        wipe(&file, old.offset, len).await?;
        self.clusters.drop_clusters(clusters.start, count, ReleaseReason::Table);
        Ok(Some(count))
    }

    /// Whether the clusters of the LUKS header contain no other structure and no guest data.
    async fn is_luks_unshared(&self, clusters: &Range<u64>) -> Result<bool> {
        for cluster in clusters.clone() {
            if self.clusters.get(cluster).await? != 1 {
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
        if self.metadata.structures_in(clusters.start << bits, len).intersects(others) {
            return Ok(false);
        }
        for snapshot in self.metadata.snapshot_list().await? {
            let l1 = self.geometry.l1_clusters(snapshot.l1_offset, snapshot.l1_entries.into());
            if l1.start < clusters.end && clusters.start < l1.end {
                return Ok(false);
            }
        }
        let window: Vec<u64> = clusters.clone().rev().collect();
        let referrers = self.find_referrers(&window).await?;
        Ok(referrers.window.len() == window.len()
            && referrers.entries.is_empty()
            && referrers.tables.is_empty()
            && referrers.shared.is_empty())
    }
}

/// Overwrites key material with zeroes, and flushes.
async fn wipe(file: &Edge, offset: u64, len: usize) -> Result<()> {
    file.write(offset, IoBuf::zeroes(len), WriteFlags::empty()).await?;
    file.flush().await
}
