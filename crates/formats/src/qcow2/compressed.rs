//! Compressed writes: each guest cluster becomes a deflate or zstd stream. The streams are packed one after another.
//!
//! Streams begin at any byte. The refcount of a host cluster is the number of streams that touch it. A stream may continue in
//! the next host cluster if that cluster is contiguous. [`Tail`] is the position of the next stream. Its lock is held for the
//! allocation and the refcount updates, not for compressing or writing. The streams of one request are stored in guest order. A
//! new stream joins a host cluster only while the cluster is in use: once all its streams are freed, the cluster belongs to the
//! allocator.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use futures_util::stream::{self, StreamExt as _};
use oxblk_core::{CompressedCluster, Errno, Error, Preallocation, Result, WriteFlags};
use oxblk_ring::perturb::point;
use oxblk_ring::{IoBuf, IoBufMut, Mutex as AsyncMutex};

use super::counted::Counted;
use super::dropped::ReleaseReason;
use super::layout::L2Entry;
use super::{Qcow2, compression};

/// An image file ends at a multiple of this many bytes.
const SECTOR: u64 = 512;
/// Number of clusters of one request that are compressed concurrently.
const SIDE_BY_SIDE: usize = 16;

/// The position of the next compressed cluster: behind the last stream, in the rest of its host cluster.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Held while a stream is placed.
    turn: AsyncMutex<()>,
    /// A byte offset in the file. A multiple of the cluster size (initially 0) means that no host cluster has space left.
    next: AtomicU64,
}

impl Tail {
    /// Whether the last stream ends in this host cluster.
    pub(super) fn is_in(&self, cluster: u64, cluster_bits: u32) -> bool {
        self.next.load(Acquire) >> cluster_bits == cluster
    }

    /// Call this before a host cluster is quarantined. No further stream is placed there.
    pub(super) fn leave(&self, cluster: u64, cluster_bits: u32) {
        let there = |next: u64| (next >> cluster_bits == cluster).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }

    /// The next stream goes to a new host cluster.
    pub(super) fn forget(&self) {
        self.next.store(0, Release);
    }

    /// As [`Self::leave`], for `count` host clusters from `cluster` on.
    pub(super) fn leave_run(&self, cluster: u64, count: u64, cluster_bits: u32) {
        let run = cluster..cluster.saturating_add(count);
        let there = |next: u64| run.contains(&(next >> cluster_bits)).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }
}

impl Qcow2 {
    /// Stores whole clusters compressed. The last cluster of the disk may be shorter.
    pub(super) async fn compress_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.facts.check_writable()?;
        self.check_compressed(offset, data.len())?;
        let size = self.geometry.cluster_size();
        let cluster = usize::try_from(size).unwrap_or(usize::MAX);
        let mut rest = data;
        let pieces = std::iter::from_fn(|| {
            (!rest.is_empty()).then(|| rest.split_to(cluster.min(rest.len())))
        });
        // The clusters are compressed concurrently and stored in order.
        let packed = pieces.map(|piece| Box::pin(self.pack_cluster(piece)));
        let mut packed = stream::iter(packed).buffered(SIDE_BY_SIDE);
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
        self.facts.check_writable()?;
        self.check_compressed(offset, cluster.plain.len())?;
        let end = offset.saturating_add(self.geometry.cluster_size());
        let _lock = self.guest.lock(offset..end).await;
        let Some(stream) = cluster.stream else {
            return self.write_locked(offset, cluster.plain).await;
        };
        let len = u64::try_from(stream.len()).unwrap_or(u64::MAX);
        self.table_before_data(offset, 1).await?;
        let placed = self.place_compressed(len).await?;
        let host = placed.host;
        let file = self.facts.file()?;
        let entry = L2Entry::compressed(self.geometry, host, len).ok_or_else(|| {
            Error::from_errno(Errno::FBIG).prefix("compressed cluster out of reach")
        })?;
        Arc::clone(&file).write(host, stream, WriteFlags::empty()).await?;
        self.link(offset, 1, None, |_| entry).await?;
        placed.keep();
        Ok(())
    }

    /// Extends the file to a whole sector, because the last stream may end at any byte. Core has drained the node.
    pub(super) async fn end_with_a_sector(&self) -> Result<()> {
        self.facts.check_writable()?;
        let file = self.facts.file()?;
        let size = file.size();
        let Some(end) = size.checked_next_multiple_of(SECTOR).filter(|end| *end > size) else {
            return Ok(());
        };
        if file.node().limits().grows { file.resize(end, Preallocation::Off).await } else { Ok(()) }
    }

    /// Whether a range can be stored compressed.
    fn check_compressed(&self, offset: u64, len: usize) -> Result<()> {
        if self.geometry.data_file {
            return Err(Error::from_errno(Errno::OPNOTSUPP));
        }
        let size = self.geometry.cluster_size();
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if !offset.is_multiple_of(size) || (!end.is_multiple_of(size) && end != self.facts.size()) {
            return Err(whole_clusters());
        }
        Ok(())
    }

    /// Allocates `len` bytes (less than a cluster) and counts one reference to each host cluster that they touch.
    async fn place_compressed(&self, len: u64) -> Result<Placed<'_>> {
        let bits = self.geometry.cluster_bits;
        let _turn = self.compressed_tail.turn.lock().await;
        let next = self.compressed_tail.next.load(Acquire);
        let end = self.geometry.cluster_end(next);
        if next < end
            && len <= end - next
            && let Some(shared) = self.share_tail(next).await?
        {
            point();
            self.compressed_tail.next.store(next.saturating_add(len), Release);
            return Ok(Placed { host: next, shared: Some(shared), new: None });
        }
        let mut run = self.reserve_to_use(1).await?;
        run.begin_write();
        let start = run.start() << bits;
        let shared = match next < end && start == end {
            true => self.share_tail(next).await?,
            false => None,
        };
        let new = self.count(run, ReleaseReason::Data).await?;
        let host = if shared.is_some() { next } else { start };
        self.compressed_tail.next.store(host.saturating_add(len), Release);
        Ok(Placed { host, shared, new: Some(new) })
    }

    /// Counts one more reference to the host cluster of the tail. Returns `None` if the cluster is no longer the tail's: all
    /// its streams may have been freed, and the cluster may hold something else by now. Code that frees the cluster calls
    /// [`Tail::leave`] before the cluster can be reused. So if the tail is unchanged after the reference was counted, the
    /// cluster is still valid.
    async fn share_tail(&self, next: u64) -> Result<Option<Counted<'_>>> {
        let cluster = next >> self.geometry.cluster_bits;
        if !self.refcounts.share(cluster).await? {
            return Ok(None);
        }
        let shared = self.refcounts.own_counted(cluster, ReleaseReason::Data);
        point();
        Ok(Some(shared).filter(|_| self.compressed_tail.next.load(Acquire) == next))
    }
}

/// The place of a stream, and the references to its host clusters, to which no entry refers yet.
struct Placed<'a> {
    /// Byte offset in the file.
    host: u64,
    /// The reference to the cluster in which an earlier stream ends.
    shared: Option<Counted<'a>>,
    /// The reference to a new cluster.
    new: Option<Counted<'a>>,
}

impl Placed<'_> {
    /// Call this when an entry refers to the stream.
    fn keep(self) {
        self.shared.into_iter().chain(self.new).for_each(Counted::keep);
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
