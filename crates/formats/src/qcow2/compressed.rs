//! Compressed writes: each guest cluster becomes a deflate or zstd stream, packed one after the other.
//!
//! Streams begin at any byte. A host cluster that holds several has a refcount of as many; a stream may run on into
//! the next host cluster if that one follows. Where the next stream goes is [`Tail`], behind a lock that is held for
//! the allocation and the refcounts, not for compressing or writing.

use std::sync::Arc;

use futures_util::future::try_join_all;
use oxblk_core::{ChildIdx, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::layout::L2Entry;
use super::{Qcow2, compression};

/// Where the next compressed cluster goes: a byte offset in the file, up to the end of its host cluster. 0: nowhere yet.
#[derive(Debug, Default)]
pub(super) struct Tail(u64);

impl Qcow2 {
    /// Stores whole clusters (or what is left at the end of the disk) compressed.
    pub(super) async fn compress_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.check_writable()?;
        let size = self.geometry.cluster_size();
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let end = offset.saturating_add(len);
        if !offset.is_multiple_of(size) || (!end.is_multiple_of(size) && end != self.size()) {
            return Err(Error::invalid("Compressed writes must cover whole clusters"));
        }
        let cluster = usize::try_from(size).unwrap_or(usize::MAX);
        let count = data.len().div_ceil(cluster);
        let one = |index: usize| {
            let start = index.saturating_mul(cluster);
            let piece = data.slice(start..start.saturating_add(cluster).min(data.len()));
            let at = offset.saturating_add(u64::try_from(start).unwrap_or(0));
            Box::pin(self.compress_cluster(at, piece))
        };
        try_join_all((0..count).map(one)).await.map(drop)
    }

    async fn compress_cluster(&self, offset: u64, data: IoBuf) -> Result<()> {
        let size = usize::try_from(self.geometry.cluster_size()).unwrap_or(0);
        let whole = if data.len() == size { data } else { padded(&data, size) };
        let (method, input) = (self.compression, whole.clone());
        let packed = oxblk_ring::offload(move || compression::compress(method, &input)).await?;
        let end = offset.saturating_add(self.geometry.cluster_size());
        let _lock = self.guest.lock(offset..end).await;
        let Some(packed) = packed else {
            let room = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
            return self.write_locked(offset, whole.slice(..room.min(size))).await;
        };
        let len = u64::try_from(packed.len()).unwrap_or(u64::MAX);
        let host = self.place_compressed(len).await?;
        let file = self.children.require(ChildIdx::FILE)?;
        let entry = L2Entry::compressed(self.geometry, host, len)
            .ok_or_else(|| Error::from_errno(27).prefix("compressed cluster out of reach"))?;
        if let Err(error) =
            Arc::clone(&file).write(host, IoBuf::from(packed), WriteFlags::empty()).await
        {
            self.drop_entries(&[entry], false);
            return Err(error);
        }
        self.link(offset, 1, |_| entry).await
    }

    /// Allocates `len` bytes (less than a cluster) and counts one reference to each host cluster they touch.
    async fn place_compressed(&self, len: u64) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let mut tail = self.compressed_tail.lock().await;
        let room = self.cluster_end(tail.0) - tail.0;
        let shareable =
            room > 0 && self.refcounts.get(tail.0 >> bits).await? < self.refcounts.max();
        if shareable && len <= room {
            self.refcounts.add(tail.0 >> bits, 1).await?;
            let host = tail.0;
            tail.0 = host.saturating_add(len);
            return Ok(host);
        }
        let mut run = self.reserve(1).await?;
        run.begin_write();
        let start = run.start() << bits;
        let host = if shareable && start == self.cluster_end(tail.0) {
            self.refcounts.add(tail.0 >> bits, 1).await?;
            tail.0
        } else {
            start
        };
        self.refcounts.add(run.start(), 1).await?;
        run.keep();
        tail.0 = host.saturating_add(len);
        Ok(host)
    }
}

fn padded(data: &[u8], size: usize) -> IoBuf {
    let mut whole = IoBufMut::zeroed(size);
    if let Some(place) = whole.get_mut(..data.len()) {
        place.copy_from_slice(data);
    }
    whole.freeze()
}
