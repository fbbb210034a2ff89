//! Queries the block status of one node, and of a backing chain.

use std::sync::Arc;

use crate::driver::{BoxFuture, Want};
use crate::{ChildIdx, Node, Result, Status, StatusFlags};

/// The status of the start of `offset..offset + len` in this node. The backing file is not queried; only its size is
/// used.
pub(crate) async fn block_status(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    want: Want,
) -> Result<Status> {
    let mut status = own_status(node, offset, len, want).await?;
    if want == Want::Precise {
        ask_child(node, &mut status).await?;
    }
    Ok(completed(node, offset, status))
}

/// The status that the driver of this node reports.
async fn own_status(node: &Arc<Node>, offset: u64, len: u64, want: Want) -> Result<Status> {
    let size = node.size();
    let len = len.min(size.saturating_sub(offset));
    if len == 0 {
        return Ok(Status { len: 0, flags: StatusFlags::EOF, host: None, child: None });
    }
    let mut status = match node.driver().block_status(offset, len, want) {
        Some(request) => request.await.map_err(|error| error.on_node(node.name()).at(offset))?,
        None => Status::mapped(len, ChildIdx::FILE, offset),
    };
    status.len = status.len.clamp(1, len);
    Ok(status)
}

/// Completes a status with the sizes of the node and of its backing file: sets the flags for zeroes and for the end,
/// and limits the length.
fn completed(node: &Node, offset: u64, mut status: Status) -> Status {
    if status.len == 0 {
        return status;
    }
    if !status.is_allocated() {
        zero_without_backing(node, offset, &mut status);
    }
    if offset.saturating_add(status.len) >= node.size() {
        status.flags |= StatusFlags::EOF;
    }
    status
}

/// The status of one image of a chain, and the node that reports the status. If the image only forwards the data of its
/// child, the status is that of the child's own chain. For example, a raw node above a qcow2 image stores no data
/// itself.
async fn layer_status(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    want: Want,
) -> Result<(Status, Arc<Node>)> {
    let mut status = own_status(node, offset, len, want).await?;
    if let (true, Some(index), Some(host)) =
        (status.flags.contains(StatusFlags::PASSED_ON), status.child, status.host)
        && let Some(child) = node.child(index).filter(|child| host < child.size())
    {
        let below: BoxFuture<'_, Result<ChainStatus>> =
            Box::pin(status_above(&child, None, host, status.len, want));
        let below = below.await?;
        return Ok((below.status, below.node));
    }
    if want == Want::Precise {
        ask_child(node, &mut status).await?;
    }
    Ok((completed(node, offset, status), Arc::clone(node)))
}

/// If a child contains the data unchanged, queries the child, because the child may know that the range is a hole.
async fn ask_child(node: &Arc<Node>, status: &mut Status) -> Result<()> {
    let asks = StatusFlags::RECURSE | StatusFlags::OFFSET_VALID;
    let (true, Some(child), Some(host)) = (status.flags.contains(asks), status.child, status.host)
    else {
        return Ok(());
    };
    let Some(child) = node.child(child) else { return Ok(()) };
    if host >= child.size() {
        // Past the end of the file, the range reads as zeroes.
        status.flags |= StatusFlags::ZERO;
        if status.flags.contains(StatusFlags::PASSED_ON) {
            status.flags -= StatusFlags::DATA;
        }
        return Ok(());
    }
    let below: BoxFuture<'_, Result<Status>> =
        Box::pin(block_status(&child, host, status.len, Want::Precise));
    let below = below.await?;
    status.len = status.len.min(below.len.max(1));
    if below.is_zero() {
        status.flags |= StatusFlags::ZERO;
    }
    if status.flags.contains(StatusFlags::PASSED_ON) && !below.flags.contains(StatusFlags::DATA) {
        status.flags -= StatusFlags::DATA;
    }
    Ok(())
}

/// Completes the status of a range that this node has not allocated: the range reads as zeroes without a backing file
/// and past the end of the backing file.
fn zero_without_backing(node: &Node, offset: u64, status: &mut Status) {
    match node.child(ChildIdx::BACKING) {
        None => status.flags |= StatusFlags::ZERO,
        Some(backing) => {
            let end = backing.size();
            if offset >= end {
                status.flags |= StatusFlags::ZERO;
            } else {
                status.len = status.len.min(end - offset);
            }
        }
    }
}

/// The status of a range in a backing chain: the status in the image that determines the contents of the range.
#[derive(Debug, Clone)]
pub struct ChainStatus {
    /// The status in this image. Without `ALLOCATED`, no queried image has allocated the range.
    pub status: Status,
    /// Number of images above this image, without filters; 0 for the top.
    pub depth: u32,
    /// The node that reports the status: the node of this image, or, if this node only forwards the data of its child,
    /// a node below it.
    pub node: Arc<Node>,
}

/// The status of the start of a range from `top` down to, but not including, `base`.
pub(crate) async fn status_above(
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    offset: u64,
    len: u64,
    want: Want,
) -> Result<ChainStatus> {
    let mut node = top.skip_filters();
    let base = base.map(Node::skip_filters);
    let mut depth = 0_u32;
    let mut len = len.min(top.size().saturating_sub(offset));
    loop {
        let (mut status, holder) = layer_status(&node, offset, len, want).await?;
        if status.len == 0 && len > 0 {
            // This image is shorter than the images above it: the rest reads as zeroes.
            status = Status {
                len,
                flags: StatusFlags::ZERO | StatusFlags::ALLOCATED,
                host: None,
                child: None,
            };
        }
        len = len.min(status.len);
        if offset.saturating_add(len) >= top.size() {
            status.flags |= StatusFlags::EOF;
        } else {
            status.flags -= StatusFlags::EOF;
        }
        let below = node.child(ChildIdx::BACKING).map(|below| below.skip_filters());
        let stop = status.is_allocated() || status.is_zero();
        match below {
            Some(below)
                if !stop && !base.as_ref().is_some_and(|base| Arc::ptr_eq(base, &below)) =>
            {
                node = below;
                depth = depth.saturating_add(1);
            }
            _ => {
                status.len = len;
                return Ok(ChainStatus { status, depth, node: holder });
            }
        }
    }
}
