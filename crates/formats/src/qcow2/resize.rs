//! Changing the virtual size. `oxblk_core` has drained the node. [`super::shrink`] makes a disk smaller.
//!
//! A growth first makes the added space read as zeroes, preallocates it if requested, and flushes. Then it writes the new
//! size to the header. So a crash or a failure leaves the old size or the new one. The added space never shows old data or
//! the backing file. If a growth fails, the image frees the clusters that the growth has allocated.

use oxblk_core::{ChildIdx, Error, ErrorKind, Preallocation, Result, ZeroFlags};
use oxblk_ring::IoBuf;

use super::Qcow2;
use super::clusters::ReleaseReason;
use super::layout::L1Entry;
use super::mapping::Extent;

/// Number of zero bytes per write.
const PIECE: usize = 1 << 20;

impl Qcow2 {
    /// Sets the virtual size to `size` bytes.
    ///
    /// # Errors
    /// Fails if the image, the size, the preallocation mode or a bitmap does not permit the resize. Also returns the errors
    /// of requests to the image file and the data file. The size and the bitmaps are then unchanged, but stored VM state may
    /// have been freed.
    pub(super) async fn resize_image(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.image_state.check_writable()?;
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        self.check_resizable()?;
        self.bitmaps.check_bitmaps_can_resize(size)?;
        let old = self.image_state.size();
        if size < old && preallocation != Preallocation::Off {
            return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
        }
        // The VM state area begins behind the disk. The resize can move the start of this area, so stored VM state would
        // become invalid.
        self.snapshots.free_vm_state().await?;
        if size < old {
            return self.shrink(old, size).await;
        }
        // A raw data file may be longer than the disk. If the growth fails, the data file gets its old length back.
        let data = self
            .image_state
            .children()
            .get(ChildIdx::DATA)
            .filter(|_| self.image_state.has_raw_data());
        let data_size = data.map_or(old, |data| data.size().max(old));
        let grown = self.grow(old, size, preallocation).await;
        if grown.is_err() && self.image_state.check_usable().is_ok() {
            // Cancelled writes must end before their clusters are freed.
            oxblk_ring::settled().await;
            if let Err(error) = self.undo_growth(old, data_size).await {
                tracing::warn!(
                    "qcow2: clusters that a failed growth has allocated could not be freed: {error}"
                );
            }
        }
        grown
    }

    /// Refuses to resize a version 2 image with snapshots: version 2 does not store the disk size of a snapshot.
    pub(super) fn check_resizable(&self) -> Result<()> {
        if self.metadata.snapshot_table().count > 0 && self.image_state.header().version < 3 {
            return Err(Error::unsupported("Can't resize a v2 image which has snapshots"));
        }
        Ok(())
    }

    async fn grow(&self, old: u64, size: u64, preallocation: Preallocation) -> Result<()> {
        self.grow_data(old, size).await?;
        self.metadata.grow_l1(size).await?;
        // A crash of this or of another program may have left data behind the end of the disk.
        self.deallocate_guest(
            self.geometry.cluster_end(old),
            self.image_state.vm_state_offset(),
            ReleaseReason::CutOff,
        )
        .await?;
        self.zero_rest_of_cluster(old, size, preallocation).await?;
        self.hide_backing(old, size).await?;
        // With a raw data file, all clusters must be mapped.
        let preallocation = match preallocation {
            Preallocation::Off if self.image_state.has_raw_data() => Preallocation::Metadata,
            preallocation => preallocation,
        };
        if preallocation != Preallocation::Off {
            let allocated = self.preallocate(old, size, preallocation).await;
            allocated.map_err(|error| error.prefix("Could not preallocate the new space"))?;
        }
        self.metadata.write_back(true).await?;
        self.write_size(size).await
    }

