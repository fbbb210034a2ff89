//! The capability of the filter `replication`.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::{Graph, Node, Result};

/// The side of a replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationMode {
    /// The side that sends its writes to the other side.
    Primary,
    /// The side that receives the writes.
    Secondary,
}

/// Control of a replication node. `graph` and `node` are the graph and the node of the driver. The functions wait for one another.
pub trait Replication: Send + Sync {
    /// Begins the replication.
    ///
    /// # Errors
    /// When the replication runs already, when the node has another mode, or when the nodes below are not suitable. After an
    /// error, the replication does not run.
    fn start<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Arc<Node>,
        mode: ReplicationMode,
    ) -> BoxFuture<'a, Result<()>>;

    /// Begins a new checkpoint: the changes of the guest are discarded, and the guest sees the present data of the secondary disk.
    ///
    /// # Errors
    /// When the replication does not run, or when the changes cannot be discarded.
    fn checkpoint<'a>(&'a self, graph: &'a Graph) -> BoxFuture<'a, Result<()>>;

    /// Ends the replication. With `failover`, the data that the guest sees is kept. Otherwise, the changes of the guest since the
    /// last checkpoint are discarded.
    ///
    /// # Errors
    /// When the replication does not run, or when data cannot be copied or discarded.
    fn stop<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Arc<Node>,
        failover: bool,
    ) -> BoxFuture<'a, Result<()>>;

    /// Whether the replication works.
    ///
    /// # Errors
    /// When the replication has not been started, or when an error occurred.
    fn check(&self) -> Result<()>;
}
