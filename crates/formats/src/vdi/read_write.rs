//! Requests of vdi that differ from those of other formats with a block map. [`BlockImage`] has the others.

use oxblk_core::{Result, ZeroFlags};

use super::Vdi;
use crate::blocks::{BlockImage, Content, Extent};

impl Vdi {
    /// Makes a range of the disk read as zeroes. Its blocks are allocated, as in QEMU. Zeroes are written where the
    /// file may contain other data.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let flags = flags & ZeroFlags::MAY_UNMAP;
        self.change(offset, Content::Zeroes(len, flags)).await
    }

    /// Returns the space of the allocated parts of a range to the host. The blocks stay allocated.
    pub(super) async fn discard_guest(&self, offset: u64, len: u64) -> Result<()> {
        self.access.check_writable()?;
        let file = self.file()?;
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let extent = self.extent(at, end - at).await?;
            if let Extent::Data { host, len } = extent {
                let len = len.min(file.size().saturating_sub(host));
                if len > 0 {
                    file.discard(host, len).await?;
                }
            }
            at = at.saturating_add(extent.len());
        }
        Ok(())
    }
}
