//! Updates the limits of nodes when the limits of nodes below them change.

use std::collections::HashSet;
use std::sync::Arc;

use super::Graph;
use crate::Node;

impl Graph {
    /// Queries the limits of the nodes `changed` and of all nodes above them again. The limits of a node depend on its
    /// children, so the limits of the children are queried first. The caller holds back all requests to these nodes.
    pub(super) fn refresh_limits(&self, changed: &[Arc<Node>]) {
        let mut affected: HashSet<*const Node> = changed.iter().map(Arc::as_ptr).collect();
        let mut seen: HashSet<*const Node> = HashSet::new();
        // A walk through the whole graph. The walk is iterative, because a backing chain may be long. An entry is a
        // node, and a flag: its children are done.
        let mut walk: Vec<_> = self.nodes().into_iter().map(|node| (node, false)).collect();
        while let Some((node, is_ready)) = walk.pop() {
            let children: Vec<_> =
                node.children().iter().map(|(_, edge)| Arc::clone(edge.node())).collect();
            if is_ready {
                let below = children.iter().any(|child| affected.contains(&Arc::as_ptr(child)));
                if below || affected.contains(&Arc::as_ptr(&node)) {
                    affected.insert(Arc::as_ptr(&node));
                    node.refresh_limits();
                }
            } else if seen.insert(Arc::as_ptr(&node)) {
                walk.push((node, true));
                walk.extend(children.into_iter().map(|child| (child, false)));
            }
        }
    }
}
