//! Allocating space for compressed clusters. The compressed streams are packed one after another.
//!
//! A stream can begin at any byte. Each stream adds one reference to each host cluster that the stream touches. A stream
//! continues in a newly allocated host cluster if this cluster lies directly behind the current one. [`Tail`] is the position
//! of the next stream. The lock of the tail is held for the allocation and the refcount updates, but not for compressing or
//! writing. A new stream is added to a host cluster only while the cluster is in use. After all streams of a cluster are freed,
//! the allocator may reserve the cluster again.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use oxblk_core::{DebugEvent, Result};
use oxblk_ring::Mutex as AsyncMutex;
use oxblk_ring::perturb::point;

use super::Clusters;
use super::counted::Counted;
use super::dropped::ReleaseReason;

/// The position of the next stream: behind the last stream, in the unused part of the host cluster in which that stream ends.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Held while a stream is placed.
    lock: AsyncMutex<()>,
    /// A byte offset in the file. A multiple of the cluster size (initially 0) means that no host cluster has space left.
    next: AtomicU64,
}

impl Tail {
    /// Whether the position of the next stream lies in this host cluster.
    pub(super) fn is_in(&self, cluster: u64, cluster_bits: u32) -> bool {
        self.next.load(Acquire) >> cluster_bits == cluster
    }

    /// Call this before a host cluster is quarantined. No further stream is placed in this cluster.
    pub(super) fn close_cluster(&self, cluster: u64, cluster_bits: u32) {
        let there = |next: u64| (next >> cluster_bits == cluster).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }

    /// Forgets the position, so that the next stream goes to a new host cluster.
    pub(super) fn forget(&self) {
        self.next.store(0, Release);
    }

    /// Like [`Self::close_cluster`], but for `count` host clusters from `cluster` on.
    pub(super) fn close_run(&self, cluster: u64, count: u64, cluster_bits: u32) {
        let run = cluster..cluster.saturating_add(count);
        let there = |next: u64| run.contains(&(next >> cluster_bits)).then_some(0);
        let _ = self.next.fetch_update(AcqRel, Acquire, there);
    }
}

impl Clusters {
    /// Adds one reference to the host cluster that contains the tail's byte offset `next`. Returns `None` if the tail has left
    /// this cluster: all streams of the cluster may have been freed, and the cluster may already contain other data. Code that
    /// frees the cluster calls [`Tail::close_cluster`] before the cluster can be reused. So if the tail is unchanged after the
    /// reference was added, the cluster is still valid.
    async fn add_tail_reference(&self, next: u64) -> Result<Option<Counted<'_>>> {
        let cluster = next >> self.geometry.cluster_bits;
        if !self.add_reference_if_in_use(cluster).await? {
            return Ok(None);
        }
        let shared = self.own_reference(cluster, ReleaseReason::Data);
        point();
        Ok(Some(shared).filter(|_| self.tail.next.load(Acquire) == next))
    }

    /// Allocates `len` bytes (less than a cluster), and adds one reference to each host cluster that contains some of these
    /// bytes. If a new cluster is needed, runs `before_reserving` before the cluster is reserved.
    pub(in crate::qcow2) async fn place_compressed(
        &self,
        len: u64,
        before_reserving: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<Placed<'_>> {
        self.image_state.event(DebugEvent::ClusterAllocBytes).await;
        let bits = self.geometry.cluster_bits;
        let _guard = self.tail.lock.lock().await;
        let next = self.tail.next.load(Acquire);
        let end = self.geometry.cluster_end(next);
        if next < end
            && len <= end - next
            && let Some(shared) = self.add_tail_reference(next).await?
        {
            point();
            self.tail.next.store(next.saturating_add(len), Release);
            return Ok(Placed { host: next, shared: Some(shared), new: None });
        }
        before_reserving().await?;
        let mut run = self.reserve_to_use_behind(None, 1).await?;
        run.begin_write();
        let start = run.start() << bits;
        let shared = match next < end && start == end {
            true => self.add_tail_reference(next).await?,
            false => None,
        };
        let new = self.count(run, ReleaseReason::Data).await?;
        let host = if shared.is_some() { next } else { start };
        self.tail.next.store(host.saturating_add(len), Release);
        Ok(Placed { host, shared, new: Some(new) })
    }
}

/// The place of a stream to which no L2 entry refers yet, and the references to its host clusters.
pub(in crate::qcow2) struct Placed<'a> {
    /// Byte offset in the file.
    pub(in crate::qcow2) host: u64,
    /// The reference to the cluster in which an earlier stream ends.
    shared: Option<Counted<'a>>,
    /// The reference to a new cluster.
    new: Option<Counted<'a>>,
}

impl Placed<'_> {
    /// Call this when an L2 entry refers to the stream.
    pub(in crate::qcow2) fn keep(self) {
        self.shared.into_iter().chain(self.new).for_each(Counted::keep);
    }
}
