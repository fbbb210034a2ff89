//! Backing files that a reopen takes away, exchanges or adds.
//!
//! The edges of all nodes are changed at once, while nothing is in flight above them and before permissions are worked
//! out anew. They can be put back as they were until the reopen is committed.

use std::sync::Arc;

use crate::perm::Permissions;
use crate::{ChildIdx, Edge, Error, Node, Result};

/// A backing file to be exchanged.
pub(super) struct Replacement {
    pub(super) parent: Arc<Node>,
    /// The node that comes in its place, if any.
    pub(super) new: Option<Arc<Node>>,
}

/// Edges that have been exchanged. Dropping it without [`Replaced::keep`] puts the old ones back.
pub(super) struct Replaced {
    undo: Vec<(Arc<Node>, Option<Arc<Edge>>)>,
}

impl Replaced {
    /// Exchanges them.
    ///
    /// # Errors
    /// When a node would come to be below itself. Nothing has changed then.
    pub(super) fn make(replacements: &[Replacement]) -> Result<Self> {
        let mut replaced = Self { undo: Vec::new() };
        // All old edges go first: what one of them closed to a circle the others may open.
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

    /// The change is final. Gives the nodes that have lost a user.
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
                // What was held before can be held again.
                if let Err(error) = old.node().add_parent(&old) {
                    tracing::warn!(%error, "cannot put permissions back");
                }
                parent.children().set(ChildIdx::BACKING, Some(old));
            }
        }
    }
}

/// Takes no permission yet: those are worked out for all edges together.
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
