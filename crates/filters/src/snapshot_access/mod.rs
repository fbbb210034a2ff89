//! The driver `snapshot-access`: shows a disk as it was at an earlier point in time. The child `file` is a filter that keeps
//! the old contents (`copy-before-write`).
//!
//! The contents cannot be written. A discard tells the filter that a range is no longer needed.

use std::sync::Arc;

use oxblk_core::{
    BoxFuture, ChildIdx, ChildSpec, ChildrenRef, Driver, DriverFactory, DriverKind, Edge, Error,
    Limits, OpenContext, Perm, Permissions, Result, Roles, SnapshotAccess, Status, Want,
    WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

/// The driver `snapshot-access`.
pub static SNAPSHOT_ACCESS: SnapshotAccessFactory = SnapshotAccessFactory;

/// Opens snapshot-access nodes.
#[derive(Debug)]
pub struct SnapshotAccessFactory;

const FILE: ChildSpec =
    ChildSpec { child: ChildIdx::FILE, name: "file", roles: Roles::DATA.union(Roles::PRIMARY) };

impl DriverFactory for SnapshotAccessFactory {
    fn name(&self) -> &'static str {
        "snapshot-access"
    }

    /// The node does not show the present data of its child, so it is no filter.
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[FILE]
    }

    fn needs_child(&self) -> bool {
        true
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.file()?;
            let size = match file.node().driver().snapshot_access() {
                Some(snapshot) => snapshot.size(),
                None => file.size(),
            };
            let children = Arc::clone(&context.children);
            Ok(Box::new(SnapshotAccessNode { children, size }) as Box<dyn Driver>)
        })
    }
}

/// An open snapshot-access node.
struct SnapshotAccessNode {
    children: ChildrenRef,
    /// The size of the snapshot in bytes. It does not change.
    size: u64,
}

impl SnapshotAccessNode {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }
}

/// The old contents that the child keeps.
fn snapshot(file: &Edge) -> Result<&dyn SnapshotAccess> {
    let snapshot = file.node().driver().snapshot_access();
    snapshot.ok_or_else(|| {
        let driver = file.node().factory().name();
        Error::unsupported(format!("The driver '{driver}' keeps no snapshot"))
            .on_node(file.node().name())
    })
}

impl Driver for SnapshotAccessNode {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { snapshot(&*self.file()?)?.read(offset, buf).await })
    }

    fn write(&self, _: u64, _: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(Error::unsupported("A snapshot cannot be written"))))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { snapshot(&*self.file()?)?.discard(offset, len).await }))
    }

    /// Nothing is written, so there is nothing to flush.
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(std::future::ready(Ok(()))))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(
            async move { snapshot(&*self.file()?)?.block_status(offset, len, want).await },
        ))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|file| file.node().limits());
        let alignment = below.map_or(1, |below| below.request_alignment);
        Limits { request_alignment: alignment, ..Limits::default() }
    }

    /// As in QEMU, the name of the disk stands for the node.
    fn filename(&self) -> Option<String> {
        self.file().ok()?.node().filename()
    }

    /// The child must keep the old contents even if nothing reads them yet. The snapshot does not depend on present data, so other
    /// users may change it.
    fn child_permissions(&self, _child: ChildIdx, _parents: Permissions) -> Option<Permissions> {
        Some(Permissions::sharing_all(Perm::CONSISTENT_READ))
    }
}
