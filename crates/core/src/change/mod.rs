//! Changes of the graph. A [`Change`] collects steps: users of nodes, children, permissions, the read-only state. Then either
//! all steps take effect or none of them.
//!
//! 1. The steps go into a [`draft::Draft`]: the differences between the graph as it is and as it will be. The graph itself
//!    does not change.
//! 2. [`Change::commit`] computes the permissions of all affected nodes in the draft, and checks them ([`permissions`]).
//! 3. The drivers of these nodes prepare: they take the file locks that the new permissions need, and keep the locks that the
//!    current permissions need.
//! 4. The draft becomes the graph, and the drivers release the locks that are no longer needed. These steps cannot fail.
//!
//! A failure before step 4 leaves the graph as it was: only the locks that were taken in step 3 are released. So no change
//! must be undone, and no other process can take a lock that is needed after a failure.
//!
//! One lock for each graph ([`ChangeLock`]) serialises steps 2 to 4. No step waits for I/O on an image. The caller
//! holds back requests that may use a replaced child, and no other change of children is planned at the same time.

mod attach;
mod draft;
mod frozen;
mod permissions;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

pub use attach::Attachment;
use draft::Draft;
pub use frozen::FrozenChain;

use crate::perm::{Perm, Permissions};
use crate::{ChildIdx, Edge, Error, Node, Result};

/// The lock that serialises changes in one graph. It is held during the calls of
/// [`prepare_permissions`](crate::Driver::prepare_permissions) and its counterparts, which do not wait for other nodes.
pub(crate) type ChangeLock = Arc<Mutex<()>>;

/// The steps of a change that is not made yet. Dropping this value makes no change.
pub(crate) struct Change {
    lock: ChangeLock,
    draft: Draft,
}

impl Change {
    /// A change without steps in the graph of `node`.
    pub(crate) fn of(node: &Node) -> Self {
        Self { lock: Arc::clone(node.change_lock()), draft: Draft::default() }
    }

    /// Makes `edge` a user of its node.
    pub(crate) fn attach(&mut self, edge: &Arc<Edge>) {
        self.draft.set_permissions(edge, edge.permissions());
        self.draft.add(edge);
    }

    /// Ends the use of a node through `edge`. An edge that does not use its node is ignored.
    pub(crate) fn detach(&mut self, edge: &Edge) {
        self.draft.remove(edge);
    }

    /// Changes the permissions of `edge`, which is the edge of a backend, a job or another user that is not a node. The
    /// permissions of child edges follow from those of the parents of the node. [`Self::release`] ignores an edge that no longer
    /// uses its node.
    pub(crate) fn set_permissions(&mut self, edge: &Arc<Edge>, permissions: Permissions) {
        self.draft.set_permissions(edge, permissions);
    }

    /// Sets the permissions that a child edge of `parent` shares in addition; see [`Edge::also_shared`].
    pub(crate) fn also_share(&mut self, parent: &Arc<Node>, edge: &Arc<Edge>, shared: Perm) {
        self.draft.also_share(parent, edge, shared);
    }

    /// Replaces a child of `parent`. The permissions on the new child follow from those of the parents of `parent`. `None` removes
    /// the child.
    pub(crate) fn replace_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        new: Option<&Arc<Node>>,
    ) {
        let old = self.draft.child(parent, child);
        let name = old.as_ref().map_or(parent.child_name(child), |old| old.name());
        let roles = old.as_ref().map_or_else(|| parent.roles_of(child), |old| old.roles());
        let edge = new.map(|new| {
            let user = format!("node '{}'", parent.name());
            Edge::unattached(Arc::clone(new), user, name, roles, Permissions::NONE)
        });
        if let Some(edge) = &edge {
            self.draft.add(edge);
        }
        self.draft.set_child(parent, child, edge);
    }

    /// Updates the permissions that `node` takes on its children.
    pub(crate) fn refresh(&mut self, node: &Arc<Node>) {
        self.draft.refresh(node);
    }

    /// Sets whether `node` is read-only.
    pub(crate) fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) {
        self.draft.set_read_only(node, read_only);
    }

    /// Makes the change. Returns the nodes that are no longer children of a parent whose child was replaced.
    ///
    /// # Errors
    /// `ENOMEDIUM` when the permissions of an edge change that no longer uses its node. When a replaced child is a frozen link
    /// ([`FrozenChain`]); when a node would be below itself; when a new user's node is closed; when a user takes write permission
    /// on a read-only node; when the permissions conflict with those of another user in this process, or (through file locks) in
    /// another process. After an error, nothing has changed.
    ///
    /// The caller holds back the requests that may use a replaced child.
    pub(crate) fn commit(mut self) -> Result<Vec<Arc<Node>>> {
        let lock = Arc::clone(&self.lock);
        let _changing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.draft.check_frozen()?;
        self.draft.check_cycles()?;
        let attached = self.draft.attached();
        let users = NewUsers::add(&attached)?;
        self.draft.check_users()?;
        let affected = permissions::compute(&mut self.draft);
        permissions::check(&self.draft, &affected)?;
        let prepared = permissions::Prepared::prepare(&self.draft, affected)?;
        users.keep();
        let replaced = self.draft.apply();
        prepared.commit();
        Ok(replaced)
    }

    /// Makes a change that only removes users and loosens permissions. Such a change cannot conflict with other users.
    pub(crate) fn release(mut self) {
        let lock = Arc::clone(&self.lock);
        let _changing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.draft.forget_former_users();
        let affected = permissions::compute(&mut self.draft);
        let released = permissions::Prepared::without_new_locks(&self.draft, affected);
        self.draft.apply();
        released.commit();
    }
}

/// Edges that have become users of their nodes. Dropping this value without [`Self::keep`] removes these users again. The change
/// lock is held, so no other change sees such a user, and no node closes meanwhile.
struct NewUsers<'a>(&'a [Arc<Edge>]);

impl<'a> NewUsers<'a> {
    /// # Errors
    /// When a node is closed.
    fn add(edges: &'a [Arc<Edge>]) -> Result<Self> {
        for (at, edge) in edges.iter().enumerate() {
            if let Err(error) = edge.node().users().add(edge) {
                drop(Self(edges.get(..at).unwrap_or_default()));
                return Err(error.on_node(edge.node().name()));
            }
        }
        Ok(Self(edges))
    }

    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for NewUsers<'_> {
    fn drop(&mut self) {
        for edge in self.0 {
            edge.node().users().remove(edge);
        }
    }
}

fn read_only(text: String) -> Error {
    Error::new(crate::ErrorKind::Denied, text).errno(crate::Errno::PERM)
}
