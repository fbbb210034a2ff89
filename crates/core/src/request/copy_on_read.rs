//! Copy-on-read: data that a read gets from the backing file is also written to the node.
//!
//! A read of an unallocated range reads whole blocks from the backing file, writes these blocks unchanged to the node,
//! and returns their data. No other request may change the blocks between the status query and the write; otherwise old
//! data would replace new data. Two rules ensure this:
//!
//! - The read holds the node's `serialise` range lock on the blocks and is counted as a serialising request, like a
//!   read-modify-write (see [`super::align`]).
//! - All changes of a node with copy-on-read go through [`align::in_turn`]: they are counted, and they wait for the
//!   lock while such a read is in progress.
//!
//! Copy-on-read is a setting of a node, or a filter above the node requests it for its reads ([`read_copying`]). As long as such a
//! filter exists, the node counts as having a serialising request in progress ([`CopyOnRead`]).
//!
//! The visible contents do not change, so dirty bitmaps do not record these writes.

use std::sync::Arc;

use oxblk_ring::{IoBuf, IoBufMut};

use super::admit::admit;
use super::{align, as_u64, min_len, slow, status};
use crate::driver::Want;
use crate::{DebugEvent, ErrorKind, Node, RequestKind, Result, WriteFlags, ZeroFlags};

/// Maximum number of requested bytes in one step. A step reads whole blocks, so it may read more bytes.
const AT_ONCE: u64 = 2 << 20;

/// Which unallocated ranges are copied.
#[derive(Clone, Copy)]
pub(super) enum Scope<'a> {
    /// All ranges that the node itself has not allocated. The node is no filter.
    All,
    /// The same, for a node that may be a filter. If there is a bottom node, only the ranges that an image of the chain has
    /// allocated, from the backing file of this image down to the bottom node.
    Filter { bottom: Option<&'a Arc<Node>> },
}

/// What a read does with the start of a range.
struct Found {
    len: u64,
    /// The range is copied to the node.
    is_copied: bool,
    /// The range reads as zeroes because no image has data there. Such a range is not stored.
    is_zero: bool,
}

impl Scope<'_> {
    async fn find(self, node: &Arc<Node>, offset: u64, len: u64) -> Result<Found> {
        let bottom = match self {
            Self::All => {
                let own = status::block_status(node, offset, len, Want::Allocation).await?;
                let (is_copied, is_zero) = (!own.is_allocated(), own.is_zero());
                return Ok(Found { len: own.len, is_copied, is_zero });
            }
            Self::Filter { bottom } => bottom,
        };
        let image = node.skip_filters();
        let Some(backing) = image.cow_child() else {
            return Ok(Found { len, is_copied: false, is_zero: false });
        };
        let backing = backing.node();
        let above = |top, base, len| status::status_above(top, base, offset, len, Want::Allocation);
        let own = above(node, Some(backing), len).await?.status;
        let found =
            Found { len: own.len.max(1), is_copied: !own.is_allocated(), is_zero: own.is_zero() };
        let Some(bottom) = bottom.filter(|_| found.is_copied && !found.is_zero) else {
            return Ok(found);
        };
        if Arc::ptr_eq(bottom, &image) {
            return Ok(Found { is_copied: false, ..found });
        }
        let base = bottom.cow_child();
        let base = base.as_ref().map(|edge| edge.node());
        let below = above(backing, base, found.len).await?.status;
        Ok(Found { len: below.len.max(1), is_copied: below.is_allocated(), is_zero: false })
    }
}

/// Reads for a filter that requests copy-on-read. Bytes past the end of the node read as zeroes.
pub(crate) async fn read_copying(
    node: &Arc<Node>,
    offset: u64,
    mut buf: IoBufMut,
    bottom: Option<&Arc<Node>>,
) -> Result<IoBufMut> {
    admit(node, RequestKind::Read, offset, as_u64(buf.len())).await;
    let room = min_len(node.size().saturating_sub(offset), buf.len());
    if room == 0 {
        buf.fill(0);
        return Ok(buf);
    }
    if !align::fits(node, offset, room, buf.as_ptr().addr()) {
        // Only the last block of a file. It has no backing file.
        return slow::read(Arc::clone(node), offset, buf).await;
    }
    let mut tail = buf.split_off(room);
    tail.fill(0);
    let mut whole = read(node, offset, buf, Scope::Filter { bottom }).await?;
    whole.unsplit(tail).map_err(|_| slow::replaced())?;
    Ok(whole)
}

/// Copies the data that a read of the range would copy, and returns no data.
pub(crate) async fn prefetch(node: &Arc<Node>, offset: u64, len: u64) -> Result<()> {
    super::check_tracked(node)?;
    admit(node, RequestKind::Read, offset, len).await;
    let scope = Scope::Filter { bottom: None };
    let end = offset.saturating_add(len).min(node.size());
    let mut at = offset;
    while at < end {
        let (len, fetch) = next_step(node, at, end - at, scope).await?;
        let len = len.clamp(1, end - at);
        if fetch {
            copy_range(node, at, len, None, scope).await?;
        }
        at = at.saturating_add(len);
    }
    Ok(())
}

/// A filter above a node requests copy-on-read. As long as this value exists, changes of the node wait for the copies that
/// overlap them.
#[derive(Debug)]
pub struct CopyOnRead(Arc<Node>);

