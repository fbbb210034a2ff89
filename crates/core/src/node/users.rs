//! The users of a node, and the lock of changes.

use std::sync::{Arc, PoisonError};

use crate::change::ChangeLock;
use crate::edge::Owner;
use crate::users::Users;
use crate::{Edge, Node};

impl Node {
    /// Whether this node has parents.
    pub fn has_parents(&self) -> bool {
        self.users.has_edges()
    }

    /// The edges through which parents use this node.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.users.edges()
    }

    /// Lets the backends with this root node report its size.
    pub(crate) fn report_size(&self) {
        for edge in self.parents() {
            if let Some(Owner::Backend(backend)) = edge.owner()
                && let Some(backend) = backend.upgrade()
            {
                backend.report_size();
            }
        }
    }

    /// The users of this node.
    pub(crate) fn users(&self) -> &Users {
        &self.users
    }

    /// The lock of changes, which all nodes of a graph share.
    pub(crate) fn change_lock(&self) -> &ChangeLock {
        &self.change_lock
    }

    /// Whether the node has no user. Waits for a change that is being made, because it may remove a user again.
    pub(crate) fn is_unused(&self) -> bool {
        let _changing = self.change_lock.lock().unwrap_or_else(PoisonError::into_inner);
        !self.users.is_used()
    }

    /// Marks the node as closed if it has no user. Returns true to only one caller, which then closes the driver. A change that is
    /// being made has users that it may remove again, so this waits for the change.
    pub(crate) fn close_if_unused(&self) -> bool {
        let _changing = self.change_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.users.close()
    }

    /// Whether the node was opened with `force-share=on`.
    pub(crate) fn is_force_shared(&self) -> bool {
        self.settings.load().flags.force_share
    }
}
