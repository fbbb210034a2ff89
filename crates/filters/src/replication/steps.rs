//! The work on the disks of a secondary while no request is in flight.

use std::sync::Arc;

use oxblk_core::{
    Action, BoxFuture, ChildIdx, Edge, Error, ErrorKind, Node, Perm, Result, Want, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::IoBufMut;

use super::stage::{Stage, StageCell};

/// Maximum number of bytes that are copied at a time.
const MAX_COPY: u64 = 1 << 20;

/// Begins a stage together with a change of the graph.
pub(super) struct SetStage {
    pub(super) stage: Arc<StageCell>,
    pub(super) next: Stage,
}

impl Action for SetStage {
    fn nodes(&self) -> Vec<Arc<Node>> {
        Vec::new()
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn commit(&mut self) {
        self.stage.set(self.next);
    }

    fn abort(&mut self) {}
}

/// Empties the active and the hidden disk.
pub(super) struct Empty {
    pub(super) disks: Vec<Arc<Node>>,
    /// The copy-before-write node that begins a new point in time.
    pub(super) copier: Option<Arc<Node>>,
    /// Nodes without work that no request may use.
    pub(super) others: Vec<Arc<Node>>,
    pub(super) stage: Arc<StageCell>,
    /// The stage after success.
    pub(super) next: Stage,
    /// The stage after a failure.
    pub(super) failed: Stage,
}

impl Action for Empty {
    fn nodes(&self) -> Vec<Arc<Node>> {
        self.disks.iter().chain(&self.copier).chain(&self.others).cloned().collect()
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            for disk in &self.disks {
                let emptied = empty(disk).await;
                emptied.map_err(|error| {
                    let name = disk.filename().unwrap_or_else(|| disk.name().to_owned());
                    error.prefix(format!("Failed to empty {name}"))
                })?;
            }
            Ok(())
        })
    }

    fn commit(&mut self) {
        if let Some(snapshot) =
            self.copier.as_ref().and_then(|node| node.driver().snapshot_access())
        {
            snapshot.restart();
        }
        self.stage.set(self.next);
    }

    fn abort(&mut self) {
        self.stage.set(self.failed);
    }
}

async fn empty(disk: &Arc<Node>) -> Result<()> {
    let is_writer = |edge: &Arc<Edge>| edge.permissions().taken.contains(Perm::WRITE);
    if disk.is_read_only() || !disk.parents().iter().any(is_writer) {
        return Err(Error::new(ErrorKind::Denied, "Block node is read-only"));
    }
    let Some(image) = disk.driver().backing() else {
        return Err(Error::unsupported("The driver cannot empty an image"));
    };
    image.make_empty().await
}

/// Copies the data of the hidden and the active disk to the secondary disk.
pub(super) struct CopyDown {
    pub(super) filter: Arc<Node>,
    pub(super) active: Arc<Node>,
    pub(super) hidden: Arc<Node>,
    pub(super) copier: Arc<Node>,
    pub(super) secondary: Arc<Node>,
    pub(super) stage: Arc<StageCell>,
}

impl Action for CopyDown {
    fn nodes(&self) -> Vec<Arc<Node>> {
        let nodes = [&self.filter, &self.active, &self.hidden, &self.copier, &self.secondary];
        nodes.into_iter().cloned().collect()
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let active = self.filter.children().require(ChildIdx::FILE)?;
            let secondary = self.copier.children().require(ChildIdx::FILE)?;
            let hidden = self.copier.children().iter().find(|(_, edge)| edge.name() == "target");
            let Some((_, hidden)) = hidden else { return Err(super::stage::not_running()) };
            copy_down(&active, &hidden, &secondary).await?;
            secondary.flush().await
        })
    }

    fn commit(&mut self) {
        self.stage.set(Stage::Complete);
    }

    fn abort(&mut self) {
        self.stage.set(Stage::FailoverFailed);
    }
}

/// Copies all data that the active disk has, and what the hidden disk has elsewhere.
async fn copy_down(active: &Edge, hidden: &Edge, secondary: &Edge) -> Result<()> {
    let end = secondary.size();
    let mut at = 0;
    while let Some(left) = end.checked_sub(at).filter(|left| *left > 0) {
        let status = active.block_status(at, left, Want::Precise).await?;
        let len = status.len.clamp(1, left);
        if status.is_allocated() {
            copy(active, secondary, at, len, status.is_zero()).await?;
        } else {
            copy_allocated(hidden, secondary, at, len).await?;
        }
        at = at.saturating_add(len);
    }
    Ok(())
}

/// Copies what one disk has of a range.
async fn copy_allocated(from: &Edge, to: &Edge, offset: u64, len: u64) -> Result<()> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    while let Some(left) = end.checked_sub(at).filter(|left| *left > 0) {
        let status = from.block_status(at, left, Want::Precise).await?;
        let len = status.len.clamp(1, left);
        if status.is_allocated() {
            copy(from, to, at, len, status.is_zero()).await?;
        }
        at = at.saturating_add(len);
    }
    Ok(())
}

async fn copy(from: &Edge, to: &Edge, offset: u64, len: u64, is_zero: bool) -> Result<()> {
    if is_zero {
        return to.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await;
    }
    let end = offset.saturating_add(len);
    let mut at = offset;
    while let Some(left) = end.checked_sub(at).filter(|left| *left > 0) {
        let len = left.min(MAX_COPY);
        let buf = IoBufMut::new(usize::try_from(len).unwrap_or(usize::MAX));
        let data = from.read(at, buf).await?;
        to.write(at, data.freeze(), WriteFlags::empty()).await?;
        at = at.saturating_add(len);
    }
    Ok(())
}
