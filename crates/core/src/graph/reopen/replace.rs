//! Removes, exchanges or adds backing files during a reopen.
//!
//! The edges are exchanged when no request is in flight above them, before the permissions are updated. The old edges
//! can be restored until the reopen commits.

use std::sync::Arc;

use crate::perm::Permissions;
use crate::{ChildIdx, Edge, Error, Node, Result};

/// A backing file to replace.
pub(super) struct Replacement {
    pub(super) parent: Arc<Node>,
    /// The new backing file. `None`: the parent has no backing file after the reopen.
    pub(super) new: Option<Arc<Node>>,
}

/// The exchanged edges. Dropping this value without [`Replaced::keep`] restores the old edges.
pub(super) struct Replaced {
    undo: Vec<(Arc<Node>, Option<Arc<Edge>>)>,
}

impl Replaced {
    /// Exchanges the edges.
    ///
    /// # Errors
    /// When a node would be below itself, or when a new edge conflicts with another user. After an error, nothing has
    /// changed.
    pub(super) fn make(replacements: &[Replacement]) -> Result<Self> {
        let mut replaced = Self { undo: Vec::new() };
        // All old edges are removed first. Otherwise an old edge could be part of a cycle that the new graph does not
        // contain.
        for Replacement { parent, .. } in replacements {
            let old = parent.children().set(ChildIdx::BACKING, None);
            if let Some(old) = &old {
                old.detach();
            }
            replaced.undo.push((Arc::clone(parent), old));
        }
        for Replacement { parent, new } in replacements {
            if let Some(new) = new {
                attach(parent, new)?;
            }
        }
        Ok(replaced)
    }

    /// Makes the change final. Returns the nodes that have lost a user.
    pub(super) fn keep(mut self) -> Vec<Arc<Node>> {
        let edges = self.undo.drain(..).filter_map(|(_, old)| old);
        edges.map(|old| Arc::clone(old.node())).collect()
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        for (parent, _) in &self.undo {
            if let Some(new) = parent.children().set(ChildIdx::BACKING, None) {
                new.detach();
            }
        }
        for (parent, old) in self.undo.drain(..) {
            if let Some(old) = old {
                // The former permissions were valid before, so they cannot conflict now.
                if let Err(error) = old.node().add_parent(&old) {
                    tracing::warn!(%error, "cannot restore permissions");
                }
                parent.children().set(ChildIdx::BACKING, Some(old));
            }
        }
    }
}

/// Makes `new` the backing file of `parent`. The new edge takes no permission yet: the permissions of all edges are
/// updated together.
fn attach(parent: &Arc<Node>, new: &Arc<Node>) -> Result<()> {
    if super::super::drain::is_below(new, parent) {
        return Err(Error::invalid(format!(
            "Making '{}' a backing child of '{}' would create a cycle",
            new.name(),
            parent.name()
        )));
    }
    let user = format!("node '{}'", parent.name());
    let name = ChildIdx::BACKING.name();
    let edge = Edge::attach(Arc::clone(new), user, name, Permissions::NONE)?;
    parent.children().set(ChildIdx::BACKING, Some(edge));
    Ok(())
}
