//! Permissions in a draft: computes what all affected nodes take and share, checks for conflicts, and prepares the drivers.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use oxblk_ring::perturb::point;

use super::draft::{Draft, node_key};
use super::read_only;
use crate::node::SlowPathFlags;
use crate::perm::{NodeAccess, Perm, Permissions};
use crate::{ChildIdx, Edge, Error, ErrorKind, Node, Result};

/// Computes the permissions of all edges below the nodes where the draft begins to differ from the graph. Returns the affected
/// nodes, in the order in which they are found.
///
/// A node is visited again whenever the permissions of one of its parents have changed. Nodes are visited in the order in which
/// they are found, so the number of visits is at most the number of nodes times the length of the longest path.
pub(super) fn compute(draft: &mut Draft) -> Vec<Arc<Node>> {
    let mut affected: Vec<Arc<Node>> = Vec::new();
    let (mut queue, mut queued, mut seen) = (VecDeque::new(), HashSet::new(), HashSet::new());
    for node in draft.first() {
        if queued.insert(node_key(&node)) {
            queue.push_back(node);
        }
    }
    while let Some(node) = queue.pop_front() {
        queued.remove(&node_key(&node));
        let mut ours = draft.cumulative(&node);
        if node.has_gate(SlowPathFlags::COPY_ON_READ) && ours.taken.contains(Perm::CONSISTENT_READ)
        {
            // Reads write to the node.
            ours.taken |= Perm::WRITE_UNCHANGED;
        }
        for (child, edge) in draft.children(&node) {
            let mut wanted = node.driver().child_permissions(child, ours).unwrap_or_else(|| {
                let writable = !draft.is_read_only(&node);
                let access = NodeAccess { writable, no_io: node.flags().no_io };
                Permissions::for_child(edge.roles(), ours, access)
            });
            wanted.shared |= draft.also_shared(&edge);
            if child == ChildIdx::FILE
                && node.factory().sees_all_changes()
                && ours != Permissions::NONE
            {
                wanted.shared -= Perm::WRITE | Perm::RESIZE;
            }
            if wanted != draft.permissions(&edge) {
                let below = Arc::clone(edge.node());
                draft.derive_permissions(edge, wanted);
                if queued.insert(node_key(&below)) {
                    queue.push_back(below);
                }
            }
        }
        if seen.insert(node_key(&node)) {
            affected.push(node);
        }
    }
    affected
}

/// Checks the users of all affected nodes.
///
/// # Errors
/// When two users of a node conflict; when a user takes write permission on a read-only node; when a user takes write but not
/// resize permission, and the size of the node is not a multiple of its request alignment.
pub(super) fn check(draft: &Draft, affected: &[Arc<Node>]) -> Result<()> {
    for (edge, permissions) in draft.chosen() {
        let node = edge.node();
        if permissions.taken.contains(Perm::WRITE)
            && draft.is_read_only(node)
            && !draft.changes_read_only(node)
        {
            return Err(read_only("Block node is read-only".to_owned()));
        }
    }
    for node in affected {
        check_conflicts(draft, node)?;
        let ours = draft.cumulative(node);
        ours.check_size(node.size(), node.request_alignment())
            .map_err(|error| error.on_node(node.name()))?;
        if draft.is_read_only(node) && ours.taken.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
            let name = node.name();
            let text = match draft.changes_read_only(node) {
                true => format!("Read-only block node '{name}' cannot support read-write users"),
                false => "Block node is read-only".to_owned(),
            };
            return Err(read_only(text).on_node(name));
        }
    }
    Ok(())
}

fn check_conflicts(draft: &Draft, node: &Arc<Node>) -> Result<()> {
    let users = draft.users(node);
    let (mut unshared, mut unshared_twice) = (Perm::empty(), Perm::empty());
    for user in &users {
        let refuses = Perm::all() - draft.permissions(user).shared;
        unshared_twice |= unshared & refuses;
        unshared |= refuses;
    }
    for taker in &users {
        let Permissions { taken, shared } = draft.permissions(taker);
        // If only one user does not share a permission, this user may take it.
        let refused_by_others = (unshared & shared) | unshared_twice;
        if !taken.intersects(refused_by_others) {
            continue;
        }
        for sharer in users.iter().filter(|other| !Arc::ptr_eq(other, taker)) {
            let refused = taken - draft.permissions(sharer).shared;
            if !refused.is_empty() {
                return Err(conflict(node.name(), refused, taker, sharer));
            }
        }
    }
    Ok(())
}

fn conflict(node: &str, refused: Perm, taker: &Edge, sharer: &Edge) -> Error {
    let text = format!(
        "Permission conflict on node '{node}': permissions '{}' are both required by {} (uses node \
         '{node}' as '{}' child) and unshared by {} (uses node '{node}' as '{}' child).",
        refused.names(),
        taker.user(),
        taker.name(),
        sharer.user(),
        sharer.name(),
    );
    Error::new(ErrorKind::Denied, text).on_node(node)
}

/// Drivers that hold the locks of both the current and the new permissions. Dropping this value without [`Self::commit`]
/// releases the locks that only the new permissions need.
pub(super) struct Prepared {
    drivers: Vec<(Arc<Node>, Permissions)>,
}

impl Prepared {
    /// Prepares the drivers of the affected nodes, in the reverse of the order in which they were found.
    ///
    /// # Errors
    /// The first failure. The drivers that have prepared before abort.
    pub(super) fn prepare(draft: &Draft, affected: Vec<Arc<Node>>) -> Result<Self> {
        let mut prepared = Self { drivers: Vec::new() };
        for (node, permissions) in wanted(draft, affected) {
            point();
            node.driver().prepare_permissions(permissions)?;
            prepared.drivers.push((node, permissions));
        }
        Ok(prepared)
    }

    /// For permissions that need no new locks.
    pub(super) fn without_new_locks(draft: &Draft, affected: Vec<Arc<Node>>) -> Self {
        Self { drivers: wanted(draft, affected) }
    }

    /// Releases the locks that the new permissions do not need.
    pub(super) fn commit(mut self) {
        for (node, permissions) in self.drivers.drain(..) {
            point();
            node.driver().commit_permissions(permissions);
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for (node, _) in self.drivers.iter().rev() {
            node.driver().abort_permissions();
        }
    }
}

/// The new permissions of the affected nodes, last found first. Nodes with `force-share=on` allow other processes everything.
fn wanted(draft: &Draft, affected: Vec<Arc<Node>>) -> Vec<(Arc<Node>, Permissions)> {
    let wanted = affected.into_iter().rev().map(|node| {
        let mut permissions = draft.cumulative(&node);
        if node.is_force_shared() {
            permissions.shared = Perm::all();
        }
        (node, permissions)
    });
    wanted.collect()
}
