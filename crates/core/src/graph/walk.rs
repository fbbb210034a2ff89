//! Walks through the graph: the nodes and backends above a node, and the nodes below it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::edge::Owner;
use crate::epoch::Epochs;
use crate::{Backend, ChildIdx, Node};

/// Some nodes, all nodes above them, and the backends of all these nodes.
#[derive(Default)]
pub(super) struct Above {
    /// In the order in which the nodes were found.
    nodes: Vec<Arc<Node>>,
    pub(super) backends: Vec<Backend>,
}

impl Above {
    /// Walks up from `nodes`. Parents that are being opened are not found.
    pub(super) fn of(nodes: &[Arc<Node>]) -> Self {
        let mut above = Self::default();
        let mut seen = HashSet::new();
        let mut next = nodes.to_vec();
        while let Some(node) = next.pop() {
            if !seen.insert(Arc::as_ptr(&node)) {
                continue;
            }
            for edge in node.parents() {
                match edge.owner() {
                    Some(Owner::Node(parent, _)) => next.extend(parent.upgrade()),
                    Some(Owner::Backend(backend) | Owner::FixedBackend(backend)) => {
                        above.backends.extend(backend.upgrade());
                    }
                    None => {}
                }
            }
            above.nodes.push(node);
        }
        above
    }

    /// The nodes in an order in which each node comes after the nodes below it.
    pub(super) fn bottom_up(self) -> Vec<Arc<Node>> {
        // The number of children that are in the set and not yet in the order.
        let mut missing: HashMap<*const Node, usize> =
            self.nodes.iter().map(|node| (Arc::as_ptr(node), 0)).collect();
        let mut parents: HashMap<*const Node, Vec<Arc<Node>>> = HashMap::new();
        for node in &self.nodes {
            for (_, edge) in node.children().iter() {
                let child = Arc::as_ptr(edge.node());
                if !missing.contains_key(&child) {
                    continue;
                }
                if let Some(count) = missing.get_mut(&Arc::as_ptr(node)) {
                    *count = count.saturating_add(1);
                }
                parents.entry(child).or_default().push(Arc::clone(node));
            }
        }
        let is_ready = |node: &&Arc<Node>| missing.get(&Arc::as_ptr(node)) == Some(&0);
        let mut ready: Vec<_> = self.nodes.iter().filter(is_ready).cloned().collect();
        let mut ordered = Vec::new();
        while let Some(node) = ready.pop() {
            for parent in parents.remove(&Arc::as_ptr(&node)).unwrap_or_default() {
                if let Some(count) = missing.get_mut(&Arc::as_ptr(&parent)) {
                    *count = count.saturating_sub(1);
                    if *count == 0 {
                        ready.push(parent);
                    }
                }
            }
            ordered.push(node);
        }
        ordered
    }
}

/// `nodes` and all nodes above them, each once.
pub(crate) fn nodes_above(nodes: &[Arc<Node>]) -> Vec<Arc<Node>> {
    Above::of(nodes).nodes
}

/// The epochs that the requests of the backends above `node` enter. A request enters the epochs of formats only, if there are
/// any below its backend; so these need not be the epochs of `node` or of a node above it.
pub(crate) fn epochs_above(node: &Arc<Node>) -> Vec<Arc<Epochs>> {
    let mut found: Vec<Arc<Epochs>> = Vec::new();
    for backend in Above::of(std::slice::from_ref(node)).backends {
        for epochs in backend.epochs() {
            if !found.iter().any(|other| Arc::ptr_eq(other, &epochs)) {
                found.push(epochs);
            }
        }
    }
    found
}

/// A filter above `node` that must see all changes ([`DriverFactory::sees_all_changes`](crate::DriverFactory::sees_all_changes))
/// and would miss a change of `node` without requests to the filter. A filter without users needs no changes. The data of `same`
/// and of the nodes above does not change.
pub(crate) fn observer(node: &Arc<Node>, same: Option<&Arc<Node>>) -> Option<Arc<Node>> {
    let mut seen: HashSet<_> = same.map(Arc::as_ptr).into_iter().collect();
    let mut next = vec![Arc::clone(node)];
    while let Some(node) = next.pop() {
        if !seen.insert(Arc::as_ptr(&node)) {
            continue;
        }
        for edge in node.parents() {
            let Some(Owner::Node(parent, child)) = edge.owner() else { continue };
            let Some(parent) = parent.upgrade() else { continue };
            if !parent.factory().sees_all_changes() {
                next.push(parent);
            } else if *child == ChildIdx::FILE && parent.has_parents() {
                return Some(parent);
            }
        }
    }
    None
}

/// `top` and all nodes below it, each once.
pub(crate) fn nodes_below(top: &Arc<Node>) -> Vec<Arc<Node>> {
    nodes_from(std::slice::from_ref(top), |_| true)
}

/// The nodes `tops`, and the nodes that can be reached from `tops` through children that `follow` accepts. Each node is
/// listed once.
pub(crate) fn nodes_from(tops: &[Arc<Node>], follow: impl Fn(ChildIdx) -> bool) -> Vec<Arc<Node>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    let mut next = tops.to_vec();
    while let Some(node) = next.pop() {
        if seen.insert(Arc::as_ptr(&node)) {
            let children = node.children().iter().filter(|(child, _)| follow(*child));
            next.extend(children.map(|(_, edge)| Arc::clone(edge.node())));
            found.push(node);
        }
    }
    found
}

/// Whether `node` is `top` or is below it.
pub(crate) fn is_below(top: &Arc<Node>, node: &Arc<Node>) -> bool {
    nodes_below(top).iter().any(|below| Arc::ptr_eq(below, node))
}
