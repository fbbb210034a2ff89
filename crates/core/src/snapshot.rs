//! Internal snapshots: earlier states of a disk, stored inside its image.

use std::sync::Arc;

use crate::backend::no_medium;
use crate::driver::BoxFuture;
use crate::graph::observer;
use crate::{Backend, Errno, Error, ErrorKind, Node, Operations, Result};

/// Properties of an internal snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Identifier, unique in the image.
    pub id: String,
    /// Name chosen by the user. Several snapshots may have the same name.
    pub name: String,
    /// Time at which the snapshot was taken: seconds and nanoseconds since 1970-01-01.
    pub date: (u32, u32),
    /// VM clock in nanoseconds when the snapshot was taken.
    pub vm_clock: u64,
    /// Bytes of VM state saved with the snapshot.
    pub vm_state_size: u64,
    /// Number of instructions that the guest had executed, if the VM counted them.
    pub icount: Option<u64>,
    /// Size of the disk in bytes when the snapshot was taken, if the image stores this size.
    pub size: Option<u64>,
}

/// The interface of formats with internal snapshots. The functions of this module drain the node before each call, except
/// for [`Snapshots::list`]: during this call, requests may be in flight, but no control operation is in progress.
pub trait Snapshots: Send + Sync {
    /// All snapshots, in the order in which they were taken.
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>>;
    /// Whether the image was opened without its snapshots, because they could not be read. The open has reported this.
    fn are_left_out(&self) -> bool {
        false
    }
    /// Takes a snapshot. The driver chooses the snapshot's id, and stores the current size of the disk in the snapshot.
    fn create<'a>(&'a self, new: &'a SnapshotInfo) -> BoxFuture<'a, Result<()>>;
    /// Restores the state that the snapshot stores, including the disk's size.
    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Deletes a snapshot.
    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Makes a read-only node show the state that a snapshot stores, including the size of the disk, until the node is
    /// closed. The image does not change.
    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
}

