//! Handles requests that do not have the alignment that a node requires.
//!
//! A misaligned read reads the surrounding blocks. A misaligned write is a read-modify-write: it reads the incomplete
//! blocks at the start and the end of the range, inserts the data, and writes all blocks of the range. No other write
//! may change these blocks between the read and the write. Three rules ensure this:
//!
//! - A read-modify-write holds the node's `serialise` range lock on the blocks, and is counted as a serialising
//!   request. So writes that start later go through [`write_counted`] and wait for the lock.
//! - Writes that started earlier are counted in `aligned_writes`, and the read-modify-write waits for those that overlap it.
//!   Therefore a counted write never waits for the lock: a write leaves the count before it waits.
//! - The node's size grows before the lock is released or a counted write leaves the count. So a later writer reads the
//!   data that was written, not zeroes past the old end of the node.
//!
//! On the fast path only a leaf counts its writes. So a write takes the slow path at a node that is not a leaf and has
//! an alignment of more than one byte. Copy-on-read holds back other changes in the same way. A node with an alignment
//! of one byte and without copy-on-read does not use this module, so the module costs such a node nothing.

use std::future::Future;
use std::sync::Arc;

use oxblk_ring::{IoBuf, IoBufMut};

use super::{as_u64, min_len, slow};
use crate::node::SlowPathFlags;
use crate::{DebugEvent, Errno, Error, Node, Result, WriteFlags};

impl Node {
    /// Whether memory at `address` has the alignment that the node's host file requires.
    pub(super) fn takes_memory_at(&self, address: usize) -> bool {
        let mask = u64::from(self.mem_alignment()).saturating_sub(1);
        as_u64(address) & mask == 0
    }
}

/// Whether offset and length have the alignment that the node requires.
pub(super) fn is_aligned(node: &Node, offset: u64, len: u64) -> bool {
    let mask = u64::from(node.request_alignment()).saturating_sub(1);
    (offset | len) & mask == 0
}

/// Whether offset, length and memory have the alignment that the node requires.
pub(super) fn fits(node: &Node, offset: u64, len: usize, address: usize) -> bool {
    is_aligned(node, offset, as_u64(len)) && node.takes_memory_at(address)
}

/// The start and length of the aligned range around a request.
fn around(node: &Node, offset: u64, len: usize) -> Result<(u64, usize)> {
    let alignment = u64::from(node.request_alignment().max(1));
    let start = offset - offset % alignment;
    let end = offset
        .checked_add(as_u64(len))
        .and_then(|end| end.checked_next_multiple_of(alignment))
        .ok_or_else(|| slow::out_of_range(node, offset))?;
    let len = usize::try_from(end - start).map_err(|_| slow::out_of_range(node, offset))?;
    Ok((start, len))
}

/// Reads the blocks around the request into a bounce buffer and copies the requested range.
pub(super) async fn read(node: &Arc<Node>, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    let (start, len) = around(node, offset, buf.len())?;
    let bounce = slow::read_aligned(node, start, IoBufMut::new(len)).await?;
    let skip = min_len(offset - start, len);
    let wanted = bounce.get(skip..).and_then(|rest| rest.get(..buf.len()));
    buf.copy_from_slice(wanted.ok_or_else(|| Error::from_errno(Errno::IO).on_node(node.name()))?);
    Ok(buf)
}

/// Carries out a change of a range alone: waits for the counted requests in flight that overlap the range, and holds back
/// those that begin later. `start..start + len` is aligned.
pub(super) async fn alone<T>(
    node: &Arc<Node>,
    start: u64,
    len: u64,
    change: impl Future<Output = T>,
) -> T {
    let range = start..start.saturating_add(len);
    let _lock = node.serialise.lock(range.clone()).await;
    let _gate = Serialising::begin(node);
    oxblk_ring::perturb::point();
    node.aligned_writes.wait_for(range).await;
    change.await
}

/// Writes data [`alone`], at any alignment.
pub(super) async fn write_alone(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let (start, len) = around(node, offset, data.len())?;
    let write = async {
        if is_aligned(node, offset, as_u64(data.len())) {
            slow::write_pieces(node, offset, in_aligned_memory(node, data), flags).await
        } else {
            read_modify_write(node, offset, data, flags).await
        }
    };
    alone(node, start, as_u64(len), write).await
}

