//! [`Draft`]: the graph as it will be after a change. It consists of the differences from the graph as it is now.
//!
//! A node may have many thousands of users. So the differences are found by the addresses of nodes, edges and backends, and
//! a change of all users of a node takes time in proportion to their number.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::backend::no_medium;
use crate::edge::Owner;
use crate::perm::{Perm, Permissions, Roles};
use crate::{Backend, ChildIdx, Edge, Errno, Error, ErrorKind, Node, Result};

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
    /// The positions in `slots` for each parent.
    slots_of: HashMap<NodeKey, Vec<usize>>,
    roots: Vec<NewRoot>,
    /// The last position in `roots` for each backend.
    root_of: HashMap<usize, usize>,
    attached: HashMap<EdgeKey, Arc<Edge>>,
    /// The edges in `attached`, in the order of the steps, for each node.
    attached_to: HashMap<NodeKey, Vec<Arc<Edge>>>,
    /// The nodes in `attached_to`, in the order of the steps.
    gain_users: Vec<NodeKey>,
    removed: HashMap<EdgeKey, Arc<Edge>>,
    permissions: HashMap<EdgeKey, (Arc<Edge>, Permissions)>,
    also_shared: HashMap<EdgeKey, (Arc<Edge>, Perm)>,
    read_only: HashMap<NodeKey, (Arc<Node>, bool)>,
    /// The edges whose permissions the caller has chosen.
    chosen: Vec<Arc<Edge>>,
    /// The nodes where a difference begins, each once, in the order of the steps.
    first: Vec<Arc<Node>>,
    is_first: HashSet<NodeKey>,
    /// Backends that must not be dropped before the change lock is released.
    backends: Vec<Backend>,
    /// The permissions that backends want from now on.
    wanted: Vec<(Backend, Permissions)>,
    /// Edges that no longer lend their permissions to a job.
    given_back: Vec<Arc<Edge>>,
}

/// A backend that gets another root edge.
struct NewRoot {
    backend: Backend,
    edge: Option<Arc<Edge>>,
}

/// A child that is replaced.
struct NewChild {
    parent: Arc<Node>,
    child: ChildIdx,
    edge: Option<Arc<Edge>>,
}

impl Draft {
    /// Makes `edge` a user of its node with permissions that the caller has chosen.
    pub(super) fn attach(&mut self, edge: &Arc<Edge>) {
        self.set_permissions(edge, edge.permissions());
        self.add_user(edge);
    }

    fn add_user(&mut self, edge: &Arc<Edge>) {
        if self.attached.insert(edge_key(edge), Arc::clone(edge)).is_none() {
            let node = node_key(edge.node());
            let users = self.attached_to.entry(node).or_default();
            if users.is_empty() {
                self.gain_users.push(node);
            }
            users.push(Arc::clone(edge));
        }
    }

    /// The edges that become users of their nodes.
    pub(super) fn attached(&self) -> Vec<Arc<Edge>> {
        let kept = |edge: &&Arc<Edge>| !self.is_removed(edge);
        let users = self.gain_users.iter().filter_map(|node| self.attached_to.get(node));
        users.flatten().filter(kept).cloned().collect()
    }

    pub(super) fn remove(&mut self, edge: &Arc<Edge>) {
        self.removed.insert(edge_key(edge), Arc::clone(edge));
        self.begins_at(edge.node());
    }

    /// Records that a difference begins at `node`.
    fn begins_at(&mut self, node: &Arc<Node>) {
        if self.is_first.insert(node_key(node)) {
            self.first.push(Arc::clone(node));
        }
    }

    pub(super) fn set_permissions(&mut self, edge: &Arc<Edge>, permissions: Permissions) {
        self.permissions.insert(edge_key(edge), (Arc::clone(edge), permissions));
        self.chosen.push(Arc::clone(edge));
        self.begins_at(edge.node());
    }

    pub(super) fn also_share(&mut self, parent: &Arc<Node>, edge: &Arc<Edge>, shared: Perm) {
        self.also_shared.insert(edge_key(edge), (Arc::clone(edge), shared));
        self.begins_at(parent);
    }

