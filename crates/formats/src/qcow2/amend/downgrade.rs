//! Checking snapshots, and replacing zero clusters, for a downgrade to version 2. Version 2 does not have zero clusters.
//!
//! A zero cluster becomes unallocated if no backing file would become visible. Otherwise the zero cluster becomes a data
//! cluster that contains zeroes. In the active disk state, ordinary writes and discards replace the zero clusters, so a power
//! cut does not change the contents of the disk. `snapshots::expand` replaces the zero clusters of snapshots.

use oxblk_core::{Error, Result, run_all};
use oxblk_ring::IoBuf;

use super::Qcow2;
use crate::qcow2::clusters::ReleaseReason;
use crate::qcow2::mapping::Extent;

/// Maximum number of zero bytes per write. If the cluster size is larger, each write has the length of a cluster.
const PIECE: u64 = 1 << 20;
/// Maximum number of these writes in flight.
const IN_FLIGHT: usize = 4;

impl Qcow2 {
    /// Refuses a downgrade if version 2 cannot store a snapshot of the image. Version 2 does not store the disk size of a
    /// snapshot, so each disk size in the snapshot table must be `size`. Version 2 also limits the size of the VM state.
    pub(super) async fn check_snapshots_for_downgrade(&self, size: u64) -> Result<()> {
        if self.snapshots.snapshots_fit_version_2(size).await? {
            return Ok(());
        }
        Err(Error::unsupported("Internal snapshots prevent downgrade of image"))
    }

    /// Replaces all zero clusters that the active L1 table and the snapshots map.
    pub(super) async fn expand_zero_clusters(&self, progress: &dyn Fn(u64, u64)) -> Result<()> {
        let over_backing = self.image_state.header().backing_file.is_some();
        let reach = self.geometry.cluster_size() << self.geometry.l2_bits();
        let end = self.mapping.l1_entries().saturating_mul(reach);
        let mut at = 0;
        while at < end {
            progress(at, end);
            let table_end = (at - at % reach).saturating_add(reach);
            if self.mapping.l1_entry(self.mapping.l1_index(at)).raw_offset() == 0 {
                at = table_end;
                continue;
            }
            let extent = self.metadata.extent(at, table_end - at).await?;
            let next = at.saturating_add(extent.len());
            if let Extent::Zero { .. } = extent {
                self.expand(at, next, over_backing).await?;
            }
            at = next;
        }
        self.metadata.write_back(true).await?;
        self.snapshots.expand_snapshots(over_backing).await?;
        progress(end, end);
        Ok(())
    }

    /// Replaces a run of zero clusters: with data clusters where a backing file would become visible, and with unallocated
    /// clusters elsewhere.
    async fn expand(&self, from: u64, to: u64, over_backing: bool) -> Result<()> {
        // Unallocated clusters behind the end of the disk read as zeroes even with a backing file.
        let end = if over_backing { to.min(self.image_state.size()).max(from) } else { from };
        let mut at = from;
        while at < end {
            let mut writes = Vec::new();
            while at < end && writes.len() < IN_FLIGHT {
                let len = PIECE.max(self.geometry.cluster_size()).min(end - at);
                let zeroes = IoBuf::zeroes(usize::try_from(len).unwrap_or(usize::MAX));
                writes.push(self.write_guest(at, zeroes));
                at = at.saturating_add(len);
            }
            run_all(writes).await?;
            self.metadata.write_back_if_needed().await?;
        }
        let rest = self.geometry.cluster_end(end);
        self.deallocate_guest(rest, to, ReleaseReason::Discarded).await
    }
}
