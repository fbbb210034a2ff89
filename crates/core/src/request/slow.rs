//! The slow path at one node: checks bounds, aligns, detects zeroes, splits by the driver's limits, and calls the
//! driver.
//!
//! A request takes the slow path when the fast path cannot serve the request. The driver receives only requests that
//! are aligned and within its limits. After a write, even after a failed write, the range is set in the dirty bitmaps
//! and the node is marked as unflushed.

use std::io;
use std::sync::Arc;

use futures_util::future::try_join_all;
use oxblk_ring::{IoBuf, IoBufMut};

use super::changed::Changing;
use super::copy_on_read::Scope;
use super::{align, as_u64, copy_on_read, min_len, run_all, zero};
use crate::node::{DetectZeroes, SlowPathFlags};
use crate::{DebugEvent, Errno, Error, ErrorKind, Node, Result, WriteFlags, ZeroFlags};

/// Maximum length of a transfer passed to a driver in one call: the limit of one Linux system call (almost 2 GiB),
/// rounded down to a power of two.
const MAX_TRANSFER: u64 = 1 << 30;

/// Refuses a write that the node does not accept.
pub(super) fn check_write(node: &Node, offset: u64, len: u64) -> Result<()> {
    if node.is_read_only() {
        return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only")
            .errno(Errno::PERM)
            .on_node(node.name()));
    }
    let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    let end = end.ok_or_else(|| out_of_range(node, offset))?;
    if end > node.size() && !node.limits().grows {
        // Backends check bounds themselves, so this request comes from a parent node that needs more space.
        return Err(Error::from_errno(Errno::NOSPC).on_node(node.name()).at(offset));
    }
    Ok(())
}

pub(super) fn out_of_range(node: &Node, offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, "Request lies outside the device")
        .on_node(node.name())
        .at(offset)
}

/// Reads through the driver. Bytes past the end of the node read as zeroes.
pub(super) async fn read(node: Arc<Node>, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    let room = min_len(node.size().saturating_sub(offset), buf.len());
    if room == 0 {
        buf.fill(0);
        return Ok(buf);
    }
    let mut tail = buf.split_off(room);
    tail.fill(0);
    let mut buf = if align::fits(&node, offset, room, buf.as_ptr().addr()) {
        read_aligned(&node, offset, buf).await?
    } else {
        align::read(&node, offset, buf).await?
    };
    buf.unsplit(tail).map_err(|_| replaced())?;
    Ok(buf)
}

/// Reads an aligned range inside the node.
pub(super) async fn read_aligned(node: &Arc<Node>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
    if node.has_gate(SlowPathFlags::COPY_ON_READ) {
        return Box::pin(copy_on_read::read(node, offset, buf, Scope::All)).await;
    }
    if node.has_gate(SlowPathFlags::TRACKS) {
        let len = as_u64(buf.len());
        return align::in_turn(node, offset, len, read_pieces(node, offset, buf)).await;
    }
    read_pieces(node, offset, buf).await
}

pub(super) fn replaced() -> Error {
    Error::new(ErrorKind::Io, "a driver replaced the buffer of a read")
}

/// Reads an aligned range inside the node, split by the driver's maximum transfer.
pub(super) async fn read_pieces(node: &Node, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    let most = max_piece(node);
    let context = |error: Error| error.on_node(node.name()).at(offset);
    if buf.len() <= most {
        return node.driver().read(offset, buf).await.map_err(context);
    }
    let mut pieces = Vec::new();
    let mut at = offset;
    while !buf.is_empty() {
        let piece = buf.split_to(most.min(buf.len()));
        let len = as_u64(piece.len());
        pieces.push(node.driver().read(at, piece));
        at = at.saturating_add(len);
    }
    let mut parts = try_join_all(pieces).await.map_err(context)?.into_iter();
    let mut whole = parts.next().ok_or_else(replaced)?;
    for part in parts {
        whole.unsplit(part).map_err(|_| replaced())?;
    }
    Ok(whole)
}

fn max_piece(node: &Node) -> usize {
    let limits = node.limits();
    let most =
        if limits.max_transfer == 0 { MAX_TRANSFER } else { limits.max_transfer.min(MAX_TRANSFER) };
    let aligned = most - most % u64::from(limits.request_alignment.max(1));
    min_len(aligned.max(1), usize::MAX)
}

/// Completes a read whose operation read only a part of the data or failed with a transient error. Returns other
/// errors.
pub(super) async fn finish_read(
    node: &Arc<Node>,
    offset: u64,
    mut buf: IoBufMut,
    outcome: io::Result<usize>,
) -> Result<IoBufMut> {
    let done = match outcome {
        Ok(done) => done,
        Err(error) if is_transient(&error) => 0,
        Err(error) => return Err(Error::from(error).on_node(node.name()).at(offset)),
    };
    let rest = buf.split_off(done);
    // The driver's read function reads until the buffer is full or the file ends.
    let rest = fallback_read(node, offset.saturating_add(as_u64(done)), rest).await?;
    buf.unsplit(rest).map_err(|_| replaced())?;
    Ok(buf)
}

