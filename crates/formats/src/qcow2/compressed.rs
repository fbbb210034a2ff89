//! Compressed writes: each guest cluster becomes a deflate or zstd stream, or is stored uncompressed if compression saves no
//! space. The streams are packed one after another.
//!
//! The streams of one request are stored in guest order. `clusters/tail` chooses the host offset of each stream.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use oxblk_core::{CompressedCluster, DebugEvent, Errno, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::layout::L2Entry;
use super::{Qcow2, compression};
use crate::file_len;

/// At the end of a series of compressed writes, the file is extended to a multiple of this many bytes.
const SECTOR: u64 = 512;
/// Maximum number of clusters of one request that are compressed concurrently.
const MAX_CONCURRENT: usize = 16;

impl Qcow2 {
    /// Compresses and stores whole clusters. The last cluster of the disk may be shorter.
    pub(super) async fn compress_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.image_state.check_writable()?;
        self.check_compressed(offset, data.len())?;
        let size = self.geometry.cluster_size();
        let cluster = usize::try_from(size).unwrap_or(usize::MAX);
        let mut rest = data;
        let pieces = std::iter::from_fn(|| {
            (!rest.is_empty()).then(|| rest.split_to(cluster.min(rest.len())))
        });
        // The clusters are compressed concurrently and stored in order.
        let packed = pieces.map(|piece| Box::pin(self.pack_cluster(piece)));
        let mut packed = stream::iter(packed).buffered(MAX_CONCURRENT);
        let mut at = offset;
        while let Some(cluster) = packed.next().await {
            self.store_cluster(at, cluster?).await?;
            at = at.saturating_add(size);
        }
        Ok(())
    }

    /// Compresses one cluster. The last cluster of the disk may be shorter.
    pub(super) async fn pack_cluster(&self, data: IoBuf) -> Result<CompressedCluster> {
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        if data.is_empty() || data.len() > size {
            return Err(whole_clusters());
        }
        let whole = if data.len() == size { data.clone() } else { padded(&data, size) };
        let method = self.compression;
        let stream = oxblk_ring::offload(move || compression::compress(method, &whole)).await?;
        Ok(CompressedCluster { plain: data, stream: stream.map(IoBuf::from) })
    }

    /// Stores one cluster that [`Self::pack_cluster`] has compressed. A cluster without a stream is stored uncompressed.
    pub(super) async fn store_cluster(
        &self,
        offset: u64,
        cluster: CompressedCluster,
    ) -> Result<()> {
        self.image_state.check_writable()?;
        self.check_compressed(offset, cluster.plain.len())?;
        let end = offset.saturating_add(self.geometry.cluster_size());
        let _lock = self.guest.lock(offset..end).await;
        let Some(stream) = cluster.stream else {
            return self.write_locked(offset, cluster.plain).await;
        };
        let len = u64::try_from(stream.len()).unwrap_or(u64::MAX);
        self.metadata.table_before_data(offset, 1).await?;
        let placed = self
            .clusters
            .place_compressed(len, async || self.metadata.write_back_if_needed().await)
            .await?;
        let host = placed.host;
        let file = self.image_state.file()?;
        let entry = L2Entry::compressed(self.geometry, host, len).ok_or_else(|| {
            Error::from_errno(Errno::FBIG).prefix("compressed cluster out of reach")
        })?;
        self.image_state.event(DebugEvent::L2UpdateCompressed).await;
        self.image_state.event(DebugEvent::WriteCompressed).await;
        Arc::clone(&file).write(host, stream, WriteFlags::empty()).await?;
        self.metadata.link(offset, 1, None, |_| entry).await?;
        placed.keep();
        Ok(())
    }

    /// Extends the file to a multiple of [`SECTOR`] bytes if the file can grow, because the last stream may end at any byte.
    /// `oxblk_core` calls this while no other request is in flight.
    pub(super) async fn end_with_a_sector(&self) -> Result<()> {
        self.image_state.check_writable()?;
        let file = self.image_state.file()?;
        let size = file.size();
        let Some(end) = size.checked_next_multiple_of(SECTOR).filter(|end| *end > size) else {
            return Ok(());
        };
        if file.node().limits().grows { file_len::extend(&file, end).await } else { Ok(()) }
    }

    /// Refuses a range that cannot be stored compressed.
    fn check_compressed(&self, offset: u64, len: usize) -> Result<()> {
        if self.geometry.data_file {
            return Err(Error::from_errno(Errno::OPNOTSUPP));
        }
        let size = self.geometry.cluster_size();
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if !offset.is_multiple_of(size)
            || (!end.is_multiple_of(size) && end != self.image_state.size())
        {
            return Err(whole_clusters());
        }
        Ok(())
    }
}

fn whole_clusters() -> Error {
    Error::invalid("Compressed writes must cover whole clusters")
}

fn padded(data: &[u8], size: usize) -> IoBuf {
    let mut whole = IoBufMut::zeroed(size);
    if let Some(place) = whole.get_mut(..data.len()) {
        place.copy_from_slice(data);
    }
    whole.freeze()
}
