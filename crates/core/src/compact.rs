//! Compaction: giving space that an image does not use back to the host, without copying the image.
//!
//! It goes in steps. For each the node is drained, so that what moves is in nobody's hands; between two steps requests
//! go on. A step is bounded by the bytes that it moves, so an image can be compacted while it is used.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::perm::Perm;
use crate::{Backend, Errno, Error, Node, Result};

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Bytes moved towards the front of the file.
    pub moved: u64,
    /// Bytes that are left to be moved, as far as is known.
    pub left: u64,
    /// What stands at the end of the file and stays there; nothing more is moved then.
    pub obstacle: Option<&'static str>,
}

/// Offered by formats that can be compacted. Core has drained the node of other requests.
pub trait Compact: Send + Sync {
    /// Moves up to `most` bytes from the end of the file into free space in front of them. A step that moves nothing is
    /// the last one.
    fn step(&self, most: u64) -> BoxFuture<'_, Result<Step>>;

    /// Gives free space to the host: cuts off what is free at the end, and punches holes from the byte offset `from` of
    /// the file on. Gives where to go on, if there is more to do.
    fn release(&self, from: u64) -> BoxFuture<'_, Result<Option<u64>>>;
}

/// What a compaction did. Sizes are in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Moved towards the front of the file.
    pub moved: u64,
    /// Length of the file before and after.
    pub length: (u64, u64),
    /// What the host stores of the file before and after, where it tells.
    pub stored: Option<(u64, u64)>,
    /// What stands at the end of the file and could not be moved.
    pub obstacle: Option<&'static str>,
}

fn of(node: &Node) -> Result<&dyn Compact> {
    node.driver().compact().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Backend {
    /// Compacts the image, at most `at_once` bytes for each time that requests are held back. `go_on` is told of the bytes
    /// that have been moved and those that are left; nothing more is moved once it says no.
    ///
    /// # Errors
    /// `ENOTSUP` where the format cannot be compacted; without the permission to write; as the image reports. The image is
    /// whole then.
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
            let step = self.graph().run_exclusive(node, step).await?;
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
            from = self.graph().run_exclusive(node, release).await?;
            oxblk_ring::yield_now().await;
        }
        let after = measured(node);
        done.length = (before.0, after.0);
        done.stored = before.1.zip(after.1);
        Ok(done)
    }
}

/// Length of the file, and what the host stores of it.
fn measured(node: &Node) -> (u64, Option<u64>) {
    let file = node.children().get(crate::ChildIdx::FILE);
    file.map_or((0, None), |edge| (edge.size(), edge.node().driver().allocated_size()))
}
