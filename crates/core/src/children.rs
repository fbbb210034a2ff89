//! The children of a node.
//!
//! Most nodes have at most three children: a file, a backing file and a data file. These have slots of their own, so the request
//! path finds them quickly. All other children (the children of a quorum, the extents of an image) are in a list.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};

use crate::perm::Roles;
use crate::{DebugEvent, Edge, Errno, Error, Result};

/// Identifies a child of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChildIdx(u32);

impl ChildIdx {
    /// The primary child.
    pub const FILE: Self = Self(0);
    /// The backing file.
    pub const BACKING: Self = Self(1);
    /// An external data file.
    pub const DATA: Self = Self(2);
    /// The children that have slots of their own.
    pub(crate) const SLOTS: [Self; 3] = [Self::FILE, Self::BACKING, Self::DATA];

    /// The name of the option that describes a child with a slot. The names of all children are those of their edges
    /// ([`Edge::name`]).
    pub fn name(self) -> &'static str {
        match self {
            Self::BACKING => "backing",
            Self::DATA => "data-file",
            Self::FILE => "file",
            _ => "child",
        }
    }

    /// The child at a position of the list of further children.
    fn further(at: u32) -> Self {
        Self(at.saturating_add(3))
    }
}

/// A child with a slot that a driver can have, and the roles of the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildSpec {
    /// The child.
    pub child: ChildIdx,
    /// The name of the option that describes the child, and the name of the edge.
    pub name: &'static str,
    /// The purposes for which the node uses the child.
    pub roles: Roles,
}

impl ChildSpec {
    /// The file of a format.
    pub const IMAGE: Self = Self { child: ChildIdx::FILE, name: "file", roles: Roles::IMAGE };
    /// The child of a filter.
    pub const FILTERED: Self = Self { child: ChildIdx::FILE, name: "file", roles: Roles::FILTER };
    /// The backing file of a format.
    pub const BACKING: Self = Self { child: ChildIdx::BACKING, name: "backing", roles: Roles::COW };
    /// The data file of a format.
    pub const DATA: Self = Self { child: ChildIdx::DATA, name: "data-file", roles: Roles::DATA };
}

/// A child that has no slot.
type Further = (ChildIdx, Arc<Edge>);

/// A node's children, shared by the node and its driver. A lookup takes no lock.
pub struct Children {
    slots: [ArcSwapOption<Edge>; 3],
    further: ArcSwap<Vec<Further>>,
    /// The number of further children that there have been. The identifier of a removed child is not used again.
    further_count: AtomicU32,
}

impl Default for Children {
    fn default() -> Self {
        Self {
            slots: Default::default(),
            further: ArcSwap::from_pointee(Vec::new()),
            further_count: AtomicU32::new(0),
        }
    }
}

impl Children {
    /// Children that are used without a node, through edges that another user owns.
    pub fn of(edges: impl IntoIterator<Item = (ChildIdx, Arc<Edge>)>) -> Self {
        let children = Self::default();
        for (child, edge) in edges {
            children.set(child, Some(edge));
        }
        children
    }

    /// An identifier for a further child. No other child of this node has had it.
    pub(crate) fn new_further(&self) -> ChildIdx {
        ChildIdx::further(self.further_count.fetch_add(1, Relaxed))
    }

    fn slot(&self, child: ChildIdx) -> Option<&ArcSwapOption<Edge>> {
        let [file, backing, data] = &self.slots;
        match child {
            ChildIdx::FILE => Some(file),
            ChildIdx::BACKING => Some(backing),
            ChildIdx::DATA => Some(data),
            _ => None,
        }
    }

    /// The edge to a child, borrowed for a short time. For a child with a slot this call is cheap, because it does not change
    /// the edge's reference count.
    pub(crate) fn peek(&self, child: ChildIdx) -> Guard<Option<Arc<Edge>>> {
        match self.slot(child) {
            Some(slot) => slot.load(),
            None => Guard::from_inner(self.get(child)),
        }
    }

    /// Reports a debug event to a child. If the child receives no debug events, this function only tests a flag.
    pub async fn debug_event(&self, child: ChildIdx, event: DebugEvent) {
        let receives = |edge: &Arc<Edge>| edge.node().takes_debug_events();
        let edge = self.peek(child).as_ref().filter(|edge| receives(edge)).map(Arc::clone);
        if let Some(edge) = edge {
            edge.debug_event(event).await;
        }
    }

    /// The edge to a child.
    pub fn get(&self, child: ChildIdx) -> Option<Arc<Edge>> {
        match self.slot(child) {
            Some(slot) => slot.load_full(),
            None => {
                let further = self.further.load();
                let found = further.iter().find(|(other, _)| *other == child);
                found.map(|(_, edge)| Arc::clone(edge))
            }
        }
    }

    /// Whether the node has this child. This call is cheap enough for [`crate::Driver::map`].
    pub fn has(&self, child: ChildIdx) -> bool {
        match self.slot(child) {
            Some(slot) => slot.load().is_some(),
            None => self.further.load().iter().any(|(other, _)| *other == child),
        }
    }

    /// The edge to a child. A missing child is an error.
    ///
    /// # Errors
    /// `ENOMEDIUM` when the node does not have this child.
    pub fn require(&self, child: ChildIdx) -> Result<Arc<Edge>> {
        self.get(child).ok_or_else(|| Error::from_errno(Errno::NOMEDIUM).prefix(child.name()))
    }

    /// Sets the edge to a child and returns the previous edge. Call this only while the node accepts no requests.
    pub(crate) fn set(&self, child: ChildIdx, edge: Option<Arc<Edge>>) -> Option<Arc<Edge>> {
        if let Some(slot) = self.slot(child) {
            return slot.swap(edge);
        }
        let mut further = Vec::clone(&self.further.load());
        let at = further.binary_search_by_key(&child, |(other, _)| *other);
        let old = match (at, edge) {
            (Ok(at), Some(edge)) => {
                further.get_mut(at).map(|(_, old)| std::mem::replace(old, edge))
            }
            (Ok(at), None) => Some(further.remove(at).1),
            (Err(at), Some(edge)) => {
                further.insert(at, (child, edge));
                None
            }
            (Err(_), None) => None,
        };
        self.further.store(Arc::new(further));
        old
    }

    /// Removes all children and returns their edges.
    pub(crate) fn take(&self) -> Vec<Arc<Edge>> {
        let slots = ChildIdx::SLOTS.into_iter().filter_map(|child| self.set(child, None));
        let mut edges: Vec<_> = slots.collect();
        let further = self.further.swap(Arc::default());
        edges.extend(further.iter().map(|(_, edge)| Arc::clone(edge)));
        edges
    }

    /// The children, in a stable order.
    pub fn iter(&self) -> impl Iterator<Item = (ChildIdx, Arc<Edge>)> + '_ {
        let slots = ChildIdx::SLOTS.into_iter();
        let slots = slots.filter_map(|child| self.get(child).map(|edge| (child, edge)));
        let further = Vec::clone(&self.further.load());
        slots.chain(further)
    }
}
