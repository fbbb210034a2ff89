//! [`Draft`]: the graph as it will be after a change. It consists of the differences from the graph as it is now.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::backend::no_medium;
use crate::perm::{Perm, Permissions};
use crate::{ChildIdx, Edge, Errno, Error, ErrorKind, Node, Result};

/// The address of an edge, which identifies the edge while it exists.
type EdgeKey = usize;
/// The address of a node.
type NodeKey = usize;

fn edge_key(edge: &Edge) -> EdgeKey {
    std::ptr::from_ref(edge).addr()
}

pub(super) fn node_key(node: &Arc<Node>) -> NodeKey {
    Arc::as_ptr(node).addr()
}

/// The differences between the graph as it is and as it will be.
#[derive(Default)]
pub(super) struct Draft {
    slots: Vec<NewChild>,
    attached: Vec<Arc<Edge>>,
    removed: HashSet<EdgeKey>,
    permissions: HashMap<EdgeKey, (Arc<Edge>, Permissions)>,
    also_shared: HashMap<EdgeKey, (Arc<Edge>, Perm)>,
    read_only: HashMap<NodeKey, (Arc<Node>, bool)>,
    /// The edges whose permissions the caller has chosen.
    chosen: Vec<Arc<Edge>>,
    /// The nodes where a difference begins, in the order of the steps.
    first: Vec<Arc<Node>>,
}

/// A child that is replaced.
struct NewChild {
    parent: Arc<Node>,
    child: ChildIdx,
    edge: Option<Arc<Edge>>,
}

impl Draft {
    /// Adds a user, or a child edge that a later step puts into its place.
    pub(super) fn add(&mut self, edge: &Arc<Edge>) {
        self.attached.push(Arc::clone(edge));
    }

    /// The edges that become users of their nodes.
    pub(super) fn attached(&self) -> Vec<Arc<Edge>> {
        let kept = |edge: &&Arc<Edge>| !self.removed.contains(&edge_key(edge));
        self.attached.iter().filter(kept).cloned().collect()
    }

    pub(super) fn remove(&mut self, edge: &Edge) {
        self.removed.insert(edge_key(edge));
        self.first.push(Arc::clone(edge.node()));
    }

    pub(super) fn set_permissions(&mut self, edge: &Arc<Edge>, permissions: Permissions) {
        self.permissions.insert(edge_key(edge), (Arc::clone(edge), permissions));
        self.chosen.push(Arc::clone(edge));
        self.first.push(Arc::clone(edge.node()));
    }

    pub(super) fn also_share(&mut self, parent: &Arc<Node>, edge: &Arc<Edge>, shared: Perm) {
        self.also_shared.insert(edge_key(edge), (Arc::clone(edge), shared));
        self.first.push(Arc::clone(parent));
    }

