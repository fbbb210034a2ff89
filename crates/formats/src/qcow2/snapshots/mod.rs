//! Internal snapshots ("Snapshots"). Core drains the node while a snapshot is created, applied or deleted.
//!
//! | file | concern |
//! |---|---|
//! | `table` | reading and replacing the snapshot table |
//! | `references` | counting the references of an L1 table |
//! | `refcounts` | raising and lowering refcounts by these counts |
//! | `copied` | setting and clearing copied flags |
//! | `change` | creating, applying and deleting a snapshot |
//! | `expand` | replacing zero clusters of snapshots, for version 2 |
//! | `show` | reading a snapshot without changing the image |
//!
//! A crash at any point leaves either the old state or the new one. The step that decides is one write to the header,
//! which changes the location of the snapshot table or of the L1 table. Refcounts are raised before this write, and the
//! refcounts of lost references are lowered after it. In between, refcounts are too high, which causes leaks at worst.
//!
//! A copied flag is never set wrongly. It may be missing during the operation. For this reason the dirty bit is set
//! meanwhile, so that after a crash the next open repairs the flags.

mod change;
mod copied;
mod expand;
mod refcounts;
mod references;
mod show;
mod table;

use oxblk_core::snapshot::{SnapshotInfo, Snapshots};
use oxblk_core::{BoxFuture, Result};

use super::Qcow2;
pub(super) use references::Pass;
pub(super) use table::{TablePlace, V3_EXTRA, visit_snapshots};

impl Snapshots for Qcow2 {
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>> {
        Box::pin(async {
            let list = self.snapshot_list().await?;
            Ok(list.iter().map(table::describe).collect())
        })
    }

    fn create<'a>(&'a self, new: &'a SnapshotInfo) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.take_snapshot(new))
    }

    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.go_to_snapshot(id))
    }

    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.remove_snapshot(id))
    }

    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.show_snapshot(id))
    }
}
