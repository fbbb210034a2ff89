//! Compressed writes: each guest cluster becomes a deflate or zstd stream, packed one after the other.
//!
//! Streams begin at any byte. A host cluster that holds several has a refcount of as many; a stream may run on into
//! the next host cluster if that one follows. Where the next stream goes is [`Tail`], behind a lock that is held for
//! the allocation and the refcounts, not for compressing or writing. A host cluster is shared only while it is in use:
//! once all its streams are gone it belongs to the allocator.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use oxblk_core::{ChildIdx, Error, Result, WriteFlags, run_all};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut, Mutex as AsyncMutex};

use super::layout::L2Entry;
use super::write_back::Was;
use super::{Qcow2, compression};

/// Where the next compressed cluster goes: behind the last one, up to the end of its host cluster.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Held while a stream is placed.
    turn: AsyncMutex<()>,
    /// A byte offset in the file; a multiple of the cluster size (0 at first) when there is no room.
    next: AtomicU64,
}

impl Tail {
    /// Whether the last stream ends in this host cluster.
    pub(super) fn is_in(&self, cluster: u64, cluster_bits: u32) -> bool {
        self.next.load(Acquire) >> cluster_bits == cluster
    }

    /// The host cluster is about to rest and will be handed out for something else: no stream goes there any more.
    pub(super) fn leave(&self, cluster: u64, cluster_bits: u32) {
        let there = |next: u64| (next >> cluster_bits == cluster).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }

    /// The same for `count` host clusters from `cluster` on.
    pub(super) fn leave_run(&self, cluster: u64, count: u64, cluster_bits: u32) {
        let run = cluster..cluster.saturating_add(count);
        let there = |next: u64| run.contains(&(next >> cluster_bits)).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }
}

impl Qcow2 {
    /// Stores whole clusters (or what is left at the end of the disk) compressed.
    pub(super) async fn compress_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.check_writable()?;
        if self.geometry.data_file {
            return Err(Error::from_errno(95));
        }
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
        run_all((0..count).map(one)).await
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
        self.table_before_data(offset, 1).await?;
        let host = self.place_compressed(len).await?;
        let file = self.children.require(ChildIdx::FILE)?;
        let entry = L2Entry::compressed(self.geometry, host, len)
            .ok_or_else(|| Error::from_errno(27).prefix("compressed cluster out of reach"))?;
        if let Err(error) =
            Arc::clone(&file).write(host, IoBuf::from(packed), WriteFlags::empty()).await
        {
            self.drop_entries(&[entry], Was::Data);
            return Err(error);
        }
        self.link(offset, 1, |_| entry).await
    }

    /// Allocates `len` bytes (less than a cluster) and counts one reference to each host cluster they touch.
    async fn place_compressed(&self, len: u64) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let _turn = self.compressed_tail.turn.lock().await;
        let next = self.compressed_tail.next.load(Acquire);
        let end = self.cluster_end(next);
        if next < end && len <= end - next && self.share_tail(next).await? {
            point();
            self.compressed_tail.next.store(next.saturating_add(len), Release);
            return Ok(next);
        }
        let mut run = self.reserve_to_use(1).await?;
        run.begin_write();
        let start = run.start() << bits;
        let follows = next < end && start == end && self.share_tail(next).await?;
        if let Err(error) = self.refcounts.add(run.start(), 1).await {
            if follows {
                self.drop_clusters(next >> bits, 1, Was::Data);
            }
            return Err(error);
        }
        run.keep();
        let host = if follows { next } else { start };
        self.compressed_tail.next.store(host.saturating_add(len), Release);
        Ok(host)
    }

    /// Counts one more reference to the host cluster of the tail, unless it is no longer the tail's: all that was in it
    /// may have been dropped, and it may hold something else by now. Whoever frees it leaves the tail first, so that a
    /// tail that is unchanged after the reference was counted is still good.
    async fn share_tail(&self, next: u64) -> Result<bool> {
        let cluster = next >> self.geometry.cluster_bits;
        if !self.refcounts.share(cluster).await? {
            return Ok(false);
        }
        point();
        if self.compressed_tail.next.load(Acquire) == next {
            return Ok(true);
        }
        self.drop_clusters(cluster, 1, Was::Data);
        Ok(false)
    }
}

fn padded(data: &[u8], size: usize) -> IoBuf {
    let mut whole = IoBufMut::zeroed(size);
    if let Some(place) = whole.get_mut(..data.len()) {
        place.copy_from_slice(data);
    }
    whole.freeze()
}
