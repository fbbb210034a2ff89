//! Block status: describes the extents that the lookup in the L2 tables returns. Extents that continue each other are
//! merged.
//!
//! An allocated cluster counts as data, even if it is a hole in the file. A query of the holes of the file would
//! cost one system call per hole. So the file is queried only for a precise status, and only if the image has preallocated
//! metadata, because such an image has many allocated clusters that are holes.

use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{ChildIdx, Result, Status, StatusFlags, Want};

use super::Qcow2;
use super::mapping::Extent;

/// Values of [`Qcow2::preallocated`]. 0: not known yet.
const NOT_PREALLOCATED: u8 = 1;
const PREALLOCATED: u8 = 2;

/// Maximum number of extents that are merged with the first one.
const MAX_MERGED: u32 = 1 << 14;

impl Qcow2 {
    /// The status of the start of `offset..offset + len`.
    pub(super) async fn status(&self, offset: u64, len: u64, want: Want) -> Result<Status> {
        self.image_state.check_usable()?;
        let first = self.metadata.extent(offset, len).await?;
        let mut covered = first.len();
        for _ in 0..MAX_MERGED {
            if covered >= len {
                break;
            }
            let next = self.metadata.extent(offset.saturating_add(covered), len - covered).await?;
            if !continues(first, covered, next) {
                break;
            }
            covered = covered.saturating_add(next.len());
        }
        let mut status = describe(first, covered, self.image_state.data_child());
        if !self.data.is_plain() {
            // The host offset of an encrypted image must not be used for direct reads.
            (status.host, status.child) = (None, None);
            status.flags -= StatusFlags::OFFSET_VALID | StatusFlags::RECURSE;
        }
        let may_recurse = status.flags.contains(StatusFlags::RECURSE);
        if may_recurse && (want != Want::Precise || !self.is_preallocated().await) {
            status.flags -= StatusFlags::RECURSE;
        }
        Ok(status)
    }

    /// Whether the image has preallocated metadata. As in QEMU, this is assumed if the allocated size of the file is at
    /// least 10 %, and at least two clusters, smaller than the clusters that have a refcount. It is also assumed if the
    /// allocated size is unknown. The result is computed once.
    async fn is_preallocated(&self) -> bool {
        match self.preallocated.load(Relaxed) {
            NOT_PREALLOCATED => return false,
            PREALLOCATED => return true,
            _ => {}
        }
        // On an error, assume preallocation. The holes of the file are then queried: this is slower, but the status is correct.
        let found = self.compare_with_host().await.unwrap_or(true);
        self.preallocated.store(if found { PREALLOCATED } else { NOT_PREALLOCATED }, Relaxed);
        found
    }

    async fn compare_with_host(&self) -> Result<bool> {
        let file = self.image_state.file()?;
        let Some(stored) = file.node().driver().allocated_size() else { return Ok(true) };
        let cluster = self.geometry.cluster_size();
        let stored = stored / cluster;
        let enough = (stored.saturating_mul(10) / 9).max(stored.saturating_add(2));
        let clusters = file.size().div_ceil(cluster);
        Ok(enough <= clusters && self.clusters.uses_at_least(enough, clusters).await?)
    }
}

fn continues(first: Extent, covered: u64, next: Extent) -> bool {
    match (first, next) {
        (Extent::Data { host, .. }, Extent::Data { host: other, .. }) => {
            host.saturating_add(covered) == other
        }
        (Extent::Zero { host: None, .. }, Extent::Zero { host: None, .. })
        | (Extent::Unallocated { host: None, .. }, Extent::Unallocated { host: None, .. })
        | (Extent::Compressed { .. }, Extent::Compressed { .. }) => true,
        (Extent::Zero { host: Some(host), .. }, Extent::Zero { host: Some(other), .. })
        | (
            Extent::Unallocated { host: Some(host), .. },
            Extent::Unallocated { host: Some(other), .. },
        ) => host.saturating_add(covered) == other,
        _ => false,
    }
}

fn describe(extent: Extent, len: u64, data: ChildIdx) -> Status {
    match extent {
        Extent::Data { host, .. } => Status::stored(len, data, host),
        Extent::Zero { host, .. } => with_preallocated_host(Status::zero(len), data, host),
        Extent::Unallocated { host, .. } => {
            with_preallocated_host(Status::unallocated(len), data, host)
        }
        Extent::Compressed { .. } => {
            let mut status = Status::data(len);
            status.flags |= StatusFlags::COMPRESSED;
            status
        }
    }
}

/// Adds `host`, the offset of the preallocated cluster, to a status, if there is such a cluster.
fn with_preallocated_host(mut status: Status, data: ChildIdx, host: Option<u64>) -> Status {
    if host.is_some() {
        status.flags |= StatusFlags::OFFSET_VALID;
        status.host = host;
        status.child = Some(data);
    }
    status
}
