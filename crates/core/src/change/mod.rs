//! Changes of the graph. A [`Change`] collects steps: users of nodes, children, permissions, the read-only state. Then either
//! all steps take effect or none of them.
//!
//! 1. [`Change::commit`] resolves the steps into a [`draft::Draft`]: the differences between the graph as it is and as it will
//!    be. The graph itself does not change.
//! 2. It computes the permissions of all affected nodes in the draft, and checks them ([`permissions`]).
//! 3. The drivers of these nodes prepare: they take the file locks that the new permissions need, and keep the locks that the
//!    current permissions need.
//! 4. The draft becomes the graph, and the drivers release the locks that are no longer needed. These steps cannot fail.
//!
//! A failure before step 4 leaves the graph as it was: only the locks that were taken in step 3 are released. So no change
//! must be undone, and no other process can take a lock that is needed after a failure.
//!
//! One lock for each graph ([`ChangeLock`]) serialises these steps. No step waits for I/O on an image. The caller
//! holds back requests that may use a replaced child or root. [`GraphChange`](crate::GraphChange) does this for the graph's
//! users.

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

use crate::backend::WeakBackend;
use crate::perm::{Perm, Permissions, Roles};
use crate::{Backend, ChildIdx, Edge, Error, Node, Result};

/// The lock that serialises changes in one graph. It is held during the calls of
/// [`prepare_permissions`](crate::Driver::prepare_permissions) and its counterparts, which do not wait for other nodes.
pub(crate) type ChangeLock = Arc<Mutex<()>>;

/// One step of a change. Steps are resolved under the change lock, so they see the graph as it is when the change is made.
type Step = Box<dyn FnOnce(&mut Draft) -> Result<()> + Send>;

/// The steps of a change that is not made yet. Dropping this value makes no change.
pub(crate) struct Change {
    lock: ChangeLock,
    steps: Vec<Step>,
}

impl Change {
    /// A change without steps in the graph with this change lock.
    pub(crate) fn new(lock: &ChangeLock) -> Self {
        Self { lock: Arc::clone(lock), steps: Vec::new() }
    }

    /// A change without steps in the graph of `node`.
    pub(crate) fn of(node: &Node) -> Self {
        Self::new(node.change_lock())
    }

    fn step(&mut self, step: impl FnOnce(&mut Draft) -> Result<()> + Send + 'static) {
        self.steps.push(Box::new(step));
    }

    /// Makes `edge` a user of its node.
    pub(crate) fn attach(&mut self, edge: &Arc<Edge>) {
        let edge = Arc::clone(edge);
        self.step(move |draft| {
            draft.attach(&edge);
            Ok(())
        });
    }

    /// Ends the use of a node through `edge`. An edge that does not use its node is ignored.
    pub(crate) fn detach(&mut self, edge: &Arc<Edge>) {
        let edge = Arc::clone(edge);
        self.step(move |draft| {
            draft.remove(&edge);
            Ok(())
        });
    }

    /// Takes the root node of `backend` away.
    pub(crate) fn remove_root(&mut self, backend: &Backend) {
        let backend = backend.clone();
        self.step(move |draft| {
            draft.set_root(backend, None);
            Ok(())
        });
    }

    /// Makes `node` the root node of `backend`. The backend keeps its permissions.
    pub(crate) fn set_root(&mut self, backend: &Backend, node: Arc<Node>) {
        let backend = backend.clone();
        self.step(move |draft| draft.move_root(backend, &node));
    }

    /// Makes `node` the root node of `backend`, which must have none.
    pub(crate) fn insert_root(&mut self, backend: &Backend, node: Arc<Node>) {
        let backend = backend.clone();
        self.step(move |draft| draft.insert_root(backend, &node));
    }

    /// Changes the permissions of `edge`, which is the edge of a backend, a job or another user that is not a node. The
    /// permissions of child edges follow from those of the parents of the node. [`Self::release`] ignores an edge that no longer
    /// uses its node.
    pub(crate) fn set_permissions(&mut self, edge: &Arc<Edge>, permissions: Permissions) {
        let edge = Arc::clone(edge);
        self.step(move |draft| {
            draft.set_permissions(&edge, permissions);
            Ok(())
        });
    }

    /// Changes the permissions that `backend` takes on its root node. `permissions` computes them from the current ones. The change
    /// fails with `ENOMEDIUM` if the backend has no root node then.
    pub(crate) fn set_backend_permissions(
        &mut self,
        backend: &Backend,
        permissions: impl Fn(Permissions) -> Permissions + Send + 'static,
    ) {
        let backend = backend.clone();
        self.step(move |draft| draft.set_backend_permissions(backend, permissions));
    }

