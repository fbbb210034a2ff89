//! Zero writes and discards: calls of the driver's functions, and the fallback for drivers without these functions.

use std::sync::Arc;

use oxblk_ring::IoBuf;

use super::admit::admit;
use super::changed::Changing;
use super::{align, flush, min_len, run_all, slow};
use crate::{
    DebugEvent, Errno, Error, ErrorKind, Node, RequestKind, Result, WriteFlags, ZeroFlags,
};

/// Maximum number of zero bytes written as data in one call.
const MAX_ZERO_DATA: u64 = 1 << 20;
/// Maximum length of a range passed to a driver in one call, before this maximum is rounded down to the driver's
/// alignment.
const MAX_RANGE: u64 = 1 << 40;
/// Maximum number of discards in flight.
const DISCARDS_AT_ONCE: usize = 16;

/// Makes a range read as zeroes.
pub(crate) async fn write_zeroes(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    slow::check_write(node, offset, len)?;
    if flags.contains(ZeroFlags::SERIALISING) {
        super::check_tracked(node)?;
    }
    admit(node, RequestKind::WriteZeroes, offset, len).await;
    write_admitted(node, offset, len, flags).await
}

/// Makes a range read as zeroes, for a request that the node has checked and admitted.
pub(super) async fn write_admitted(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<()> {
    let mut parts = flags - ZeroFlags::FUA;
    if !node.unmaps() {
        parts -= ZeroFlags::MAY_UNMAP;
    }
    let changing = Changing::begin(node, offset, len);
    let outcome = write_zeroes_parts(node, offset, len, parts).await;
    changing.end();
    outcome?;
    if flags.contains(ZeroFlags::FUA) {
        flush::flush(node).await?;
    }
    Ok(())
}

/// Splits the range at the driver's alignment and maximum. A misaligned head, the whole blocks, and a misaligned tail
/// are separate pieces.
async fn write_zeroes_parts(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<()> {
    let limits = node.limits();
    // An incomplete block must be written as data, so the request fails before any block has changed.
    let whole_blocks = align::is_aligned(node, offset, len);
    if flags.contains(ZeroFlags::NO_FALLBACK)
        && !(whole_blocks && limits.zero_flags.contains(ZeroFlags::NO_FALLBACK))
    {
        return Err(no_fallback(node, offset));
    }
    let unsupported = ZeroFlags::MAY_UNMAP - limits.zero_flags;
    let flags = flags - unsupported;
    let block = u64::from(limits.write_zeroes_alignment.max(limits.request_alignment).max(1));
    let most = match limits.max_write_zeroes {
        0 => MAX_RANGE,
        most => most.min(MAX_RANGE),
    };
    let most = (most - most % block).max(block);
    let end = offset.saturating_add(len);
    let mut at = offset;
    while at < end {
        let to_boundary = block - at % block;
        let mut piece = (end - at).min(most);
        if to_boundary != block {
            piece = piece.min(to_boundary);
        } else if piece > block {
            piece -= piece % block;
        }
        zero_one(node, at, piece, flags).await?;
        at = at.saturating_add(piece);
    }
    Ok(())
}

async fn zero_one(node: &Arc<Node>, offset: u64, len: u64, mut flags: ZeroFlags) -> Result<()> {
    let data_flags = WriteFlags::of_zero_write(flags);
    flags -= ZeroFlags::SERIALISING;
    if align::is_aligned(node, offset, len)
        && let Some(request) = node.driver().write_zeroes(offset, len, flags)
    {
        let grow = async {
            node.note_write(offset, len);
            node.debug_event(DebugEvent::PwritevZero).await;
            let outcome = request.await;
            node.debug_event(DebugEvent::PwritevDone).await;
            outcome?;
            node.grow_to(offset.saturating_add(len));
            Ok::<(), Error>(())
        };
        let outcome = match data_flags.contains(WriteFlags::SERIALISING) {
            true => align::alone(node, offset, len, grow).await,
            false => align::in_turn(node, offset, len, grow).await,
        };
        match outcome {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            outcome => return outcome.map_err(|error| error.on_node(node.name()).at(offset)),
        }
    }
    if flags.contains(ZeroFlags::NO_FALLBACK) {
        return Err(no_fallback(node, offset));
    }
    write_zero_data(node, offset, len, data_flags).await
}

/// The error of a zero write with [`ZeroFlags::NO_FALLBACK`] that would have to write zeroes as data.
fn no_fallback(node: &Node, offset: u64) -> Error {
    Error::from_errno(Errno::OPNOTSUPP).on_node(node.name()).at(offset)
}

async fn write_zero_data(node: &Arc<Node>, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
    let zeroes = IoBuf::zeroes(min_len(len, min_len(MAX_ZERO_DATA, usize::MAX)));
    let mut at = offset;
    let end = offset.saturating_add(len);
    while at < end {
        let piece = min_len(end - at, zeroes.len());
        slow::write_data(node, at, zeroes.slice(..piece), flags).await?;
        at = at.saturating_add(super::as_u64(piece));
    }
    Ok(())
}

/// Discards a range: the caller no longer needs the contents of the range.
pub(crate) async fn discard(node: &Arc<Node>, offset: u64, len: u64) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    slow::check_write(node, offset, len)?;
    if offset.saturating_add(len) > node.size() {
        return Err(slow::out_of_range(node, offset));
    }
    if !node.unmaps() {
        return Ok(());
    }
    admit(node, RequestKind::Discard, offset, len).await;
    let limits = node.limits();
    let most = match limits.max_discard {
        0 => MAX_RANGE,
        most => most.min(MAX_RANGE),
    };
    // The driver receives only whole blocks, and an incomplete last block of the node.
    let block = u64::from(limits.request_alignment.max(1));
    let end = offset.saturating_add(len);
    let mut at = offset.next_multiple_of(block);
    let end = if end == node.size() { end } else { end - end % block };
    while at < end {
        let mut batch = Vec::new();
        while at < end && batch.len() < DISCARDS_AT_ONCE {
            let piece = (end - at).min((most - most % block).max(block));
            if let Some(request) = node.driver().discard(at, piece) {
                let request = align::in_turn(node, at, piece, request);
                batch.push(async { unless_unsupported(request.await) });
            }
            at = at.saturating_add(piece);
        }
        let changing = Changing::begin(node, offset, at - offset);
        let outcome = run_all(batch).await;
        // Record the change after a failure too: other discards of the batch may have succeeded.
        changing.end();
        outcome.map_err(|error| error.on_node(node.name()).at(offset))?;
    }
    Ok(())
}

/// An unsupported discard is not an error: the contents stay, and a discard allows this.
fn unless_unsupported(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
        outcome => outcome,
    }
}
