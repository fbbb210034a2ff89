//! Zero writes and discards. These requests free no cluster of the image. A zero write writes zeroes to allocated clusters,
//! and may release the host storage of these clusters. A discard discards allocated clusters in the file below.

use oxblk_core::{ChildIdx, Error, ErrorKind, Result, Want, ZeroFlags};

use super::Qed;
use super::header::ZERO_ENTRY;
use super::lookup::{Extent, load, set};

impl Qed {
    /// Makes a range of the disk read as zeroes. Clusters that are not allocated become zero clusters.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the range covers only a part of an unallocated cluster, and it is not certain that the
    /// rest of the cluster reads as zeroes. The caller must write zeroes as data in this case. Also the errors of requests to
    /// the image file.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        let end = offset.saturating_add(len);
        let clusters = self.geometry.start(offset)..self.geometry.end(end);
        let _lock = self.guest.lock(clusters).await;
        self.zero_locked(offset, end, flags & ZeroFlags::MAY_UNMAP).await
    }

    /// The same as [`Self::zero_guest`], for callers that hold the range lock.
    pub(super) async fn zero_locked(&self, from: u64, to: u64, flags: ZeroFlags) -> Result<()> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            let end = at.saturating_add(extent.len());
            match extent {
                Extent::Data { host, len } => {
                    self.file()?.write_zeroes(host, len, flags).await?;
                }
                Extent::Zero { .. } => {}
                Extent::Unallocated { .. } => self.zero_unallocated(at, end).await?,
            }
            at = end;
        }
        Ok(())
    }

    /// Turns the clusters of the range into zero clusters. The caller ensures that no data cluster is allocated for them.
    async fn zero_unallocated(&self, from: u64, to: u64) -> Result<()> {
        let (first, last) = (self.geometry.start(from), self.geometry.end(to));
        // The disk may end inside its last cluster.
        let rest = last.min(self.size().max(to));
        if !self.shows_zeroes(first, from).await? || !self.shows_zeroes(to, rest).await? {
            return Err(Error::new(ErrorKind::Unsupported, "Part of a cluster cannot become zero"));
        }
        self.set_zero_entries(first, last).await
    }

    /// Turns the unallocated clusters of a range into zero clusters. Other entries do not change. The caller holds the range
    /// lock.
    pub(super) async fn set_zero_entries(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            self.ensure_table(self.l1_index(at)).await?;
            let Some(slice) = self.pin_slice(at).await? else { continue };
            let reach = self.slice_reach();
            let end = at.saturating_add(reach - at % reach).min(to);
            let (_, first) = self.slice_of(at);
            let count = usize::try_from(self.geometry.index(end - at)).unwrap_or(usize::MAX);
            let mut change = slice.begin_change();
            for (index, word) in slice.words().iter().enumerate().skip(first).take(count) {
                if load(word) == 0 {
                    set(&mut change, index, ZERO_ENTRY);
                }
            }
            drop(change);
            at = end;
        }
        Ok(())
    }

    /// Whether the tables, and the block status of the backing chain, show that a range reads as zeroes. No data is read.
    async fn shows_zeroes(&self, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            let len = match (extent, self.children.get(ChildIdx::BACKING)) {
                (Extent::Zero { len } | Extent::Unallocated { len }, None)
                | (Extent::Zero { len }, Some(_)) => len,
                (Extent::Unallocated { len }, Some(backing)) if at >= backing.size() => len,
                (Extent::Unallocated { len }, Some(backing)) => {
                    let below = backing.chain_status(at, len, Want::Precise).await?;
                    if !below.is_zero() {
                        return Ok(false);
                    }
                    below.len.clamp(1, len)
                }
                (Extent::Data { .. }, _) => return Ok(false),
            };
            at = at.saturating_add(len);
        }
        Ok(true)
    }

    /// Discards allocated clusters in the file below, if the range covers them completely. The clusters stay allocated.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let end = offset.saturating_add(len);
        let from = self.geometry.end(offset);
        let to = if end >= self.size() { end } else { self.geometry.start(end) };
        let mut at = from;
        while at < to {
            let extent = self.extent(at, to - at).await?;
            if let Extent::Data { host, len } = extent {
                self.file()?.discard(host, len).await?;
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }
}