impl CopyOnRead {
    pub(crate) fn begin(node: &Arc<Node>) -> Self {
        node.begin_serialising();
        Self(Arc::clone(node))
    }

    /// Whether the value belongs to this node.
    pub fn is_of(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.0, node)
    }
}

impl Drop for CopyOnRead {
    fn drop(&mut self) {
        self.0.end_serialising();
    }
}

/// Reads an aligned range inside the node, and writes the unallocated blocks that have data in the backing file to the
/// node.
pub(super) async fn read(
    node: &Arc<Node>,
    offset: u64,
    mut buf: IoBufMut,
    scope: Scope<'_>,
) -> Result<IoBufMut> {
    let mut whole: Option<IoBufMut> = None;
    let mut at = offset;
    while !buf.is_empty() {
        let (len, fetch) = next_step(node, at, as_u64(buf.len()), scope).await?;
        let mut piece = buf.split_to(min_len(len.max(1), buf.len()));
        let next = at.saturating_add(as_u64(piece.len()));
        if fetch {
            let len = as_u64(piece.len());
            copy_range(node, at, len, Some(&mut piece), scope).await?;
        } else {
            piece = slow::read_pieces(node, at, piece).await?;
        }
        match &mut whole {
            None => whole = Some(piece),
            Some(whole) => whole.unsplit(piece).map_err(|_| slow::replaced())?,
        }
        at = next;
    }
    Ok(whole.unwrap_or(buf))
}

/// The length of the next step, and whether the range is copied to the node.
async fn next_step(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    scope: Scope<'_>,
) -> Result<(u64, bool)> {
    let found = scope.find(node, offset, len).await?;
    // Without a backing file, or past its end, an unallocated range reads as zeroes. Such a range is not stored.
    Ok(match !found.is_copied || found.is_zero {
        true => (found.len, false),
        false => (found.len.min(AT_ONCE - offset % AT_ONCE), true),
    })
}

/// Stores the blocks of a range that was unallocated at the last status query in the node. With `out`, which is `len` bytes
/// long, returns the data of the range there.
async fn copy_range(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    mut out: Option<&mut IoBufMut>,
    scope: Scope<'_>,
) -> Result<()> {
    let limits = node.limits();
    let block = u64::from(limits.write_zeroes_alignment.max(limits.request_alignment).max(1));
    let start = offset - offset % block;
    let end = offset.saturating_add(len).next_multiple_of(block).min(node.size());
    let lock = node.serialise.lock(start..end).await;
    let exclusive = align::Serialising::begin(node);
    oxblk_ring::perturb::point();
    node.aligned_writes.wait_for(start..end).await;
    let mut at = start;
    while at < end {
        let found = scope.find(node, at, end - at).await?;
        let next = at.saturating_add(found.len.max(1)).min(end);
        let from = at.max(offset) - offset;
        let to = next.min(offset.saturating_add(len)).saturating_sub(offset);
        // A block that cannot be read completely is not stored. The read fails if the requested range itself cannot be
        // read, or if a block cannot be written.
        let block = match found.is_copied {
            false => None,
            true => {
                let block = IoBufMut::new(min_len(next - at, usize::MAX));
                match slow::read_pieces(node, at, block).await {
                    Ok(block) => Some(block),
                    Err(error) if out.is_none() && from < to => return Err(error),
                    Err(_) => None,
                }
            }
        };
        if let Some(block) = block {
            let block = block.freeze();
            if !found.is_zero {
                keep(node, at, block.clone()).await?;
            }
            let skip = min_len(offset.saturating_add(from).saturating_sub(at), block.len());
            if let Some(buf) = &mut out {
                copy(buf, from, to, block.get(skip..).unwrap_or_default());
            }
        } else if let (Some(buf), true) = (&mut out, from < to) {
            let piece = IoBufMut::new(min_len(to - from, usize::MAX));
            let piece = slow::read_pieces(node, offset.saturating_add(from), piece).await?;
            copy(buf, from, to, &piece);
        }
        at = next;
    }
    drop(exclusive);
    drop(lock);
    Ok(())
}

/// Copies the first `to - from` bytes of `data` to `from..to` of `buf`.
fn copy(buf: &mut IoBufMut, from: u64, to: u64, data: &[u8]) {
    let (from, to) = (min_len(from, usize::MAX), min_len(to, usize::MAX));
    if let Some(place) = buf.get_mut(from..to)
        && let Some(data) = data.get(..place.len())
    {
        place.copy_from_slice(data);
    }
}

async fn keep(node: &Arc<Node>, offset: u64, data: IoBuf) -> Result<()> {
    let len = as_u64(data.len());
    node.debug_event(DebugEvent::CorWrite).await;
    admit(node, RequestKind::Write, offset, len).await;
    node.note_write(offset, len);
    if oxblk_ring::is_zero(&data)
        && let Some(request) = node.driver().write_zeroes(offset, len, ZeroFlags::UNCHANGED)
    {
        match request.await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            outcome => {
                node.mark_unflushed();
                return outcome.map_err(|error| error.on_node(node.name()).at(offset));
            }
        }
    }
    let outcome = slow::write_pieces(node, offset, data, WriteFlags::UNCHANGED).await;
    node.mark_unflushed();
    outcome
}