    /// Gives `lent` back to `backend`, which has lent it to a job, as far as the backend still wants it. A closed backend is
    /// ignored.
    pub(crate) fn give_back(&mut self, backend: &WeakBackend, lent: Perm, shared: Perm) {
        let backend = backend.clone();
        self.step(move |draft| {
            if let Some(backend) = backend.upgrade() {
                draft.give_back(backend, lent, shared);
            }
            Ok(())
        });
    }

    /// Sets the permissions that a child edge of `parent` shares in addition; see [`Edge::also_shared`].
    pub(crate) fn also_share(&mut self, parent: &Arc<Node>, edge: &Arc<Edge>, shared: Perm) {
        let (parent, edge) = (Arc::clone(parent), Arc::clone(edge));
        self.step(move |draft| {
            draft.also_share(&parent, &edge, shared);
            Ok(())
        });
    }

    /// Replaces a child of `parent`. The permissions on the new child follow from those of the parents of `parent`. `None` removes
    /// the child.
    pub(crate) fn replace_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        new: Option<&Arc<Node>>,
    ) {
        let (parent, new) = (Arc::clone(parent), new.cloned());
        self.step(move |draft| draft.replace_child(&parent, child, new.as_ref()));
    }

    /// Adds a child that has no slot. `child` comes from [`Children::new_further`](crate::Children), `name` is the name that the
    /// parent gives to the child.
    pub(crate) fn add_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        name: &str,
        roles: Roles,
        node: &Arc<Node>,
    ) {
        let (parent, node, name) = (Arc::clone(parent), Arc::clone(node), name.to_owned());
        self.step(move |draft| draft.new_child(&parent, child, &name, roles, Some(&node)));
    }

    /// Moves the users of `old` that `which` accepts to `new`. Users below or in `new` stay, so `new` may have `old` as a child.
    /// Users that stay at their node (jobs, attachments) stay too.
    pub(crate) fn replace_node(
        &mut self,
        old: &Arc<Node>,
        new: &Arc<Node>,
        which: impl Fn(&Edge) -> bool + Send + 'static,
    ) {
        let (old, new) = (Arc::clone(old), Arc::clone(new));
        self.step(move |draft| draft.replace_node(&old, &new, which));
    }

    /// Moves the users of a filter to the node that the filter shows.
    pub(crate) fn remove_filter(&mut self, filter: &Arc<Node>) {
        let filter = Arc::clone(filter);
        self.step(move |draft| draft.remove_filter(&filter));
    }

    /// Updates the permissions that `node` takes on its children.
    pub(crate) fn refresh(&mut self, node: &Arc<Node>) {
        let node = Arc::clone(node);
        self.step(move |draft| {
            draft.refresh(&node);
            Ok(())
        });
    }

    /// Sets whether `node` is read-only.
    pub(crate) fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) {
        let node = Arc::clone(node);
        self.step(move |draft| {
            draft.set_read_only(&node, read_only);
            Ok(())
        });
    }

    /// Makes the change. Returns the nodes that have lost a user.
    ///
    /// # Errors
    /// `ENOMEDIUM` when the permissions of an edge change that no longer uses its node. When a replaced child is a frozen link
    /// ([`FrozenChain`]); when a node would be below itself; when a new user's node is closed; when a user takes write permission
    /// on a read-only node; when the permissions conflict with those of another user in this process, or (through file locks) in
    /// another process. After an error, nothing has changed.
    ///
    /// The caller holds back the requests that may use a replaced child or root.
    pub(crate) fn commit(self) -> Result<Vec<Arc<Node>>> {
        let Self { lock, steps } = self;
        // Both are dropped after the lock, because they may hold the last reference to a backend, whose drop takes the lock.
        let (mut draft, mut steps) = (Draft::default(), steps.into_iter());
        let _changing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        for step in steps.by_ref() {
            step(&mut draft)?;
        }
        draft.check_links()?;
        let attached = draft.attached();
        let users = NewUsers::add(&attached)?;
        draft.check_users()?;
        let affected = permissions::compute(&mut draft);
        permissions::check(&draft, &affected)?;
        let prepared = permissions::Prepared::prepare(&draft, affected)?;
        users.keep();
        let released = draft.apply();
        prepared.commit();
        Ok(released)
    }

    /// Makes a change that only removes users and loosens permissions. Such a change cannot conflict with other users.
    pub(crate) fn release(self) {
        let Self { lock, steps } = self;
        let (mut draft, mut steps) = (Draft::default(), steps.into_iter());
        let _changing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        for step in steps.by_ref() {
            if let Err(error) = step(&mut draft) {
                tracing::error!(%error, "cannot release a user of a block node");
            }
        }
        draft.forget_former_users();
        let affected = permissions::compute(&mut draft);
        let released = permissions::Prepared::without_new_locks(&draft, affected);
        draft.apply();
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
