//! Internal snapshots ("Snapshots"). Core has drained the node while one is taken, applied or removed.
//!
//! | file | concern |
//! |---|---|
//! | `table` | the snapshot table: reading it, and putting another in its place |
//! | `references` | what an L1 table reaches: counting it |
//! | `refcounts` | raising and lowering refcounts by what was counted |
//! | `copied` | the claims of entries to be alone with their cluster |
//! | `change` | taking, applying, removing |
//! | `expand` | snapshots without zero clusters, for version 2 |
//! | `show` | looking at one without changing the image |
//!
//! A crash at any point leaves the old state or the new one. The step that decides is one write to the header: of the
//! snapshot table's place, or of the L1 table's. Before it, refcounts are raised; after it, those of what is no longer
//! referred to are lowered. In between they are too high, which leaks at worst. Entries claim to be alone with their
//! cluster at no time when they are not; that some do not claim it though they are is what the dirty bit is set for
//! meanwhile, so that the next to open the image puts it right.

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
