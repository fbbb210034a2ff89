//! Compaction: returns unused space of an image to the host, without copying the image.
//!
//! Compaction works in steps. The node is drained for each step, so no request uses a cluster while the cluster is
//! moved. Requests resume between two steps. A step moves a bounded number of bytes, so an image can be compacted while
//! it is in use.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::perm::Perm;
use crate::{Backend, Errno, Error, Node, Result};

/// The result of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Bytes moved towards the start of the file.
    pub moved: u64,
    /// Estimated number of bytes that still have to move.
    pub left: u64,
    /// The structure at the end of the file that cannot be moved, if there is one. The compaction ends at this
    /// structure.
    pub obstacle: Option<&'static str>,
}

/// The interface of formats that can be compacted. [`Backend::compact`] drains the node before each call.
pub trait Compact: Send + Sync {
    /// Moves up to `most` bytes from the end of the file into free space nearer to the start of the file. A step that
    /// moves nothing is the last step.
    fn step(&self, most: u64) -> BoxFuture<'_, Result<Step>>;

    /// Returns free space to the host: truncates free space at the end of the file, and punches holes from the byte
    /// offset `from` on. Returns the offset where the next call continues, if there is more to do.
    fn release(&self, from: u64) -> BoxFuture<'_, Result<Option<u64>>>;
}

/// The result of a compaction. Sizes are in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Data moved towards the start of the file.
    pub moved: u64,
    /// Length of the file before and after.
    pub length: (u64, u64),
    /// Space that the file occupies on the host before and after, if the host reports it.
    pub stored: Option<(u64, u64)>,
    /// The structure at the end of the file that could not be moved, if there is one.
    pub obstacle: Option<&'static str>,
}

fn of(node: &Node) -> Result<&dyn Compact> {
    node.driver().compact().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Backend {
    /// Compacts the image. A step moves at most `at_once` bytes, and requests are held back during each step. After
    /// each step, `go_on` receives the total number of bytes moved and the estimated number of bytes left. If `go_on`
    /// returns false, no more data is moved, and only the free space is returned to the host.
    ///
    /// # Errors
    /// `ENOTSUP` if the format cannot be compacted; `EPERM` without write permission; the errors of the image's driver. The
    /// image is valid even after an error.
    pub async fn compact(
        &self,
        at_once: u64,
        go_on: &dyn Fn(u64, u64) -> bool,
    ) -> Result<Compacted> {
        let edge = self.root()?;
        let node = edge.node();
        of(node)?;
        if !edge.permissions().taken.contains(Perm::WRITE) {
            return Err(Error::from_errno(Errno::PERM));
        }
        let before = measured(node);
        let mut done = Compacted::default();
        loop {
            let step = move |node: Arc<Node>| async move {
                node.mark_unflushed();
                of(&node)?.step(at_once).await
            };
            let step = self.graph().run_exclusive(node, self.while_writer(step)).await?;
            done.moved = done.moved.saturating_add(step.moved);
            done.obstacle = step.obstacle;
            if !go_on(done.moved, step.left) || step.moved == 0 {
                break;
            }
            oxblk_ring::yield_now().await;
        }
        let mut from = Some(0);
        while let Some(offset) = from {
            let release = move |node: Arc<Node>| async move { of(&node)?.release(offset).await };
            from = self.graph().run_exclusive(node, self.while_writer(release)).await?;
            oxblk_ring::yield_now().await;
        }
        let after = measured(node);
        done.length = (before.0, after.0);
        done.stored = before.1.zip(after.1);
        Ok(done)
    }
}

/// Length of the node's file, and the space that the file occupies on the host. Without a file, the length is 0.
fn measured(node: &Node) -> (u64, Option<u64>) {
    let file = node.children().get(crate::ChildIdx::FILE);
    file.map_or((0, None), |edge| (edge.size(), edge.node().driver().allocated_size()))
}
