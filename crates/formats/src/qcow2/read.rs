//! Reads that `Driver::map` cannot forward to a child, for example because the metadata is not cached, or because the data
//! is compressed or encrypted.

use futures_util::future::try_join_all;
use oxblk_core::{BoxFuture, ChildIdx, DebugEvent, Errno, Error, Result};
use oxblk_ring::IoBufMut;

use super::mapping::Extent;
use super::{Qcow2, compression};

impl Qcow2 {
    /// Reads `buf.len()` bytes of the guest disk at `offset`.
    pub(super) async fn read_guest(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        self.image_state.check_usable()?;
        let mut pieces: Vec<BoxFuture<'_, Result<IoBufMut>>> = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let left = u64::try_from(buf.len()).unwrap_or(u64::MAX);
            let extent = self.metadata.extent(at, left).await?;
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
        match extent {
            Extent::Data { host, .. } => self.data.read_data(offset, host, buf).await,
            Extent::Unallocated { .. } => {
                match self.image_state.children().get(ChildIdx::BACKING) {
                    // VM state is never read from the backing file, even if the backing file is longer than this disk.
                    Some(backing) if offset < self.image_state.vm_state_offset() => {
                        self.image_state.event(DebugEvent::ReadBackingAio).await;
                        backing.read(offset, buf).await
                    }
                    _ => {
                        buf.fill(0);
                        Ok(buf)
                    }
                }
            }
            Extent::Zero { .. } => {
                buf.fill(0);
                Ok(buf)
            }
            Extent::Compressed { host, stored, .. } => {
                let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
                if buf.len() == size {
                    return self.read_compressed(offset, host, stored, buf).await;
                }
                let cluster = IoBufMut::new(size);
                let cluster = self.read_compressed(offset, host, stored, cluster).await?;
                let within = usize::try_from(self.geometry.offset_in_cluster(offset)).unwrap_or(0);
                let wanted = cluster.get(within..).and_then(|rest| rest.get(..buf.len()));
                buf.copy_from_slice(wanted.ok_or_else(|| Error::from_errno(Errno::IO))?);
                Ok(buf)
            }
        }
    }

    /// Fills `cluster` with the contents of a compressed cluster.
    async fn read_compressed(
        &self,
        offset: u64,
        host: u64,
        stored: u64,
        mut cluster: IoBufMut,
    ) -> Result<IoBufMut> {
        // The length is at most two clusters, because an L2 entry cannot store a larger length.
        let len = usize::try_from(stored).map_err(|_| Error::from_errno(Errno::IO))?;
        let file = self.image_state.file()?;
        self.image_state.event(DebugEvent::ReadCompressed).await;
        let data = file.read(host, IoBufMut::new(len)).await?;
        let method = self.compression;
        let cluster = oxblk_ring::offload(move || {
            compression::decompress(method, &data, &mut cluster).map(|()| cluster)
        })
        .await;
        cluster.map_err(|error| error.at(offset))
    }
}
