//! Zero writes and discards of vdi. [`BlockImage`] implements the other requests.

use oxblk_core::{Result, ZeroFlags};

use super::Vdi;
use crate::blocks::{BlockImage, Content, Extent};

impl Vdi {
    /// Makes a range of the disk read as zeroes. Unallocated blocks of the range are allocated, as in QEMU. Where the file
    /// may contain other data, it is overwritten with zeroes.
    pub(super) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let flags = flags & ZeroFlags::MAY_UNMAP;
        self.change(offset, Content::Zeroes(len, flags)).await
    }

    /// Passes the discard of the allocated parts of a range to the file. The blocks stay allocated.
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
