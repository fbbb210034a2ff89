//! Guest writes that `Driver::map` cannot forward to a host offset: allocation and copy-on-write.
//!
//! A write that changes L2 entries holds the guest range lock on its clusters from the lookup until the entries are
//! changed. So two such writes to one cluster run one after the other, and writes to different clusters run concurrently.
//! Each run of clusters goes through these steps:
//!
//! 1. *reserve*: host clusters are taken out of the free map;
//! 2. *write*: the data is written, and around it the old contents of the guest clusters (copy-on-write);
//! 3. *count*: the refcounts of the host clusters become 1 in the cache (clusters of a data file have no refcounts);
//! 4. *link*: the L2 entries in the cache refer to the host clusters. Readers see the new data from this step on. The
//!    references of the old entries are passed to the write-back. The write-back lowers the refcounts of the old clusters
//!    after the new entries are on disk.

use oxblk_core::{BoxFuture, Result, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Qcow2;
use super::fill::length;
use super::layout::L2Entry;
use super::mapping::Extent;

/// Where data is written.
enum WriteTarget {
    /// In place, over existing data from this host offset on.
    Data(u64),
    /// Into the preallocated cluster of a zero cluster, at this host offset.
    Preallocated(u64),
    /// Into new clusters.
    New,
}

impl Qcow2 {
    /// Writes `data` to the guest disk at `offset`.
    pub(super) async fn write_guest(&self, offset: u64, data: IoBuf) -> Result<()> {
        self.image_state.check_writable()?;
        // A write in place needs no lock.
        if let Extent::Data { host, len, owned: true } =
            self.metadata.extent_to_write(offset, length(&data)).await?
            && len == length(&data)
        {
            point();
            return self.data.write_data(offset, host, data).await;
        }
        let end = self.geometry.cluster_end(offset.saturating_add(length(&data)));
        let _lock = self.guest.lock(self.geometry.cluster_start(offset)..end).await;
        self.write_locked(offset, data).await
    }

    /// The same as [`Self::write_guest`], for callers that hold the guest range lock.
    pub(super) async fn write_locked(&self, offset: u64, mut data: IoBuf) -> Result<()> {
        if self.geometry.extended_l2 {
            return self.write_subclusters(offset, data).await;
        }
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        // Host offset of the cluster behind the previous piece, if this piece was written to an allocated cluster.
        let mut behind = None;
        while !data.is_empty() {
            let (target, len) = self.write_target(at, length(&data)).await?;
            let piece = data.split_to(usize::try_from(len).unwrap_or(usize::MAX).min(data.len()));
            match target {
                WriteTarget::Data(host) => {
                    behind = Some(self.geometry.cluster_end(host.saturating_add(length(&piece))));
                    jobs.push(Box::pin(self.data.write_data(at, host, piece)));
                }
                WriteTarget::Preallocated(cluster) => {
                    behind = Some(cluster.saturating_add(self.geometry.cluster_size()));
                    jobs.push(Box::pin(self.write_preallocated(at, piece, cluster)));
                }
                WriteTarget::New => {
                    let behind = behind.take().map(|host| self.geometry.cluster_index(host));
                    jobs.push(Box::pin(self.write_new(at, piece, behind)));
                }
            }
            at = at.saturating_add(len);
        }
        run_all(jobs).await
    }

    /// The place for data at `offset`, and the length of the run from there on with the same kind of place.
    async fn write_target(&self, offset: u64, len: u64) -> Result<(WriteTarget, u64)> {
        let mut covered = 0_u64;
        while covered < len {
            let extent = self
                .metadata
                .extent_to_write(offset.saturating_add(covered), len - covered)
                .await?;
            match extent {
                Extent::Data { host, len, owned: true } if covered == 0 => {
                    return Ok((WriteTarget::Data(host), len));
                }
                Extent::Zero { host: Some(host), len, owned: true } if covered == 0 => {
                    return Ok((WriteTarget::Preallocated(self.geometry.cluster_start(host)), len));
                }
                Extent::Data { owned: true, .. }
                | Extent::Zero { host: Some(_), owned: true, .. } => break,
                other => covered = covered.saturating_add(other.len()),
            }
        }
        Ok((WriteTarget::New, covered.min(len)))
    }

    /// Writes `data` into the preallocated cluster at `host` of a guest cluster that reads as zeroes. A power cut before
    /// the L2 entry changes on disk has no visible effect, because the entry is still a zero entry.
    async fn write_preallocated(&self, offset: u64, data: IoBuf, host: u64) -> Result<()> {
        let first = self.geometry.cluster_start(offset);
        let whole = first..self.geometry.cluster_end(offset.saturating_add(length(&data)));
        let target = host.saturating_add(offset - first);
        self.fill(whole, offset, data, target, false).await?;
        self.metadata.link(first, 1, None, |_| L2Entry::data(host)).await
    }
}