    /// Changes the permissions of `backend`; see [`super::Change::set_backend_permissions`].
    pub(super) fn set_backend_permissions(
        &mut self,
        backend: Backend,
        permissions: impl Fn(Permissions) -> Permissions,
    ) -> Result<()> {
        let Some(root) = self.root(&backend) else {
            self.backends.push(backend);
            return Err(no_medium());
        };
        self.set_permissions(&root, permissions(self.permissions(&root)));
        let wanted = permissions(backend.permissions());
        self.wanted.push((backend, wanted));
        Ok(())
    }

    /// Gives permissions back to `backend`; see [`super::Change::give_back`].
    pub(super) fn give_back(&mut self, backend: Backend, lent: Perm, shared: Perm) {
        if let Some(root) = self.root(&backend) {
            let taken = self.permissions(&root).taken | (lent & backend.permissions().taken);
            self.set_permissions(&root, Permissions { taken, shared });
            self.given_back.push(root);
        }
        self.backends.push(backend);
    }

    fn root(&self, backend: &Backend) -> Option<Arc<Edge>> {
        match self.root_of.get(&backend.key()).and_then(|at| self.roots.get(*at)) {
            Some(new) => new.edge.clone(),
            None => backend.root().ok(),
        }
    }

    pub(super) fn set_root(&mut self, backend: Backend, edge: Option<Arc<Edge>>) {
        if let Some(old) = self.root(&backend) {
            self.remove(&old);
        }
        self.root_of.insert(backend.key(), self.roots.len());
        self.roots.push(NewRoot { backend, edge });
    }

    /// Makes `node` the root node of `backend`, with the permissions of the former root edge.
    pub(super) fn move_root(&mut self, backend: Backend, node: &Arc<Node>) -> Result<()> {
        self.backends.push(backend.clone());
        if backend.is_closed() {
            return Err(no_medium());
        }
        let old = self.root(&backend);
        let permissions = match &old {
            Some(old) if Arc::ptr_eq(old.node(), node) => return Ok(()),
            Some(old) => {
                must_be_in_one_graph(old.node(), node)?;
                self.permissions(old)
            }
            None => backend.permissions(),
        };
        let edge = backend.new_root_edge(node, permissions);
        if let Some(old) = &old {
            edge.yield_to(old.yields_to());
        }
        self.attach(&edge);
        self.set_root(backend, Some(edge));
        Ok(())
    }

    /// Like [`Self::move_root`], for a backend that must have no root node.
    pub(super) fn insert_root(&mut self, backend: Backend, node: &Arc<Node>) -> Result<()> {
        if self.root(&backend).is_some() {
            let text = format!("There already is a medium in device '{}'", backend.name());
            self.backends.push(backend);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.move_root(backend, node)
    }

    /// Replaces a child that `parent` has or can have.
    pub(super) fn replace_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        new: Option<&Arc<Node>>,
    ) -> Result<()> {
        let old = self.child(parent, child);
        let (name, roles) = match &old {
            Some(old) => (old.name(), old.roles()),
            None => (parent.child_name(child), parent.roles_of(child)),
        };
        if roles.is_empty() {
            return Err(Error::invalid(format!(
                "Node '{}' (driver '{}') has no child '{name}'",
                parent.name(),
                parent.factory().name()
            )));
        }
        if new.is_none() && roles.contains(Roles::PRIMARY) {
            let parent = parent.name();
            return Err(Error::invalid(format!("Cannot remove the '{name}' child of '{parent}'")));
        }
        self.new_child(parent, child, name, roles, new)
    }

    /// Puts `new` into the place `child` of `parent`.
    pub(super) fn new_child(
        &mut self,
        parent: &Arc<Node>,
        child: ChildIdx,
        name: &str,
        roles: Roles,
        new: Option<&Arc<Node>>,
    ) -> Result<()> {
        let user = format!("node '{}'", parent.name());
        let edge = match new {
            Some(new) => {
                must_be_in_one_graph(parent, new)?;
                let edge = Edge::unattached(Arc::clone(new), user, name, roles, Permissions::NONE);
                edge.owned_by(Owner::Node(Arc::downgrade(parent), child));
                Some(edge)
            }
            None => None,
        };
        if let Some(edge) = &edge {
            self.add_user(edge);
        }
        if let Some(old) = self.child(parent, child) {
            self.remove(&old);
        }
        self.slots_of.entry(node_key(parent)).or_default().push(self.slots.len());
        self.slots.push(NewChild { parent: Arc::clone(parent), child, edge });
        self.begins_at(parent);
        Ok(())
    }

