//! Reads that the fast path (`map`) cannot forward, and block status.

use futures_util::future::try_join_all;
use oxblk_core::{BoxFuture, ChildIdx, DebugEvent, Errno, Error, Result, Status, StatusFlags};
use oxblk_ring::IoBufMut;

use super::Qed;
use super::lookup::Extent;
use crate::blocks::length;

/// Maximum number of extents that are merged with the first one into one status.
const MAX_MERGED: u32 = 1 << 14;

impl Qed {
    /// Reads `buf.len()` bytes of the disk at `offset`.
    pub(super) async fn read_guest(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let mut pieces: Vec<BoxFuture<'_, Result<IoBufMut>>> = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let extent = self.extent(at, length(&buf)).await?;
            let len = usize::try_from(extent.len()).unwrap_or(usize::MAX).clamp(1, buf.len());
            let piece = buf.split_to(len);
            pieces.push(Box::pin(self.read_extent(at, extent, piece)));
            at = at.saturating_add(extent.len());
        }
        let mut parts = try_join_all(pieces).await?.into_iter();
        let mut whole = parts.next().unwrap_or_else(|| IoBufMut::new(0));
        for part in parts {
            whole.unsplit(part).map_err(|_| Error::from_errno(Errno::IO))?;
        }
        Ok(whole)
    }

    async fn read_extent(
        &self,
        offset: u64,
        extent: Extent,
        mut buf: IoBufMut,
    ) -> Result<IoBufMut> {
        match (extent, self.children.get(ChildIdx::BACKING)) {
            (Extent::Data { host, .. }, _) => {
                let file = self.file()?;
                file.debug_event(DebugEvent::ReadAio).await;
                file.read(host, buf).await
            }
            (Extent::Unallocated { .. }, Some(backing)) => {
                self.children.debug_event(ChildIdx::FILE, DebugEvent::ReadBackingAio).await;
                backing.read(offset, buf).await
            }
            (Extent::Unallocated { .. } | Extent::Zero { .. }, _) => {
                buf.fill(0);
                Ok(buf)
            }
        }
    }

    /// The block status at `offset`, for at most `len` bytes. Allocated clusters are reported as data.
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Status> {
        let first = self.extent(offset, len).await?;
        let mut covered = first.len();
        for _ in 0..MAX_MERGED {
            if covered >= len {
                break;
            }
            let next = self.extent(offset.saturating_add(covered), len - covered).await?;
            let continues = match (first, next) {
                (Extent::Data { host, .. }, Extent::Data { host: other, .. }) => {
                    host.saturating_add(covered) == other
                }
                (Extent::Zero { .. }, Extent::Zero { .. })
                | (Extent::Unallocated { .. }, Extent::Unallocated { .. }) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            covered = covered.saturating_add(next.len());
        }
        Ok(match first {
            Extent::Data { host, .. } => {
                let mut status = Status::stored(covered, ChildIdx::FILE, host);
                status.flags -= StatusFlags::RECURSE;
                status
            }
            Extent::Zero { .. } => Status::zero(covered),
            Extent::Unallocated { .. } => Status::unallocated(covered),
        })
    }
}
