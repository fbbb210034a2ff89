//! Attaching users to nodes, and ending the use of nodes.

use std::sync::Arc;

use super::Change;
use crate::perm::{Permissions, Roles};
use crate::{ChildIdx, ChildSpec, Children, Edge, Node, Result};

impl Edge {
    /// Creates a user of `node`. `roles` are empty if the user is not a node. See [`Attachment::new`].
    ///
    /// # Errors
    /// The errors of [`Attachment::new`].
    fn attach(
        node: Arc<Node>,
        user: impl Into<String>,
        name: impl Into<String>,
        roles: Roles,
        permissions: Permissions,
    ) -> Result<Arc<Self>> {
        let edge = Self::unattached(node, user, name, roles, permissions);
        let mut change = Change::of(edge.node());
        change.attach(&edge);
        change.commit()?;
        Ok(edge)
    }

    /// Changes the permissions of a user that is not a node.
    ///
    /// # Errors
    /// The errors of [`Attachment::new`]; `ENOMEDIUM` if the edge no longer uses its node. After an error, nothing has changed.
    pub(crate) fn set_permissions(self: &Arc<Self>, permissions: Permissions) -> Result<()> {
        let mut change = Change::of(self.node());
        change.set_permissions(self, permissions);
        change.commit().map(drop)
    }

    /// Removes this edge from the users of the node and releases the edge's permissions. The node lives as long as
    /// references to it exist.
    pub(crate) fn detach(self: &Arc<Self>) {
        let mut change = Change::of(self.node());
        change.detach(self);
        change.release();
    }
}

impl Children {
    /// Makes `node` a child of a node that is being opened.
    ///
    /// # Errors
    /// The errors of [`Attachment::new`].
    pub(crate) fn attach(
        &self,
        parent: &str,
        spec: ChildSpec,
        node: &Arc<Node>,
        permissions: Permissions,
    ) -> Result<()> {
        self.attach_as(parent, spec.child, spec.name, spec.roles, node, permissions)
    }

    /// Like [`Self::attach`], for any child.
    ///
    /// # Errors
    /// The errors of [`Attachment::new`].
    pub(crate) fn attach_as(
        &self,
        parent: &str,
        child: ChildIdx,
        name: &str,
        roles: Roles,
        node: &Arc<Node>,
        permissions: Permissions,
    ) -> Result<()> {
        let user = format!("node '{parent}'");
        let edge = Edge::attach(Arc::clone(node), user, name, roles, permissions)?;
        self.set(child, Some(edge));
        Ok(())
    }

    /// Removes all children. Returns their nodes, the last child first.
    pub(crate) fn detach(&self) -> Vec<Arc<Node>> {
        let mut edges = self.take();
        edges.reverse();
        edges
            .into_iter()
            .map(|edge| {
                edge.detach();
                Arc::clone(edge.node())
            })
            .collect()
    }
}

/// The use of a node by something that is neither a node nor a backend: the creation of an image, or a job that only needs the
/// node to stay as it is. Requests go through the [`Edge`]. Dropping this value ends the use.
#[derive(Debug)]
pub struct Attachment(Arc<Edge>);

impl Attachment {
    /// Creates a user of `node`. `user` is the user's name in messages (`block device 'y'`). `name` is the user's name for the
    /// node (`file`, `root`).
    ///
    /// # Errors
    /// When the node is closed; when the user takes write permission on a read-only node; when the permissions conflict with
    /// those of another user in this process, or (through file locks) in another process.
    pub fn new(
        node: &Arc<Node>,
        user: impl Into<String>,
        name: impl Into<String>,
        permissions: Permissions,
    ) -> Result<Self> {
        Edge::attach(Arc::clone(node), user, name, Roles::empty(), permissions).map(Self)
    }

    /// The edge through which the node is used. Its permissions end with this value.
    pub fn edge(&self) -> &Arc<Edge> {
        &self.0
    }

    /// Changes the permissions of this user.
    ///
    /// # Errors
    /// The errors of [`Self::new`]. After an error, nothing has changed.
    pub fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        self.0.set_permissions(permissions)
    }
}

impl std::ops::Deref for Attachment {
    type Target = Edge;

    fn deref(&self) -> &Edge {
        &self.0
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.0.detach();
    }
}
