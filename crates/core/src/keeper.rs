//! The node of an image that keeps the image's snapshots and VM state. Nodes that only forward requests (raw, filters) may be
//! above this node.

use std::sync::Arc;

use crate::{ChildIdx, Driver, Errno, Error, Node, Result};

/// Finds the node, at or below `node`, whose driver `has` an ability. Returns this node and the nodes above it, with `node`
/// first. The nodes above only forward requests.
///
/// # Errors
/// `ENOTSUP` if there is no such node.
pub(crate) fn keeper(
    node: Arc<Node>,
    has: impl Fn(&dyn Driver) -> bool,
) -> Result<(Arc<Node>, Vec<Arc<Node>>)> {
    let (mut keeper, mut above) = (node, Vec::new());
    while !has(keeper.driver()) {
        let passes = keeper.factory().passes_permissions();
        let below = keeper.child(ChildIdx::FILE).filter(|_| passes);
        let below = below.ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))?;
        above.push(std::mem::replace(&mut keeper, below));
    }
    Ok((keeper, above))
}
