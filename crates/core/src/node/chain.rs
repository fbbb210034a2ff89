//! The links of backing chains: the ways from a node to the node whose data it shows.

use std::sync::Arc;

use crate::driver::DriverKind;
use crate::perm::Roles;
use crate::{ChildIdx, Edge, Node};

impl Node {
    /// The edge to the backing file. Where the node has no data of its own, it shows the data of its backing file.
    pub fn cow_child(&self) -> Option<Arc<Edge>> {
        self.children.get(ChildIdx::BACKING)
    }

    /// The edge to the node that this filter shows unchanged. `None` if the node is no filter.
    pub fn filtered_child(&self) -> Option<Arc<Edge>> {
        if self.factory.kind() != DriverKind::Filter {
            return None;
        }
        self.children
            .iter()
            .map(|(_, edge)| edge)
            .find(|edge| edge.roles().contains(Roles::FILTERED))
    }

    /// The roles of a child with a slot.
    pub(crate) fn roles_of(&self, child: ChildIdx) -> Roles {
        let spec = self.factory.children().iter().find(|spec| spec.child == child);
        spec.map_or(Roles::empty(), |spec| spec.roles)
    }

    /// The name of the option that describes a child with a slot.
    pub fn child_name(&self, child: ChildIdx) -> &'static str {
        let spec = self.factory.children().iter().find(|spec| spec.child == child);
        spec.map_or(child.name(), |spec| spec.name)
    }

    /// The first node that is no filter, from this node down.
    pub fn skip_filters(self: &Arc<Self>) -> Arc<Self> {
        let mut node = Arc::clone(self);
        while let Some(below) = node.filtered_child() {
            node = Arc::clone(below.node());
        }
        node
    }

    /// The first node that is no implicit filter, from this node down ([`Node::make_implicit`]).
    pub fn skip_implicit_filters(self: &Arc<Self>) -> Arc<Self> {
        let mut node = Arc::clone(self);
        while node.is_implicit()
            && let Some(below) = node.filtered_child()
        {
            node = Arc::clone(below.node());
        }
        node
    }

    /// The edge of a backing chain that leads down from this node: to the filtered node of a filter, or to the backing file.
    pub fn filter_or_cow_child(&self) -> Option<Arc<Edge>> {
        self.filtered_child().or_else(|| self.cow_child())
    }
}
