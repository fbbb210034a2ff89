//! Work of a driver that no request waits for.

use std::sync::Arc;

use oxblk_ring::Shard;

use crate::driver::DriverKind;
use crate::epoch::Epochs;
use crate::graph::nodes_from;
use crate::{Children, Node};

/// Counts work of a driver that no request waits for in the epochs of the nodes that the work uses. So clusters that the work
/// has mapped are not used for other data until the value is dropped.
///
/// The driver also makes drains wait for such work; see [`Drain::idle`](crate::driver::Drain::idle).
#[must_use]
pub struct Background {
    shard: Shard,
    /// The epochs that the work has entered.
    entered: Vec<(Arc<Epochs>, u64)>,
}

impl Background {
    /// Begins work that uses `children` and the nodes below them. Call this while a request of the driver is in progress, so
    /// that the work is counted without a gap.
    pub fn begin(children: &Children) -> Self {
        let nodes: Vec<Arc<Node>> =
            children.iter().map(|(_, edge)| Arc::clone(edge.node())).collect();
        let shard = Shard::current();
        let mut entered: Vec<(Arc<Epochs>, u64)> = Vec::new();
        for node in nodes_from(&nodes, |_| true) {
            // Only formats free clusters that other requests may still use.
            let is_format = node.factory().kind() == DriverKind::Format;
            if is_format && !entered.iter().any(|(other, _)| Arc::ptr_eq(other, node.epochs())) {
                let epochs = Arc::clone(node.epochs());
                let epoch = epochs.enter_at(shard);
                entered.push((epochs, epoch));
            }
        }
        Self { shard, entered }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for (epochs, epoch) in &self.entered {
            epochs.leave(self.shard, *epoch);
        }
    }
}

impl std::fmt::Debug for Background {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Background").finish_non_exhaustive()
    }
}