    /// Moves the users of a filter to the node that the filter shows.
    pub(super) fn remove_filter(&mut self, filter: &Arc<Node>) -> Result<()> {
        let filtered = filter.filtered_child().is_some();
        let children = self.children(filter);
        let below = children.iter().find(|(_, edge)| edge.roles().contains(Roles::FILTERED));
        match below {
            Some((_, below)) if filtered => {
                let below = Arc::clone(below.node());
                self.replace_node(filter, &below, |_| true)
            }
            _ => Err(Error::invalid(format!("Node '{}' is no filter", filter.name()))),
        }
    }

    /// Moves users of `old` to `new`; see [`super::Change::replace_node`].
    pub(super) fn replace_node(
        &mut self,
        old: &Arc<Node>,
        new: &Arc<Node>,
        which: impl Fn(&Edge) -> bool,
    ) -> Result<()> {
        let stay = self.below(new);
        for edge in self.users(old) {
            if !which(&edge) {
                continue;
            }
            match edge.owner() {
                Some(Owner::Node(parent, child)) => {
                    let Some(parent) = parent.upgrade() else { continue };
                    if !parent.factory().needs_child() && !stay.contains(&node_key(&parent)) {
                        self.replace_child(&parent, *child, Some(new))?;
                    }
                }
                Some(Owner::Backend(backend)) => {
                    if let Some(backend) = backend.upgrade() {
                        self.move_root(backend, new)?;
                    }
                }
                Some(Owner::FixedBackend(_)) => {}
                // The edge of an attachment has no roles.
                None if edge.roles().is_empty() => {}
                None => {
                    let text =
                        format!("{}, which uses '{}', is being opened", edge.user(), old.name());
                    return Err(Error::new(ErrorKind::Busy, text).errno(Errno::BUSY));
                }
            }
        }
        Ok(())
    }

