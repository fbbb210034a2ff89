//! Operations on all replication nodes of a graph. Each node changes in one step, and the nodes change one after another: the guest
//! is stopped at a checkpoint.

use std::sync::Arc;

use oxblk_core::{Graph, Node, Replication, ReplicationMode, Result};

/// The replication nodes of a graph.
fn nodes(graph: &Graph) -> Vec<Arc<Node>> {
    let nodes = graph.nodes().into_iter();
    nodes.filter(|node| node.driver().replication().is_some()).collect()
}

fn control(node: &Arc<Node>) -> Option<&dyn Replication> {
    node.driver().replication()
}

/// Starts all replications of a graph (`xen-set-replication` with `enable`).
///
/// # Errors
/// The first error ([`Replication::start`]). The replications that this call has started are stopped again.
pub async fn start_all(graph: &Graph, mode: ReplicationMode) -> Result<()> {
    let mut started: Vec<Arc<Node>> = Vec::new();
    for node in nodes(graph) {
        let Some(replication) = control(&node) else { continue };
        if let Err(error) = replication.start(graph, &node, mode).await {
            for node in started {
                let Some(replication) = control(&node) else { continue };
                if let Err(error) = replication.stop(graph, &node, false).await {
                    tracing::error!(node = node.name(), %error, "cannot stop a replication");
                }
            }
            return Err(error);
        }
        started.push(Arc::clone(&node));
    }
    Ok(())
}

/// Begins a new checkpoint of all replications of a graph (`xen-colo-do-checkpoint`).
///
/// # Errors
/// The first error ([`Replication::checkpoint`]). The remaining nodes keep their checkpoint.
pub async fn checkpoint_all(graph: &Graph) -> Result<()> {
    for node in nodes(graph) {
        if let Some(replication) = control(&node) {
            replication.checkpoint(graph).await?;
        }
    }
    Ok(())
}

/// Stops all replications of a graph (`xen-set-replication` without `enable`). With `failover`, the data that the guest sees is
/// kept.
///
/// # Errors
/// The first error ([`Replication::stop`]). The remaining replications go on. The call can be repeated.
pub async fn stop_all(graph: &Graph, failover: bool) -> Result<()> {
    for node in nodes(graph) {
        if let Some(replication) = control(&node) {
            replication.stop(graph, &node, failover).await?;
        }
    }
    Ok(())
}

/// Whether all replications of a graph work (`query-xen-replication-status`).
///
/// # Errors
/// The first error ([`Replication::check`]).
pub fn errors(graph: &Graph) -> Result<()> {
    nodes(graph).iter().filter_map(control).try_for_each(Replication::check)
}
