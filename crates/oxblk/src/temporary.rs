//! Temporary snapshots. A temporary snapshot is an overlay in an unnamed file, which the system deletes when the file is
//! closed.
//!
//! All writes go to the overlay, so the base does not change. The overlay is never flushed, because it is not used after a
//! crash.

use std::sync::Arc;

use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Attachment, ChildIdx, Errno, Error, Graph, Node, OpenFlags, Options, Perm, Permissions, Result,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::{FILE, FileDriver, temporary};
use oxblk_ring::{Aio, File};

use crate::SECTOR;

/// Opens a temporary overlay whose backing file is `base`.
///
/// # Errors
/// If the temporary file cannot be created, if the overlay in it cannot be created or opened, or if `base` is too large
/// (`EFBIG`). It is also an error if another parent of `base` writes to `base`.
pub async fn overlay(graph: &Graph, base: &Arc<Node>, flags: OpenFlags) -> Result<Arc<Node>> {
    let file = File::from_fd(temporary()?, Aio::IoUring);
    let driver = Box::new(FileDriver::from_ring_file(file, 0));
    let writable = OpenFlags { unmap: true, ..OpenFlags::default() };
    let file = graph.add_node(None, &FILE, driver, writable)?;
    let opened = open_over(graph, &file, base, flags).await;
    if opened.is_err() {
        let _ = graph.release(file).await;
    }
    opened
}

async fn open_over(
    graph: &Graph,
    file: &Arc<Node>,
    base: &Arc<Node>,
    flags: OpenFlags,
) -> Result<Arc<Node>> {
    let mut options = Options::new();
    let size = base.size().checked_next_multiple_of(SECTOR);
    options.insert("size", size.ok_or_else(|| Error::from_errno(Errno::FBIG))?);
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let permissions = Permissions::sharing_all(taken);
    let name = ChildIdx::FILE.name();
    let attached = Attachment::new(file, "a temporary snapshot", name, permissions)?;
    let request =
        CreateRequest { target: CreateTarget::File(Arc::clone(attached.edge())), options };
    let created = match QCOW2.create(graph, request) {
        Some(created) => created.await,
        None => Err(Error::from_errno(Errno::OPNOTSUPP)),
    };
    drop(attached);
    created?;
    let mut options = Options::new();
    options.insert("driver", QCOW2.name());
    options.insert("file", file.name());
    options.insert("backing", base.name());
    // `force_share` is not needed: no other process can open the overlay, and `base` is already open.
    graph.open(options, OpenFlags { no_flush: true, force_share: false, ..flags }).await
}
