//! The root edge of a backend: the edge to the node at which the requests of the backend enter the graph.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Relaxed},
};

use arc_swap::ArcSwapOption;

use super::{Backend, no_medium};
use crate::driver::DriverKind;
use crate::epoch::Epochs;
use crate::graph::nodes_below;
use crate::node::SlowPathFlags;
use crate::{BlockEvent, Edge, Node, Result};

/// The root edge as one thread sees it. Each I/O thread has a separate reference count, so that requests of several
/// threads do not contend for one cache line.
pub(super) type Root = ArcSwapOption<RootEdge>;

// The alignment keeps the reference counts of different threads in different cache lines.
#[repr(align(128))]
pub(super) struct RootEdge {
    pub(super) edge: Arc<Edge>,
    pub(super) below: Arc<BelowRoot>,
}

/// What a request must know about the nodes below the root edge.
pub(super) struct BelowRoot {
    /// The epochs that each request enters. There is one for each set of nodes that were opened together.
    pub(super) epochs: Box<[Arc<Epochs>]>,
    /// Reads may write (copy-on-read).
    pub(super) reads_write: bool,
}

impl BelowRoot {
    fn of(root: &Arc<Node>) -> Self {
        let (mut epochs, mut reads_write) = (Vec::new(), false);
        for node in nodes_below(root) {
            reads_write |=
                node.has_gate(SlowPathFlags::COPY_ON_READ) || node.driver().reads_write();
            // Only formats free clusters that other requests may still use.
            let is_format = node.factory().kind() == DriverKind::Format;
            if is_format && !epochs.iter().any(|other| Arc::ptr_eq(other, node.epochs())) {
                epochs.push(Arc::clone(node.epochs()));
            }
        }
        if epochs.is_empty() {
            epochs.push(Arc::clone(root.epochs()));
        }
        Self { epochs: epochs.into(), reads_write }
    }
}

impl Backend {
    /// Sets the root edge of all threads. Only a [`Change`] calls this, while no request is in flight.
    pub(crate) fn store_root(&self, edge: Option<&Arc<Edge>>) {
        if let Some(edge) = edge
            && self.root().is_err()
        {
            self.0.reported_size.0.store(edge.size(), Relaxed);
        }
        let below = edge.map(|edge| (edge, Arc::new(BelowRoot::of(edge.node()))));
        for root in self.0.roots.iter() {
            root.store(below.as_ref().map(|(edge, below)| {
                let (edge, below) = (Arc::clone(edge), Arc::clone(below));
                Arc::new(RootEdge { edge, below })
            }));
        }
    }

    /// Looks again at the nodes below the root node. The caller has changed these nodes, and holds back the requests.
    pub(crate) fn update_root(&self) {
        if let Ok(root) = self.root() {
            self.store_root(Some(&root));
        }
    }

    /// The root edge.
    ///
    /// # Errors
    /// `ENOMEDIUM` when the backend is closed.
    pub fn root(&self) -> Result<Arc<Edge>> {
        self.0
            .roots
            .local()
            .load()
            .as_ref()
            .map(|root| Arc::clone(&root.edge))
            .ok_or_else(no_medium)
    }

    /// The epochs that a request enters.
    pub(crate) fn epochs(&self) -> Vec<Arc<Epochs>> {
        let root = self.0.roots.local().load();
        root.as_ref().map(|root| root.below.epochs.to_vec()).unwrap_or_default()
    }

    /// The root node.
    ///
    /// # Errors
    /// `ENOMEDIUM` when the backend is closed.
    pub fn node(&self) -> Result<Arc<Node>> {
        Ok(Arc::clone(self.root()?.node()))
    }

    /// Size in bytes; 0 when the backend is closed.
    pub fn size(&self) -> u64 {
        self.0.roots.local().load().as_ref().map_or(0, |root| root.edge.size())
    }

    /// Whether the root node is read-only. A closed backend is read-only too.
    pub fn is_read_only(&self) -> bool {
        self.0.roots.local().load().as_ref().is_none_or(|root| root.edge.node().is_read_only())
    }

    /// Reports [`BlockEvent::Resized`] if the size has changed since the last report.
    pub(crate) fn report_size(&self) {
        if self.0.is_fixed {
            // The backend of a job.
            return;
        }
        let Ok(node) = self.node() else { return };
        let size = node.size();
        if self.0.reported_size.0.swap(size, AcqRel) != size {
            let (source, node_name) = (self.event_source(), node.name().to_owned());
            self.0.graph.events().raise(&BlockEvent::Resized { source, node_name, size });
        }
    }
}

/// The size of the disk that was reported last. Another root node has no effect on it, a medium in an empty backend has.
#[derive(Default)]
pub(super) struct ReportedSize(AtomicU64);
