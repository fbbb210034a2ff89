//! Block status: the extents of the lookup, joined where they go on.

use oxblk_core::{ChildIdx, Result, Status, StatusFlags};

use super::Qcow2;
use super::lookup::Extent;

/// Extents joined into one answer.
const JOIN: u32 = 1 << 14;

impl Qcow2 {
    /// The status of the start of `offset..offset + len`.
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Status> {
        self.check_usable()?;
        let first = self.extent(offset, len).await?;
        let mut covered = first.len();
        for _ in 0..JOIN {
            if covered >= len {
                break;
            }
            let next = self.extent(offset.saturating_add(covered), len - covered).await?;
            if !continues(first, covered, next) {
                break;
            }
            covered = covered.saturating_add(next.len());
        }
        Ok(describe(first, covered))
    }
}

fn continues(first: Extent, covered: u64, next: Extent) -> bool {
    match (first, next) {
        (Extent::Data { host, .. }, Extent::Data { host: other, .. }) => {
            host.saturating_add(covered) == other
        }
        (Extent::Zero { host: None, .. }, Extent::Zero { host: None, .. })
        | (Extent::Unallocated { .. }, Extent::Unallocated { .. })
        | (Extent::Compressed { .. }, Extent::Compressed { .. }) => true,
        (Extent::Zero { host: Some(host), .. }, Extent::Zero { host: Some(other), .. }) => {
            host.saturating_add(covered) == other
        }
        _ => false,
    }
}

fn describe(extent: Extent, len: u64) -> Status {
    match extent {
        Extent::Data { host, .. } => Status::mapped(len, ChildIdx::FILE, host),
        Extent::Zero { host: None, .. } => Status::zero(len),
        Extent::Zero { host: Some(host), .. } => {
            let mut status = Status::zero(len);
            status.flags |= StatusFlags::OFFSET_VALID;
            status.host = Some(host);
            status.child = Some(ChildIdx::FILE);
            status
        }
        Extent::Unallocated { .. } => Status::unallocated(len),
        Extent::Compressed { .. } => {
            let mut status = Status::data(len);
            status.flags |= StatusFlags::COMPRESSED;
            status
        }
    }
}