    pub(super) fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) {
        self.read_only.insert(node_key(node), (Arc::clone(node), read_only));
        self.begins_at(node);
    }

    /// Updates the permissions below `node`.
    pub(super) fn refresh(&mut self, node: &Arc<Node>) {
        self.begins_at(node);
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

    fn is_removed(&self, edge: &Edge) -> bool {
        self.removed.contains_key(&edge_key(edge))
    }

    fn is_user(&self, edge: &Arc<Edge>) -> bool {
        let is_added = self.attached.contains_key(&edge_key(edge));
        !self.is_removed(edge) && (is_added || edge.node().users().has(edge))
    }

    /// Refuses new permissions of an edge that no longer uses its node. Permissions of an edge that the change removes are
    /// ignored.
    pub(super) fn check_users(&mut self) -> Result<()> {
        let chosen = std::mem::take(&mut self.chosen);
        for edge in chosen {
            if self.is_removed(&edge) {
                continue;
            }
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
        match self.new_children(parent).rev().find(|new| new.child == child) {
            Some(slot) => slot.edge.clone(),
            None => parent.children().get(child),
        }
    }

    /// The children of `parent` that are replaced, in the order of the steps.
    fn new_children(&self, parent: &Arc<Node>) -> impl DoubleEndedIterator<Item = &NewChild> {
        let slots = self.slots_of.get(&node_key(parent)).into_iter().flatten();
        slots.filter_map(|at| self.slots.get(*at))
    }

    /// The children of `parent`.
    pub(super) fn children(&self, parent: &Arc<Node>) -> Vec<(ChildIdx, Arc<Edge>)> {
        let mut children: Vec<_> = parent.children().iter().collect();
        for new in self.new_children(parent) {
            children.retain(|(child, _)| *child != new.child);
            children.extend(new.edge.clone().map(|edge| (new.child, edge)));
        }
        children
    }

    /// The edges through which `node` is used.
    pub(super) fn users(&self, node: &Arc<Node>) -> Vec<Arc<Edge>> {
        let mut users = node.parents();
        // During the change, a new user may be among the users of the node already.
        users.retain(|edge| !self.attached.contains_key(&edge_key(edge)));
        users.extend(self.attached_to.get(&node_key(node)).into_iter().flatten().cloned());
        users.retain(|edge| !self.is_removed(edge));
        users
    }

    /// The permissions that all users of `node` together take and share.
    pub(super) fn cumulative(&self, node: &Arc<Node>) -> Permissions {
        let users = self.users(node);
        users.iter().fold(Permissions::NONE, |all, edge| all.and(self.permissions(edge)))
    }

    /// Refuses to replace frozen links, and links that would make a cycle.
    pub(super) fn check_links(&self) -> Result<()> {
        self.check_frozen()?;
        self.check_cycles()
    }

    /// Refuses to replace a child if the link to it is frozen.
    fn check_frozen(&self) -> Result<()> {
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
    fn check_cycles(&self) -> Result<()> {
        let mut below = HashMap::new();
        for NewChild { parent, edge, .. } in &self.slots {
            let Some(edge) = edge.as_ref().filter(|edge| !self.is_removed(edge)) else { continue };
            let node = edge.node();
            let below = below.entry(node_key(node)).or_insert_with(|| self.below(node));
            if below.contains(&node_key(parent)) {
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

    /// `top` and all nodes below it.
    fn below(&self, top: &Arc<Node>) -> HashSet<NodeKey> {
        let (mut next, mut found) = (vec![Arc::clone(top)], HashSet::new());
        while let Some(from) = next.pop() {
            if found.insert(node_key(&from)) {
                next.extend(self.children(&from).iter().map(|(_, edge)| Arc::clone(edge.node())));
            }
        }
        found
    }

    /// Makes the draft the graph. Returns the nodes that have lost a child edge or a root edge, each once.
    pub(super) fn apply(&mut self) -> Vec<Arc<Node>> {
        let (mut released, mut is_released) = (Vec::new(), HashSet::new());
        let mut release = |old: &Edge| {
            old.replace_permissions(Permissions::NONE);
            if is_released.insert(node_key(old.node())) {
                released.push(Arc::clone(old.node()));
            }
        };
        // An edge that a later step replaces was never a user.
        let removed = &self.removed;
        let is_final = |edge: &Option<Arc<Edge>>| {
            edge.as_ref().is_none_or(|edge| !removed.contains_key(&edge_key(edge)))
        };
        for NewChild { parent, child, edge } in self.slots.drain(..) {
            if is_final(&edge)
                && let Some(old) = parent.children().set(child, edge)
            {
                // The users of its node are updated below.
                release(&old);
            }
        }
        for NewRoot { backend, edge } in &self.roots {
            if is_final(edge) {
                let old = backend.root();
                backend.store_root(edge.as_ref());
                if let Ok(old) = old {
                    release(&old);
                }
            }
        }
        for node in &self.first {
            node.users().retain(|edge| !self.is_removed(edge));
        }
        for (edge, permissions) in self.permissions.values() {
            if !self.is_removed(edge) {
                edge.replace_permissions(*permissions);
            }
        }
        for (backend, wanted) in &self.wanted {
            backend.want(*wanted);
        }
        for edge in &self.given_back {
            edge.yield_to(None);
        }
        for (edge, shared) in self.also_shared.values() {
            edge.set_also_shared(*shared);
        }
        for (node, read_only) in self.read_only.values() {
            node.set_read_only(*read_only);
        }
        released
    }
}

/// Refuses a link between nodes of different graphs.
fn must_be_in_one_graph(one: &Node, other: &Node) -> Result<()> {
    if Arc::ptr_eq(one.change_lock(), other.change_lock()) {
        return Ok(());
    }
    let (one, other) = (one.name(), other.name());
    Err(Error::invalid(format!("Nodes '{one}' and '{other}' belong to different graphs")))
}