    pub(super) fn set_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        edge: Option<Arc<Edge>>,
    ) {
        if let Some(old) = self.child(parent, child) {
            self.remove(&old);
        }
        self.slots.push(NewChild { parent: Arc::clone(parent), child, edge });
        self.first.push(Arc::clone(parent));
    }

    pub(super) fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) {
        self.read_only.insert(node_key(node), (Arc::clone(node), read_only));
        self.first.push(Arc::clone(node));
    }

    /// Updates the permissions below `node`.
    pub(super) fn refresh(&mut self, node: &Arc<Node>) {
        self.first.push(Arc::clone(node));
    }

    /// Records permissions that follow from those of the parents.
    pub(super) fn derive_permissions(&mut self, edge: Arc<Edge>, permissions: Permissions) {
        self.permissions.insert(edge_key(&edge), (edge, permissions));
    }

    /// The nodes where a difference begins.
    pub(super) fn first(&self) -> Vec<Arc<Node>> {
        self.first.clone()
    }

    /// The edges whose permissions the caller has chosen, with these permissions.
    pub(super) fn chosen(&self) -> impl Iterator<Item = (&Arc<Edge>, Permissions)> {
        self.chosen.iter().map(|edge| (edge, self.permissions(edge)))
    }

    fn is_user(&self, edge: &Arc<Edge>) -> bool {
        self.users(edge.node()).iter().any(|user| Arc::ptr_eq(user, edge))
    }

    /// Refuses new permissions of an edge that no longer uses its node. Permissions of an edge that the change removes are
    /// ignored.
    pub(super) fn check_users(&mut self) -> Result<()> {
        let chosen = std::mem::take(&mut self.chosen);
        for edge in chosen.into_iter().filter(|edge| !self.removed.contains(&edge_key(edge))) {
            if !self.is_user(&edge) {
                return Err(no_medium().on_node(edge.node().name()));
            }
            self.chosen.push(edge);
        }
        Ok(())
    }

    /// Ignores new permissions of edges that no longer use their nodes.
    pub(super) fn forget_former_users(&mut self) {
        let chosen = std::mem::take(&mut self.chosen);
        for edge in chosen {
            if self.is_user(&edge) {
                self.chosen.push(edge);
            } else {
                self.permissions.remove(&edge_key(&edge));
            }
        }
    }

    /// Whether the change sets the read-only state of `node`.
    pub(super) fn changes_read_only(&self, node: &Arc<Node>) -> bool {
        self.read_only.contains_key(&node_key(node))
    }

    pub(super) fn is_read_only(&self, node: &Arc<Node>) -> bool {
        match self.read_only.get(&node_key(node)) {
            Some((_, read_only)) => *read_only,
            None => node.is_read_only(),
        }
    }

    pub(super) fn permissions(&self, edge: &Edge) -> Permissions {
        match self.permissions.get(&edge_key(edge)) {
            Some((_, permissions)) => *permissions,
            None => edge.permissions(),
        }
    }

    pub(super) fn also_shared(&self, edge: &Edge) -> Perm {
        match self.also_shared.get(&edge_key(edge)) {
            Some((_, shared)) => *shared,
            None => edge.also_shared(),
        }
    }

    pub(super) fn child(&self, parent: &Arc<Node>, child: ChildIdx) -> Option<Arc<Edge>> {
        let new = |slot: &&NewChild| Arc::ptr_eq(&slot.parent, parent) && slot.child == child;
        match self.slots.iter().rev().find(new) {
            Some(slot) => slot.edge.clone(),
            None => parent.children().get(child),
        }
    }

    /// The children of `parent`.
    pub(super) fn children(&self, parent: &Arc<Node>) -> Vec<(ChildIdx, Arc<Edge>)> {
        let mut children: Vec<_> = parent.children().iter().collect();
        for new in self.slots.iter().filter(|slot| Arc::ptr_eq(&slot.parent, parent)) {
            children.retain(|(child, _)| *child != new.child);
            children.extend(new.edge.clone().map(|edge| (new.child, edge)));
        }
        children
    }

    /// The edges through which `node` is used.
    pub(super) fn users(&self, node: &Arc<Node>) -> Vec<Arc<Edge>> {
        let mut users = node.parents();
        for new in self.attached.iter().filter(|edge| Arc::ptr_eq(edge.node(), node)) {
            if !users.iter().any(|user| Arc::ptr_eq(user, new)) {
                users.push(Arc::clone(new));
            }
        }
        users.retain(|edge| !self.removed.contains(&edge_key(edge)));
        users
    }

    /// The permissions that all users of `node` together take and share.
    pub(super) fn cumulative(&self, node: &Arc<Node>) -> Permissions {
        let users = self.users(node);
        users.iter().fold(Permissions::NONE, |all, edge| all.and(self.permissions(edge)))
    }

    /// Refuses to replace a child if the link to it is frozen.
    pub(super) fn check_frozen(&self) -> Result<()> {
        for NewChild { parent, child, .. } in &self.slots {
            let old = parent.children().get(*child);
            if let Some(old) = old.filter(|old| old.is_frozen()) {
                return Err(Error::new(
                    ErrorKind::Denied,
                    format!(
                        "Cannot change frozen '{}' link from '{}' to '{}'",
                        old.name(),
                        parent.name(),
                        old.node().name()
                    ),
                )
                .errno(Errno::PERM));
            }
        }
        Ok(())
    }

    /// Refuses a new child from which its parent can be reached.
    pub(super) fn check_cycles(&self) -> Result<()> {
        for NewChild { parent, edge, .. } in &self.slots {
            if let Some(edge) = edge
                && !self.removed.contains(&edge_key(edge))
                && self.reaches(edge.node(), parent)
            {
                return Err(Error::invalid(format!(
                    "Making '{}' a {} child of '{}' would create a cycle",
                    edge.node().name(),
                    edge.name(),
                    parent.name()
                )));
            }
        }
        Ok(())
    }

    /// Whether `node` is `top` or is below it.
    fn reaches(&self, top: &Arc<Node>, node: &Arc<Node>) -> bool {
        let (mut next, mut seen) = (vec![Arc::clone(top)], HashSet::new());
        while let Some(from) = next.pop() {
            if Arc::ptr_eq(&from, node) {
                return true;
            }
            if seen.insert(node_key(&from)) {
                next.extend(self.children(&from).iter().map(|(_, edge)| Arc::clone(edge.node())));
            }
        }
        false
    }

    /// Makes the draft the graph. Returns the nodes that were replaced as children.
    pub(super) fn apply(&mut self) -> Vec<Arc<Node>> {
        let mut replaced = Vec::new();
        // An edge that a later step replaces was never a user.
        let removed = &self.removed;
        let is_final = |slot: &NewChild| {
            slot.edge.as_ref().is_none_or(|edge| !removed.contains(&edge_key(edge)))
        };
        for NewChild { parent, child, edge } in self.slots.drain(..).filter(is_final) {
            if let Some(old) = parent.children().set(child, edge) {
                old.node().users().remove(&old);
                old.replace_permissions(Permissions::NONE);
                replaced.push(Arc::clone(old.node()));
            }
        }
        for node in &self.first {
            node.users().retain(|edge| !self.removed.contains(&edge_key(edge)));
        }
        for (edge, permissions) in self.permissions.values() {
            edge.replace_permissions(*permissions);
        }
        for (edge, shared) in self.also_shared.values() {
            edge.set_also_shared(*shared);
        }
        for (node, read_only) in self.read_only.values() {
            node.set_read_only(*read_only);
        }
        replaced
    }
}