async fn fallback_read(node: &Arc<Node>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
    read(Arc::clone(node), offset, buf).await
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Completes a write whose operation wrote only a part of the data or failed with a transient error. Returns other
/// errors.
pub(super) async fn finish_write(
    node: &Arc<Node>,
    offset: u64,
    mut data: IoBuf,
    outcome: io::Result<usize>,
) -> Result<()> {
    let done = match outcome {
        Ok(0) => return Err(Error::from_errno(Errno::NOSPC).on_node(node.name()).at(offset)),
        Ok(done) => done,
        Err(error) if is_transient(&error) => 0,
        Err(error) => return Err(Error::from(error).on_node(node.name()).at(offset)),
    };
    drop(data.split_to(done.min(data.len())));
    let at = offset.saturating_add(as_u64(done));
    write(Arc::clone(node), at, data, WriteFlags::empty()).await
}

/// Writes through the driver, as a zero write if `detect-zeroes` applies. [`WriteFlags::FUA`] only if the node
/// [implements](implements_fua) it.
pub(super) async fn write(
    node: Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let len = as_u64(data.len());
    check_write(&node, offset, len)?;
    if node.has_gate(SlowPathFlags::DETECT_ZEROES)
        && !flags.contains(WriteFlags::SERIALISING)
        && oxblk_ring::is_zero(&data)
    {
        let mut zero = ZeroFlags::empty();
        zero.set(ZeroFlags::MAY_UNMAP, node.detect_zeroes() == DetectZeroes::Unmap);
        zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
        zero.set(ZeroFlags::UNCHANGED, flags.contains(WriteFlags::UNCHANGED));
        return zero::write_admitted(&node, offset, len, zero).await;
    }
    let changing = Changing::begin(&node, offset, len);
    let outcome = write_data(&node, offset, data, flags).await;
    if outcome.is_ok() && flags.contains(WriteFlags::FUA) {
        changing.end_durable();
    } else {
        // Record the change after a failure too: a part of the data may have been written.
        changing.end();
    }
    outcome
}

/// Whether the driver of the node implements [`WriteFlags::FUA`].
pub(super) fn implements_fua(node: &Node) -> bool {
    node.limits().write_flags.contains(WriteFlags::FUA)
}

/// Writes data without zero detection, at any alignment.
pub(super) async fn write_data(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let is_aligned = align::is_aligned(node, offset, as_u64(data.len()));
    if !is_aligned || flags.contains(WriteFlags::SERIALISING) {
        align::write_alone(node, offset, data, flags).await
    } else if align::must_take_turns(node) || !node.takes_memory_at(data.as_ptr().addr()) {
        align::write_counted(node, offset, data, flags).await
    } else {
        write_pieces(node, offset, data, flags).await
    }
}

/// Writes aligned data, split by the driver's maximum transfer. This function updates the node's size before it
/// returns. At this time the caller still has its range lock or is still counted. So the next writer of the block does
/// not treat the block as unwritten.
pub(super) async fn write_pieces(
    node: &Node,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    if node.has_gate(SlowPathFlags::WRITE_GUARD) {
        node.guard_write(offset, &data)?;
    }
    let end = offset.saturating_add(as_u64(data.len()));
    node.note_write(offset, as_u64(data.len()));
    node.debug_event(DebugEvent::Pwritev).await;
    // The request path itself carries out the other flags.
    let flags = flags & (WriteFlags::FUA | WriteFlags::UNCHANGED);
    let outcome = write_cut(node, offset, data, flags).await;
    node.debug_event(DebugEvent::PwritevDone).await;
    outcome?;
    oxblk_ring::perturb::point();
    node.grow_to(end);
    Ok(())
}

async fn write_cut(node: &Node, offset: u64, mut data: IoBuf, flags: WriteFlags) -> Result<()> {
    let most = max_piece(node);
    let context = |error: Error| error.on_node(node.name()).at(offset);
    if data.len() <= most {
        return node.driver().write(offset, data, flags).await.map_err(context);
    }
    let mut pieces = Vec::new();
    let mut at = offset;
    while !data.is_empty() {
        let piece = data.split_to(most.min(data.len()));
        let len = as_u64(piece.len());
        pieces.push(node.driver().write(at, piece, flags));
        at = at.saturating_add(len);
    }
    run_all(pieces).await.map_err(context)
}