    /// Frees the clusters that a failed growth has allocated.
    async fn undo_growth(&self, old: u64, data_size: u64) -> Result<()> {
        let reach = self.geometry.cluster_size() << self.geometry.l2_bits();
        let end = self.mapping.l1_entries().saturating_mul(reach);
        self.deallocate_guest(self.geometry.cluster_end(old), end, ReleaseReason::CutOff).await?;
        self.drop_tables_from(self.geometry.l1_entries_for(old).unwrap_or(u64::MAX));
        // The first cycle lowers refcounts, the second writes them.
        self.metadata.write_back(true).await?;
        self.metadata.write_back(true).await?;
        if let Some(data) = self.image_state.children().get(ChildIdx::DATA)
            && data.size() > data_size
        {
            data.resize(data_size, Preallocation::Off).await?;
        }
        self.clusters.trim_file().await
    }

    /// Extends a data file to the new disk size, with zeroes behind the old end of the disk. A longer data file that is not
    /// raw is first truncated to the old disk size. A raw data file may be longer than the disk on purpose, or because a
    /// crash interrupted a shrink. The part of the data file that becomes a part of the disk is zeroed.
    async fn grow_data(&self, old: u64, size: u64) -> Result<()> {
        if !self.geometry.data_file {
            return Ok(());
        }
        let data = self.image_state.children().require(ChildIdx::DATA)?;
        if data.size() > old && !self.image_state.has_raw_data() {
            data.resize(old, Preallocation::Off).await?;
        }
        let gained = old..data.size().min(size);
        if !gained.is_empty() {
            data.write_zeroes(gained.start, gained.end - gained.start, ZeroFlags::MAY_UNMAP)
                .await?;
        }
        data.resize(size, Preallocation::Off).await
    }

    /// Zeroes the last cluster of the old disk behind the old end. If the new space is preallocated, allocates this
    /// cluster.
    async fn zero_rest_of_cluster(
        &self,
        old: u64,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let end = self.geometry.cluster_end(old);
        // A data file ends with the disk.
        let end = if self.geometry.data_file { end.min(size) } else { end };
        if old >= end {
            return Ok(());
        }
        let extent = self.metadata.extent(old, end - old).await?;
        let is_allocated = !matches!(
            extent,
            Extent::Zero { host: None, .. }
                | Extent::Unallocated { host: None, .. }
                | Extent::Compressed { .. }
        );
        if preallocation == Preallocation::Off || is_allocated {
            self.zero_if_needed(old, end).await
        } else {
            let len = usize::try_from(end - old).unwrap_or(0);
            self.write_guest(old, IoBuf::zeroes(len)).await
        }
    }

    /// Makes the part of the added space that the backing file covers read as zeroes.
    async fn hide_backing(&self, old: u64, size: u64) -> Result<()> {
        let backing =
            self.image_state.children().get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        let (from, to) =
            (self.geometry.cluster_end(old), self.geometry.cluster_end(backing.min(size)));
        if from >= to {
            return Ok(());
        }
        let zeroed = {
            let _lock = self.guest.lock(from..to).await;
            self.zero_entries(from, to, ZeroFlags::MAY_UNMAP).await
        };
        match zeroed {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.write_zero_data(from, to).await
            }
            outcome => outcome,
        }
    }

    async fn write_zero_data(&self, from: u64, to: u64) -> Result<()> {
        let zeroes = IoBuf::zeroes(PIECE);
        let mut at = from;
        while at < to {
            let len = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.write_guest(at, zeroes.slice(..len)).await?;
            at = at.saturating_add(u64::try_from(len).unwrap_or(0));
            self.metadata.write_back_if_needed().await?;
        }
        Ok(())
    }

    /// Frees the L2 tables of the L1 entries from `index` on. The caller has freed all clusters that these tables mapped.
    fn drop_tables_from(&self, index: u64) {
        for index in index..self.mapping.l1_entries() {
            if let Ok(Some(table)) = self.mapping.l1_entry(index).l2_offset(self.geometry) {
                self.mapping.set_l1_entry(index, L1Entry::EMPTY);
                self.clusters.drop_clusters(
                    self.geometry.cluster_index(table),
                    1,
                    ReleaseReason::Table,
                );
            }
        }
    }
}