fn of(node: &Node) -> Result<&dyn Snapshots> {
    node.driver().snapshots().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

/// Finds the node, at or below `node`, whose driver implements snapshots, and the nodes above it.
fn keeper(node: Arc<Node>) -> Result<(Arc<Node>, Vec<Arc<Node>>)> {
    crate::keeper::keeper(node, |driver| driver.snapshots().is_some())
}

/// The internal snapshots of a node's image. If the node only forwards requests, the snapshots of the node below are
/// returned. Control operations of the node wait until the snapshot table has been read.
///
/// # Errors
/// The errors of [`Backend::snapshots`].
pub async fn list(node: &Arc<Node>) -> Result<Vec<SnapshotInfo>> {
    let (keeper, _) = keeper(Arc::clone(node))?;
    let _control = keeper.control_lock().acquire().await;
    if keeper.users().is_closed() {
        return Err(no_medium());
    }
    of(&keeper)?.list().await
}

/// Whether the image of a node was opened without its snapshots ([`Snapshots::are_left_out`]).
pub fn are_left_out(node: &Arc<Node>) -> bool {
    let Ok((keeper, _)) = keeper(Arc::clone(node)) else { return false };
    keeper.driver().snapshots().is_some_and(Snapshots::are_left_out)
}

/// How a control operation finds its snapshot: by its id, or by a function that chooses from the list. An image may
/// reuse the id of a deleted snapshot. So the function is called only when the operation has exclusive use of the node.
enum Selection {
    Id(String),
    Choice(Choose),
}

/// Chooses a snapshot from the list and returns its id.
type Choose = Box<dyn FnOnce(&[SnapshotInfo]) -> Result<String>>;

impl Selection {
    fn by(choose: impl FnOnce(&[SnapshotInfo]) -> Result<String> + 'static) -> Self {
        Self::Choice(Box::new(choose))
    }

    /// The id. The caller has exclusive use of the node.
    async fn id(self, snapshots: &dyn Snapshots) -> Result<String> {
        match self {
            Self::Id(id) => Ok(id),
            Self::Choice(choose) => choose(&snapshots.list().await?),
        }
    }
}

impl Backend {
    /// The node whose driver implements snapshots: the root, or the node to which the root forwards all requests (a raw
    /// node over a qcow2 image).
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots.
    pub fn snapshot_node(&self) -> Result<Arc<Node>> {
        Ok(keeper(self.node()?)?.0)
    }

    /// The internal snapshots of the image.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots; the errors of the image's driver.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        list(&self.node()?).await
    }

    /// Takes an internal snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) without write permission; `ENOTSUP` if the format has no snapshots;
    /// the errors of the image's driver. After an error, the image has no new snapshot, with one exception: if the old header
    /// could not be restored, the snapshot may exist, and the image refuses further writes.
    pub async fn create_snapshot(&self, new: &SnapshotInfo) -> Result<()> {
        let new = new.clone();
        let (keeper, above) = keeper(self.node()?)?;
        let create = move |node: Arc<Node>| async move { of(&node)?.create(&new).await };
        self.graph()
            .run_exclusive_below(
                above,
                &keeper,
                self.while_writer(self.unless_blocked(Operations::SNAPSHOT, create)),
            )
            .await
    }

    /// Restores the state of the disk that the snapshot with this id stores.
    ///
    /// # Errors
    /// The errors of [`Backend::create_snapshot`]; when there is no such snapshot; `ENOTSUP` below a filter that must see all
    /// changes ([`DriverFactory::sees_all_changes`](crate::DriverFactory::sees_all_changes)).
    pub async fn apply_snapshot(&self, id: &str) -> Result<()> {
        self.apply_selected(Selection::Id(id.to_owned())).await
    }

    /// Like [`Backend::apply_snapshot`], for the snapshot whose id `choose` returns. `choose` receives the list of all
    /// snapshots. The list does not change until the snapshot has been applied.
    ///
    /// # Errors
    /// The errors of [`Backend::apply_snapshot`] and of `choose`.
    pub async fn apply_snapshot_by(
        &self,
        choose: impl FnOnce(&[SnapshotInfo]) -> Result<String> + 'static,
    ) -> Result<()> {
        self.apply_selected(Selection::by(choose)).await
    }

    async fn apply_selected(&self, selection: Selection) -> Result<()> {
        let (keeper, above) = keeper(self.node()?)?;
        let parents = above.clone();
        let apply = move |node: Arc<Node>| async move {
            check_unobserved(&node)?;
            let id = selection.id(of(&node)?).await?;
            let mut outcome = of(&node)?.apply(&id).await;
            // Update the nodes after a failure too: the driver may have changed the disk before it failed.
            changed_as_a_whole(&node);
            for parent in parents.iter().rev() {
                if let Some(refreshed) = parent.driver().refresh_size() {
                    outcome = outcome.and(refreshed.await.map(drop));
                }
                changed_as_a_whole(parent);
            }
            outcome
        };
        self.graph()
            .run_exclusive_below(
                above,
                &keeper,
                self.while_writer(self.unless_blocked(Operations::SNAPSHOT, apply)),
            )
            .await
    }

    /// Makes a read-only image show the state that the snapshot with this id stores, until the image is closed. The
    /// image does not change.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots, or below a filter that must see all changes; `EACCES` on a writable node;
    /// an error if there is no such snapshot; the errors of the image's driver.
    pub async fn load_snapshot(&self, id: &str) -> Result<()> {
        self.load_selected(Selection::Id(id.to_owned())).await
    }

    /// Like [`Backend::load_snapshot`], for the snapshot whose id `choose` returns.
    ///
    /// # Errors
    /// The errors of [`Backend::load_snapshot`] and of `choose`.
    pub async fn load_snapshot_by(
        &self,
        choose: impl FnOnce(&[SnapshotInfo]) -> Result<String> + 'static,
    ) -> Result<()> {
        self.load_selected(Selection::by(choose)).await
    }

    async fn load_selected(&self, selection: Selection) -> Result<()> {
        let node = self.node()?;
        of(&node)?;
        if !node.is_read_only() {
            return Err(Error::new(ErrorKind::Denied, "Device is not readonly").errno(Errno::ACCES));
        }
        let load = move |node: Arc<Node>| async move {
            check_unobserved(&node)?;
            let id = selection.id(of(&node)?).await?;
            of(&node)?.load(&id).await?;
            node.set_size(node.driver().size());
            Ok(())
        };
        self.graph().run_exclusive(&node, self.while_open(load)).await
    }

    /// Deletes the snapshot with this id.
    ///
    /// # Errors
    /// The errors of [`Backend::apply_snapshot`].
    pub async fn delete_snapshot(&self, id: &str) -> Result<()> {
        self.delete_selected(Selection::Id(id.to_owned())).await
    }

    /// Like [`Backend::delete_snapshot`], for the snapshot whose id `choose` returns. `choose` receives the list of all
    /// snapshots. The list does not change until the snapshot has been deleted.
    ///
    /// # Errors
    /// The errors of [`Backend::delete_snapshot`] and of `choose`.
    pub async fn delete_snapshot_by(
        &self,
        choose: impl FnOnce(&[SnapshotInfo]) -> Result<String> + 'static,
    ) -> Result<()> {
        self.delete_selected(Selection::by(choose)).await
    }

    async fn delete_selected(&self, selection: Selection) -> Result<()> {
        let (keeper, above) = keeper(self.node()?)?;
        let delete = move |node: Arc<Node>| async move {
            let id = selection.id(of(&node)?).await?;
            of(&node)?.delete(&id).await
        };
        self.graph()
            .run_exclusive_below(
                above,
                &keeper,
                self.while_writer(self.unless_blocked(Operations::SNAPSHOT, delete)),
            )
            .await
    }
}

/// Checks that no filter above `node` must see all changes: no request changes the disk when a snapshot is applied.
fn check_unobserved(node: &Arc<Node>) -> Result<()> {
    let Some(filter) = observer(node, None) else { return Ok(()) };
    let (name, driver) = (filter.name(), filter.factory().name());
    let text = format!(
        "A snapshot cannot replace the contents of a disk below the filter '{name}' ({driver}), which must see all changes"
    );
    Err(Error::unsupported(text).errno(Errno::OPNOTSUPP))
}

/// Takes the size of a node from its driver, and records a change of the entire disk in the node's bitmaps.
fn changed_as_a_whole(node: &Node) {
    node.set_size(node.driver().size());
    node.bitmaps().mark(0, node.size());
}