/// Reads the incomplete blocks at the start and the end of the range, inserts `data`, and writes all blocks.
async fn read_modify_write(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let (start, len) = around(node, offset, data.len())?;
    let mut bounce = IoBufMut::zeroed(len);
    let block = usize::try_from(node.request_alignment()).unwrap_or(usize::MAX).min(len);
    let skip = min_len(offset - start, len);
    let size = node.size();
    let tail = skip.saturating_add(data.len());
    let last = len - block;
    if skip > 0 {
        node.debug_event(DebugEvent::PwritevRmwHead).await;
        if last == 0 && tail < len {
            node.debug_event(DebugEvent::PwritevRmwTail).await;
        }
        bounce = fill_block(node, start, bounce, 0, block).await?;
        node.debug_event(DebugEvent::PwritevRmwAfterHead).await;
        if last == 0 && tail < len {
            node.debug_event(DebugEvent::PwritevRmwAfterTail).await;
        }
    }
    if tail < len && (last > 0 || skip == 0) && start.saturating_add(as_u64(last)) < size {
        node.debug_event(DebugEvent::PwritevRmwTail).await;
        bounce = fill_block(node, start, bounce, last, block).await?;
        node.debug_event(DebugEvent::PwritevRmwAfterTail).await;
    }
    let hole = bounce.get_mut(skip..tail).ok_or_else(|| slow::out_of_range(node, offset))?;
    hole.copy_from_slice(&data);
    // The last block may reach past the end of the node; the driver writes whole blocks.
    slow::write_pieces(node, start, bounce.freeze(), flags).await
}

/// Reads a block into `bounce` at offset `at`. `bounce` is for the contents of the node from `start` on.
async fn fill_block(
    node: &Arc<Node>,
    start: u64,
    mut bounce: IoBufMut,
    at: usize,
    block: usize,
) -> Result<IoBufMut> {
    let part =
        slow::read_pieces(node, start.saturating_add(as_u64(at)), IoBufMut::new(block)).await?;
    if let Some(place) = bounce.get_mut(at..).and_then(|rest| rest.get_mut(..block)) {
        place.copy_from_slice(&part);
    }
    Ok(bounce)
}

/// Writes data whose offset and length are aligned, in turn with other writes (see [`in_turn`]). Data at a misaligned
/// address in memory is copied first.
pub(super) async fn write_counted(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let data = in_aligned_memory(node, data);
    let len = as_u64(data.len());
    in_turn(node, offset, len, slow::write_pieces(node, offset, data, flags)).await
}

/// The data, or a copy of it if its address does not have the alignment that the node requires.
fn in_aligned_memory(node: &Node, data: IoBuf) -> IoBuf {
    match node.takes_memory_at(data.as_ptr().addr()) {
        true => data,
        false => IoBufMut::copy_from(&data).freeze(),
    }
}

/// Whether changes of the node must be ordered by [`in_turn`]: the node has an alignment of more than one byte, or copy-on-read,
/// or a filter above the node requests copy-on-read, or the node tracks its requests.
pub(super) fn must_take_turns(node: &Node) -> bool {
    node.request_alignment() > 1
        || node.has_gate(SlowPathFlags::COPY_ON_READ.union(SlowPathFlags::TRACKS))
        || node.is_serialising()
}

/// Carries out a change of a range, or a read of a node that tracks its requests. The change is counted
/// ([`Node::count_write`]). While a read-modify-write or a copy-on-read is in progress, the change takes the range lock instead.
/// A node with an alignment of one byte and without copy-on-read needs neither.
pub(super) async fn in_turn<T>(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    change: impl Future<Output = T>,
) -> T {
    if !must_take_turns(node) {
        return change.await;
    }
    if let Some(counted) = node.count_write(offset, len) {
        let outcome = change.await;
        drop(counted);
        return outcome;
    }
    let _lock = node.serialise.lock(offset..offset.saturating_add(len)).await;
    change.await
}

/// Counts a read-modify-write or copy-on-read as a serialising request of the node, until this value is dropped.
pub(super) struct Serialising<'a>(&'a Node);

impl<'a> Serialising<'a> {
    pub(super) fn begin(node: &'a Node) -> Self {
        node.begin_serialising();
        Self(node)
    }
}

impl Drop for Serialising<'_> {
    fn drop(&mut self) {
        self.0.end_serialising();
    }
}
