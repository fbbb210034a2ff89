//! [`Action`]: work that belongs to a change of the graph, on nodes that no request uses meanwhile.

use std::sync::Arc;

use super::GraphChange;
use super::walk::nodes_from;
use crate::driver::BoxFuture;
use crate::{ChildIdx, Node, Result};

/// Work that belongs to a change of the graph. The change is made only if the work succeeds, and requests resume after both.
pub trait Action: Send {
    /// The nodes that no request and no other control operation may use during the work. They are drained.
    fn nodes(&self) -> Vec<Arc<Node>>;

    /// Does the work. The steps of the change are not made yet. The work may make requests through edges, but not through
    /// backends: they are held back.
    ///
    /// # Errors
    /// When the work fails. No step of the change is made then.
    fn prepare(&mut self) -> BoxFuture<'_, Result<()>>;

    /// The steps of the change are made. Requests resume afterwards.
    fn commit(&mut self);

    /// The work has failed, or a step of the change after the work. Requests resume afterwards.
    fn abort(&mut self);
}

impl GraphChange {
    /// Makes `action` a part of the change. It replaces an earlier action.
    pub fn set_action(&mut self, action: impl Action + 'static) {
        self.action = Some(Box::new(action));
    }
}

/// Marks the nodes that an action may change, and the nodes that store their data. The action makes requests to these nodes
/// directly, and a write marks only the node through which it enters the graph.
pub(super) fn mark_unflushed(action: &dyn Action) {
    let nodes = nodes_from(&action.nodes(), |child| child != ChildIdx::BACKING);
    nodes.iter().filter(|node| !node.is_read_only()).for_each(|node| node.mark_unflushed());
}
