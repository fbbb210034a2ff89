//! Flush: makes the host write the data of all completed writes of a node to stable storage. Without writes since the
//! last flush, a flush does nothing.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::{ChildIdx, DebugEvent, Node, Result};

/// Flushes every write that has completed through `node` to stable storage.
///
/// Flushes of one node run one after the other. So if a flush finds no write since the last flush, the last flush has
/// ended, and there is nothing to do.
pub(crate) async fn flush(node: &Arc<Node>) -> Result<()> {
    let _control = node.flushing.lock().await;
    node.children().debug_event(ChildIdx::FILE, DebugEvent::FlushToOs).await;
    if !node.unflushed.take() {
        return Ok(());
    }
    for (child, edge) in node.children().iter() {
        if child != ChildIdx::BACKING {
            edge.node().mark_unflushed();
        }
    }
    let remark = Remark(node);
    let outcome = flush_driver(node).await;
    if outcome.is_ok() {
        std::mem::forget(remark);
    }
    outcome.map_err(|error| error.on_node(node.name()))
}

/// Marks the node as unflushed again when its flush fails or is cancelled.
struct Remark<'a>(&'a Node);

impl Drop for Remark<'_> {
    fn drop(&mut self) {
        self.0.mark_unflushed();
    }
}

async fn flush_driver(node: &Arc<Node>) -> Result<()> {
    if let Some(request) = node.driver().flush() {
        return request.await;
    }
    node.children().debug_event(ChildIdx::FILE, DebugEvent::FlushToDisk).await;
    for (child, edge) in node.children().iter() {
        if child != ChildIdx::BACKING {
            let below: BoxFuture<'_, Result<()>> = Box::pin(flush(edge.node()));
            below.await?;
        }
    }
    Ok(())
}
