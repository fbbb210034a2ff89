//! Changing the virtual size. `oxblk_core` has drained the node.
//!
//! To grow the disk, the driver first makes the added range read as zeroes, flushes, and then writes the new size to the
//! header. To shrink the disk, the driver first writes the new size, and then frees the clusters after the new end. So
//! after a crash or an error the disk has the old or the new size. A range that is added later never reads as old data or
//! as the backing file.

use std::sync::atomic::Ordering::Release;

use oxblk_core::{ChildIdx, Error, Preallocation, Result, ZeroFlags};
use oxblk_ring::IoBuf;

use super::Qed;
use super::header::{Entry, SECTOR, data_entry};
use super::lookup::{Extent, load, set};

impl Qed {
    /// Sets the virtual size to `size` bytes.
    ///
    /// # Errors
    /// Fails if the image is read-only, if the size is invalid, if preallocation is requested, or if a table is invalid. Also
    /// returns the errors of requests to the image file and of filling gaps. After an error, the disk may already have the new
    /// size.
    pub(super) async fn resize_image(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        if preallocation != Preallocation::Off {
            let text = format!("Unsupported preallocation mode '{}'", preallocation.name());
            return Err(Error::unsupported(text));
        }
        if !size.is_multiple_of(SECTOR) || size > self.geometry.max_size() {
            return Err(Error::invalid("Invalid image size specified"));
        }
        self.write_back(true).await?;
        let old = self.size();
        if size < old {
            self.store_size(size).await?;
            self.forget(self.geometry.end(size)).await?;
            self.zero_rest(size).await?;
            self.write_back(true).await?;
            return self.close_gaps(u64::MAX).await;
        }
        // A crash or another program may have left data after the end of the disk.
        self.forget(self.geometry.end(old)).await?;
        self.zero_rest(old).await?;
        let backing = self.children.get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        let (from, to) = (self.geometry.end(old), self.geometry.end(backing.min(size)));
        self.set_zero_entries(from, to).await?;
        self.write_back(true).await?;
        self.store_size(size).await
    }

    async fn store_size(&self, size: u64) -> Result<()> {
        self.change_header(|state| state.header.size = size).await?;
        self.size.store(size, Release);
        Ok(())
    }

    /// Makes the part of the last cluster of the disk after `size`, the end of the disk, read as zeroes.
    async fn zero_rest(&self, size: u64) -> Result<()> {
        let end = self.geometry.end(size);
        if size == end {
            return Ok(());
        }
        let backing = self.children.get(ChildIdx::BACKING).map_or(0, |edge| edge.size());
        match self.extent(size, end - size).await? {
            Extent::Data { host, len } => {
                self.file()?.write_zeroes(host, len, ZeroFlags::MAY_UNMAP).await
            }
            Extent::Unallocated { len } if backing > size => {
                let len = usize::try_from(len).unwrap_or(0);
                self.write_locked(size, IoBuf::zeroes(len)).await
            }
            Extent::Zero { .. } | Extent::Unallocated { .. } => Ok(()),
        }
    }

    /// Frees the clusters of the disk from offset `from` on, and the L2 tables that map only such clusters. The entries of
    /// these clusters and tables become 0.
    pub(super) async fn forget(&self, from: u64) -> Result<()> {
        let reach = self.geometry.table_reach();
        let first = self.l1_index(from);
        for index in first..self.geometry.l1_entries() {
            if self.l1_entry(index) == 0 {
                continue;
            }
            let Some(table) = self.table_offset(index)? else { continue };
            let start = index.saturating_mul(reach);
            self.forget_entries(from.max(start), start.saturating_add(reach)).await?;
            if from <= start {
                let cluster = self.cluster_at(table);
                self.set_l1_entry(index, 0);
                self.freed.add(cluster..cluster.saturating_add(self.geometry.table_clusters));
            }
        }
        Ok(())
    }

    /// Frees the clusters of the disk between `from` and `to`. One L2 table maps the range, and `to` is the end of the
    /// range that this table maps.
    async fn forget_entries(&self, from: u64, to: u64) -> Result<()> {
        let end = self.entry_end();
        let mut at = from;
        while at < to {
            let reach = self.slice_reach();
            let next = at.saturating_add(reach - at % reach).min(to);
            if let Some(slice) = self.pin_slice(at).await? {
                let (_, index) = self.slice_of(at);
                let mut freed = Vec::new();
                let mut change = slice.begin_change();
                for (index, word) in slice.words().iter().enumerate().skip(index) {
                    let entry = load(word);
                    if entry != 0 {
                        set(&mut change, index, 0);
                    }
                    let meaning = data_entry(self.geometry, self.first_cluster, entry, end);
                    if let Entry::At(host) = meaning {
                        freed.push(self.cluster_at(host));
                    }
                }
                drop(change);
                self.freed.add(freed);
            }
            at = next;
        }
        Ok(())
    }
}
