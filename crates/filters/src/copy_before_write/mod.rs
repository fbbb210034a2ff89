//! The filter `copy-before-write`: keeps the contents that a disk has at one point in time. Before a cluster changes for the first
//! time, the filter copies its old data to the child `target`.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | opening a node |
//! | `options` | the options |
//! | `clusters` | which clusters are copied, and which are accessible |
//! | `copying` | copying clusters before they change |
//! | `deadline` | the time limit of a copy |
//! | `snapshot` | reading the old contents |
//!
//! The point in time is the moment at which the filter becomes the parent of all writers of `file`: when it is opened, or
//! when it is inserted above a node in use. A change of the graph drains the node, so no write is in flight at this moment.
//!
//! A change of clusters that are not copied yet has these steps:
//!
//! 1. Lock the clusters (`Snapshot::copies`). So a cluster is copied once, and a change that overlaps waits for the copy.
//! 2. Copy the clusters, and mark them as copied. From now on, reads of the snapshot use the target.
//! 3. Wait for the reads of the snapshot that read these clusters from `file` (`Snapshot::reads`).
//! 4. Mark the clusters as ready, and release the lock. Changes of ready clusters need no further step.
//! 5. Change the disk.
//!
//! A write with `UNCHANGED` writes the data that the disk already has, so it copies nothing.
//!
//! A read of the snapshot that finds a cluster not copied takes a shared lock of its range in `Snapshot::reads`, looks again, and
//! then reads `file`. So either step 3 waits for the read, or the read finds the cluster copied. Reads never wait for a copy.
//!
//! Locks: first `Snapshot::copies`, then `Snapshot::reads`. A holder waits only for requests to the children.

mod clusters;
mod copying;
mod deadline;
mod factory;
mod options;
mod snapshot;

use std::sync::Arc;

use oxblk_core::driver::{Drain, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, Limits, MapOp, Perm, Permissions, Preallocation, Result,
    SnapshotAccess, Step, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

pub use factory::{COPY_BEFORE_WRITE, CopyBeforeWriteFactory};

use crate::below::Below;
use snapshot::Snapshot;

/// An open copy-before-write node.
struct CopyBeforeWrite {
    below: Below,
    snapshot: Arc<Snapshot>,
}

impl CopyBeforeWrite {
    /// Call this before a range of the disk changes.
    async fn prepare(&self, offset: u64, len: u64) -> Result<()> {
        self.snapshot.prepare_change(offset..offset.saturating_add(len)).await
    }
}

impl Driver for CopyBeforeWrite {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let end = offset.saturating_add(len);
        if op == MapOp::Write && self.snapshot.must_copy(&(offset..end)) {
            return Step::Slow;
        }
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.below.edge()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if !flags.contains(WriteFlags::UNCHANGED) {
                self.prepare(offset, u64::try_from(data.len()).unwrap_or(u64::MAX)).await?;
            }
            self.below.edge()?.write(offset, data, flags).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            if !flags.contains(ZeroFlags::UNCHANGED) {
                self.prepare(offset, len).await?;
            }
            self.below.edge()?.write_zeroes(offset, len, flags).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.prepare(offset, len).await?;
            self.below.edge()?.discard(offset, len).await
        }))
    }

    /// The guest does not wait for the target. The target is flushed when the node is closed.
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.below.edge()?.flush().await }))
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, ..self.below.limits() }
    }

    /// As in QEMU, the name of the disk stands for the node, although it does not contain the target.
    fn filename(&self) -> Option<String> {
        self.below.edge().ok()?.node().filename()
    }

    fn child_permissions(&self, child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        Some(match child {
            ChildIdx::FILE => file_permissions(parents),
            _ => target_permissions(),
        })
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.snapshot.target()?.flush().await }))
    }

    fn drain(&self) -> Option<&dyn Drain> {
        Some(self)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn snapshot_access(&self) -> Option<&dyn SnapshotAccess> {
        Some(&*self.snapshot)
    }
}

/// Requests wait only for the host. But a copy may go on after its time limit has passed and its request has ended.
impl Drain for CopyBeforeWrite {
    fn begin(&self) {}

    fn end(&self) {}

    fn idle(&self) -> Option<BoxFuture<'_, ()>> {
        Some(Box::pin(self.snapshot.background.idle()?))
    }
}

/// The snapshot keeps its size, so the end of a disk that becomes shorter is copied.
impl Resize for CopyBeforeWrite {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.snapshot.prepare_change(size..u64::MAX).await?;
            self.below.edge()?.resize(size, preallocation).await
        })
    }
}

/// The permissions on the disk. A node with users reads old data. The graph does not share write permission, because the filter
/// would miss the change ([`DriverFactory::sees_all_changes`](oxblk_core::DriverFactory::sees_all_changes)).
fn file_permissions(parents: Permissions) -> Permissions {
    if parents == Permissions::NONE {
        return parents;
    }
    Permissions { taken: parents.taken | Perm::CONSISTENT_READ, ..parents }
}

fn target_permissions() -> Permissions {
    Permissions { taken: Perm::WRITE, shared: Perm::all() - Perm::RESIZE }
}
