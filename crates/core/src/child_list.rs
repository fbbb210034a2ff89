//! Children that are added and removed while a node is used.

use crate::{Node, Result};

/// The capability of a driver to add and remove children while the node is used. [`Graph::change_children`] makes the change:
/// it holds back the requests of the node, so a driver needs no lock for this.
///
/// [`Graph::change_children`]: crate::Graph::change_children
pub trait ChildList: Send + Sync {
    /// Checks whether `node` can become a child, and returns the name of the new child (`children.2`). The child gets the role
    /// [`Roles::DATA`](crate::Roles::DATA).
    ///
    /// # Errors
    /// When the driver refuses the new child.
    fn check_new(&self, node: &Node) -> Result<String>;

    /// The child with this name was added.
    fn added(&self, name: &str);

    /// Checks whether the child with this name can be removed.
    ///
    /// # Errors
    /// When the driver needs the child.
    fn check_removal(&self, name: &str) -> Result<()>;

    /// The child with this name was removed.
    fn removed(&self, name: &str);
}
