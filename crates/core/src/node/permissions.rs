//! The parents of a node, and the permissions that they take and share.
//!
//! A change of the parents or of their permissions recomputes the permissions of the node and of all nodes below it, and passes
//! them to the drivers. Such a change either succeeds completely or changes nothing. One lock for each graph serialises these
//! changes (`PermissionsLock`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_ring::perturb::point;

use crate::perm::{Perm, Permissions};
use crate::users::Users;
use crate::{ChildIdx, Edge, Errno, Error, ErrorKind, Node, Result};

/// The lock that serialises changes of permissions in one graph. A change computes the permissions of a node and its
/// descendants from all their users, and then stores these permissions and passes them to the drivers. Without the lock, an
/// older result could replace a newer one, and a driver could release a file lock that a user needs. The permissions lock is
/// held during the calls of [`set_permissions`](crate::Driver::set_permissions), which do not wait for other nodes.
pub(crate) type PermissionsLock = Arc<Mutex<()>>;

/// Guard of the [`PermissionsLock`].
pub(crate) type PermissionsGuard<'a> = MutexGuard<'a, ()>;

impl Node {
    /// Whether this node has parents.
    pub fn has_parents(&self) -> bool {
        self.users.has_edges()
    }

    /// The edges through which parents use this node.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.users.edges()
    }

    /// The users of this node.
    pub(crate) fn users(&self) -> &Users {
        &self.users
    }

    pub(crate) fn add_parent(&self, edge: &Arc<Edge>) -> Result<()> {
        let changing = self.lock_permissions();
        self.add_with(edge, &changing)
    }

    fn add_with(&self, edge: &Arc<Edge>, changing: &PermissionsGuard<'_>) -> Result<()> {
        self.check_writable(edge.permissions())?;
        self.users.add(edge).map_err(|error| error.on_node(&self.name))?;
        if let Err(error) = self.refresh_with(changing) {
            self.users.remove(edge);
            self.restore_with(changing);
            return Err(error);
        }
        Ok(())
    }

    /// Adds a parent that takes over permissions of another parent: `other` has the permissions `left` afterwards. Either both
    /// changes are made or none.
    pub(crate) fn add_parent_beside(
        &self,
        edge: &Arc<Edge>,
        other: &Edge,
        left: Permissions,
    ) -> Result<()> {
        let changing = self.lock_permissions();
        let before = other.replace_permissions(left);
        self.add_with(edge, &changing).inspect_err(|_| {
            other.replace_permissions(before);
            self.restore_with(&changing);
        })
    }

    /// Undoes [`Self::add_parent_beside`]: removes the parent, and gives `other` the permissions `restored` if `other` still
    /// uses the node.
    pub(crate) fn remove_parent_beside(&self, edge: &Edge, other: &Edge, restored: Permissions) {
        let changing = self.lock_permissions();
        self.users.remove(edge);
        edge.replace_permissions(Permissions::NONE);
        if self.parents().iter().any(|parent| std::ptr::eq(&raw const **parent, other)) {
            other.replace_permissions(restored);
        }
        self.restore_with(&changing);
    }

    pub(crate) fn remove_parent(&self, edge: &Edge) {
        let changing = self.lock_permissions();
        self.users.remove(edge);
        // Releasing permissions cannot conflict. If a driver cannot release its file locks, the error is only logged.
        if let Err(error) = self.refresh_with(&changing) {
            tracing::warn!(node = self.name, %error, "cannot release permissions");
        }
    }

    /// Changes the permissions of `edge`, through which a parent uses this node.
    pub(crate) fn change_parent(&self, edge: &Edge, permissions: Permissions) -> Result<()> {
        let changing = self.lock_permissions();
        self.check_writable(permissions)?;
        let before = edge.replace_permissions(permissions);
        if let Err(error) = self.refresh_with(&changing) {
            edge.replace_permissions(before);
            self.restore_with(&changing);
            return Err(error);
        }
        Ok(())
    }

    /// Takes the lock of permission changes, which all nodes of a graph share.
    pub(crate) fn lock_permissions(&self) -> PermissionsGuard<'_> {
        self.permissions_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a user that writes to a read-only node. The caller holds the permissions lock: a reopen holds this lock while
    /// the reopen changes the read-only state and looks for writers.
    fn check_writable(&self, permissions: Permissions) -> Result<()> {
        if self.is_read_only() && permissions.taken.contains(Perm::WRITE) {
            return Err(Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::PERM));
        }
        Ok(())
    }

    /// Updates the permissions after a change was undone. The restored permissions were valid before the change, so they cannot
    /// conflict now.
    fn restore_with(&self, changing: &PermissionsGuard<'_>) {
        if let Err(error) = self.refresh_with(changing) {
            tracing::warn!(node = self.name, %error, "cannot restore permissions");
        }
    }

    /// The permissions that all users together take and share.
    pub(crate) fn cumulative(&self) -> Permissions {
        self.parents().iter().fold(Permissions::NONE, |all, edge| all.and(edge.permissions()))
    }

    fn check_conflicts(&self) -> Result<()> {
        let parents = self.parents();
        for taker in &parents {
            for sharer in parents.iter().filter(|other| !Arc::ptr_eq(other, taker)) {
                let refused = taker.permissions().taken - sharer.permissions().shared;
                if !refused.is_empty() {
                    return Err(conflict(&self.name, refused, taker, sharer));
                }
            }
        }
        Ok(())
    }

    /// The permissions that this node needs on its children, given how its parents use it. Also checks its own users
    /// for conflicts.
    fn children_permissions(&self) -> Result<Vec<(Arc<Edge>, Permissions)>> {
        self.check_conflicts()?;
        let ours = self.cumulative();
        ours.check_size(self.size(), self.request_alignment())
            .map_err(|error| error.on_node(&self.name))?;
        let wanted = |(child, edge): (ChildIdx, Arc<Edge>)| {
            let mut wanted = self.driver.child_permissions(child, ours).unwrap_or_else(|| {
                let kind = self.factory.kind();
                Permissions::for_child(kind, child.role(), ours, !self.is_read_only())
            });
            wanted.shared |= edge.also_shared();
            (edge, wanted)
        };
        Ok(self.children.iter().map(wanted).collect())
    }

    /// Makes the driver take or release its file locks. Does nothing with `force-share=on`.
    fn hand_permissions_to_driver(&self) -> Result<()> {
        if self.settings.load().flags.force_share {
            return Ok(());
        }
        let permissions = self.cumulative();
        point();
        self.driver.set_permissions(permissions)
    }

    /// Updates the permissions on all nodes below this node, and the file locks of this node and of these nodes, to
    /// match what the parents ask for.
    pub(crate) fn refresh_permissions(&self) -> Result<()> {
        self.refresh_with(&self.lock_permissions())
    }

    /// Like [`Self::refresh_permissions`]. The caller holds the permissions lock. The function is iterative, because a
    /// chain may be long. Edges change from the top down, drivers from the bottom up.
    pub(crate) fn refresh_with(&self, _changing: &PermissionsGuard<'_>) -> Result<()> {
        let mut changed: Vec<(Arc<Edge>, Permissions)> = Vec::new();
        let mut drivers = 0_usize;
        let outcome = (|| {
            let mut at = 0_usize;
            let mut children = self.children_permissions()?;
            loop {
                for (edge, wanted) in children {
                    if wanted != edge.permissions() {
                        let before = edge.replace_permissions(wanted);
                        changed.push((edge, before));
                    }
                }
                let Some((edge, _)) = changed.get(at) else { break };
                at += 1;
                children = edge.node().children_permissions()?;
            }
            for (edge, _) in changed.iter().rev() {
                drivers += 1;
                edge.node().hand_permissions_to_driver()?;
            }
            self.hand_permissions_to_driver()
        })();
        if outcome.is_err() {
            for (edge, before) in changed.iter().rev() {
                edge.replace_permissions(*before);
            }
            for (edge, _) in changed.iter().rev().take(drivers) {
                if let Err(error) = edge.node().hand_permissions_to_driver() {
                    tracing::warn!(%error, "cannot restore permissions");
                }
            }
        }
        outcome
    }
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
