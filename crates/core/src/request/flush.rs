//! Flush: making completed writes durable, once.

use std::sync::Arc;
use std::sync::atomic::Ordering::AcqRel;

use crate::driver::BoxFuture;
use crate::{ChildIdx, Node, Result};

/// Makes every write completed through `node` durable.
///
/// Flushes of one node follow one another: one that finds nothing new since the last has nothing to do, and that
/// last one has ended by then.
pub(crate) async fn flush(node: &Arc<Node>) -> Result<()> {
    let _turn = node.flushing.lock().await;
    if !node.unflushed.swap(false, AcqRel) {
        return Ok(());
    }
    for (child, edge) in node.children().iter() {
        if child != ChildIdx::BACKING {
            edge.node().mark_unflushed();
        }
    }
    let unflushed = Unflushed(node);
    let outcome = flush_driver(node).await;
    if outcome.is_ok() {
        std::mem::forget(unflushed);
    }
    outcome.map_err(|error| error.on_node(node.name()))
}

/// What a flush that failed or was given up did not make durable is still to be flushed.
struct Unflushed<'a>(&'a Node);

impl Drop for Unflushed<'_> {
    fn drop(&mut self) {
        self.0.mark_unflushed();
    }
}

async fn flush_driver(node: &Arc<Node>) -> Result<()> {
    if let Some(request) = node.driver().flush() {
        return request.await;
    }
    for (child, edge) in node.children().iter() {
        if child != ChildIdx::BACKING {
            let below: BoxFuture<'_, Result<()>> = Box::pin(flush(edge.node()));
            below.await?;
        }
    }
    Ok(())
}
