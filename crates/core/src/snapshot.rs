//! Internal snapshots: states of a disk kept inside its image.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::{Backend, ChildIdx, Errno, Error, ErrorKind, Node, Result};

/// What is told of an internal snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image.
    pub id: String,
    /// Chosen by the user; need not be unique.
    pub name: String,
    /// When it was taken: seconds and nanoseconds since the epoch.
    pub date: (u32, u32),
    /// Guest time in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state saved with it.
    pub vm_state_size: u64,
    /// Instructions that the guest had executed, where they were counted.
    pub icount: Option<u64>,
    /// The disk's size then, in bytes, where the image tells it.
    pub size: Option<u64>,
}

/// Offered by formats that keep snapshots. Core has drained the node of other requests.
pub trait Snapshots: Send + Sync {
    /// All of them, in the order in which they were taken.
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>>;
    /// Takes one. Its id and the disk's size are chosen by the driver.
    fn create<'a>(&'a self, new: &'a SnapshotInfo) -> BoxFuture<'a, Result<()>>;
    /// Makes the disk what it was, size included.
    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Removes one.
    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Makes a node that is read-only show what one holds, size included, until it is closed. The image does not change.
    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
}

fn of(node: &Node) -> Result<&dyn Snapshots> {
    node.driver().snapshots().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

/// The node that keeps the snapshots of `node`, and before it those that pass everything on to it, `node` first.
fn keeper(node: Arc<Node>) -> Result<(Arc<Node>, Vec<Arc<Node>>)> {
    let (mut keeper, mut above) = (node, Vec::new());
    while keeper.driver().snapshots().is_none() {
        let passes = keeper.factory().passes_permissions();
        let below = keeper.child(ChildIdx::FILE).filter(|_| passes);
        let below = below.ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))?;
        above.push(std::mem::replace(&mut keeper, below));
    }
    Ok((keeper, above))
}

/// The internal snapshots of the image of a node: its own, or those of the node that it passes everything on to.
///
/// # Errors
/// As [`Backend::snapshots`].
pub async fn list(node: &Arc<Node>) -> Result<Vec<SnapshotInfo>> {
    let (keeper, _) = keeper(Arc::clone(node))?;
    of(&keeper)?.list().await
}

impl Backend {
    /// The node that keeps the snapshots of the image: the root, or the node that the root passes everything on to (a
    /// raw image over a qcow2 one).
    ///
    /// # Errors
    /// `ENOTSUP` where the format has no snapshots.
    pub fn snapshot_node(&self) -> Result<Arc<Node>> {
        Ok(keeper(self.node()?)?.0)
    }

    /// The internal snapshots of the image.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has none; as the image reports.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        list(&self.node()?).await
    }

    /// Takes an internal snapshot.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has none; as the image reports. Nothing has changed then.
    pub async fn create_snapshot(&self, new: &SnapshotInfo) -> Result<()> {
        let new = new.clone();
        let (keeper, above) = keeper(self.node()?)?;
        let create = move |node: Arc<Node>| async move { of(&node)?.create(&new).await };
        self.graph().alone_with_below(above, &keeper, create).await
    }

    /// Makes the disk what it was when the snapshot of this id was taken.
    ///
    /// # Errors
    /// As [`Backend::create_snapshot`], and when there is no such snapshot.
    pub async fn apply_snapshot(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        let (keeper, above) = keeper(self.node()?)?;
        let parents = above.clone();
        let apply = move |node: Arc<Node>| async move {
            let applied = of(&node)?.apply(&id).await;
            // Also after a failure: it may have come late.
            changed_as_a_whole(&node);
            for parent in parents.iter().rev() {
                if let Some(refreshed) = parent.driver().refresh_size() {
                    refreshed.await?;
                }
                changed_as_a_whole(parent);
            }
            applied
        };
        self.graph().alone_with_below(above, &keeper, apply).await
    }

    /// Has a read-only image show what the snapshot of this id holds, until it is closed. The image does not change.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has no snapshots, `EACCES` on a node that can be written, and when there is no such
    /// snapshot.
    pub async fn load_snapshot(&self, id: &str) -> Result<()> {
        let node = self.node()?;
        of(&node)?;
        if !node.is_read_only() {
            return Err(Error::new(ErrorKind::Denied, "Device is not readonly").errno(Errno::ACCES));
        }
        let id = id.to_owned();
        let load = move |node: Arc<Node>| async move {
            of(&node)?.load(&id).await?;
            node.set_size(node.driver().size());
            Ok(())
        };
        self.graph().run_exclusive(&node, load).await
    }

    /// Removes the snapshot of this id.
    ///
    /// # Errors
    /// As [`Backend::apply_snapshot`].
    pub async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        let (keeper, above) = keeper(self.node()?)?;
        let delete = move |node: Arc<Node>| async move { of(&node)?.delete(&id).await };
        self.graph().alone_with_below(above, &keeper, delete).await
    }
}

/// Takes the size of a node from its driver, and has its bitmaps record that all of it may have changed.
fn changed_as_a_whole(node: &Node) {
    node.set_size(node.driver().size());
    node.bitmaps().mark(0, node.size());
}
