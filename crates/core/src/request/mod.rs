//! The request path: the part of a request's processing that is the same for all drivers.
//!
//! A request enters the graph at a node. [`fast`] calls the synchronous `map` of each driver from this node down to a
//! host file, and then submits one operation. The fast path needs no lock, no allocation and no boxed future, however
//! long the chain is. The request takes the slow path ([`slow`]) at a node if the driver cannot map the range, if the
//! data must be inspected, or if a rule must be enforced (alignment, growth, zero detection, read-modify-write). A
//! request that covers several extents is split, and the pieces run concurrently. After [`MAX_SPLITS`] nested splits,
//! the pieces of a read run one after the other.
//!
//! Flushes: a node is marked as unflushed (field `unflushed`) after a write through this node has completed. A write on
//! the fast path also marks the nodes on its path when the write starts; this is only a hint. [`flush`] of a node marks
//! the children before it flushes them. So a flush covers every write that has completed through the same node. If the
//! node has not been marked since the last flush, a flush makes no system call.

mod admit;
mod align;
mod changed;
mod copy_on_read;
mod fast;
mod flush;
mod foreign;
mod slow;
mod status;
mod together;
mod zero;

use std::sync::Arc;

use futures_util::future::try_join_all;
use oxblk_ring::{IoBuf, IoBufMut, UntilSettled, WriteAt};

use crate::compressed::cannot_compress;
use crate::counted::CountedWrite;
use crate::driver::{BoxFuture, MapOp, Preallocation};
use crate::node::SlowPathFlags;
use crate::{
    CompressedCluster, Errno, Error, ErrorKind, Node, ReadFlags, RequestKind, Result, WriteFlags,
    check_length,
};

pub use copy_on_read::CopyOnRead;
pub(crate) use copy_on_read::{prefetch, read_copying};
pub(crate) use flush::flush;
pub(crate) use foreign::{Start, continue_write_from, read_into, start_write_from};
pub use status::ChainStatus;
pub(crate) use status::{block_status, status_above};
pub use together::run_all;
pub(crate) use zero::{discard, write_zeroes};

use admit::Entry;
use changed::Changing;
use fast::{Located, Place, ReadStart, WriteStart};

/// Reads `buf.len()` bytes at `offset`. Bytes past the end of the node read as zeroes.
pub(crate) async fn read_padded(node: &Arc<Node>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
    read_within(node, offset, buf, 0, Entry::New).await
}

/// Like [`read_padded`], with flags.
pub(crate) async fn read_with(
    node: &Arc<Node>,
    offset: u64,
    buf: IoBufMut,
    flags: ReadFlags,
) -> Result<IoBufMut> {
    if !flags.contains(ReadFlags::COPY_ON_READ) {
        return read_padded(node, offset, buf).await;
    }
    check_tracked(node)?;
    read_copying(node, offset, buf, None).await
}

/// Maximum number of times that a piece of a request is split again into concurrent pieces; see [`read_on`].
const MAX_SPLITS: u32 = 8;

/// Like [`read_padded`], for a piece of a request that has been split `splits` times.
async fn read_within(
    node: &Arc<Node>,
    offset: u64,
    buf: IoBufMut,
    splits: u32,
    entry: Entry,
) -> Result<IoBufMut> {
    match fast::start_read(node, offset, buf, entry) {
        ReadStart::Done(buf) => Ok(buf),
        ReadStart::InFlight(op) => {
            let (outcome, buf) = op.await;
            match outcome {
                Ok(done) if done == buf.len() => Ok(buf),
                outcome => Box::pin(finish_read(node, offset, buf, outcome)).await,
            }
        }
        ReadStart::Slow { node, offset, buf } => {
            Box::pin(read_on(node, offset, buf, splits, Entry::Admitted)).await
        }
        ReadStart::Wait { node, offset, buf } => {
            Box::pin(read_on(node, offset, buf, splits, Entry::New)).await
        }
        ReadStart::Split { below: Some(Place { node, offset }), first, buf } => {
            Box::pin(read_split(&node, offset, buf, first, splits)).await
        }
        ReadStart::Split { below: None, first, buf } => {
            Box::pin(read_split(node, offset, buf, first, splits)).await
        }
    }
}

/// Completes a read whose operation read only a part of the data or failed with a transient error.
async fn finish_read(
    node: &Arc<Node>,
    offset: u64,
    buf: IoBufMut,
    outcome: std::io::Result<usize>,
) -> Result<IoBufMut> {
    let place = fast::last_admitter(node, MapOp::Read, offset, buf.len());
    slow::finish_read(&place.node, place.offset, buf, outcome).await
}

/// Continues a read at a node where [`fast`] stopped. With [`Entry::New`], the request first waits until the node admits it. If
/// the driver can load the missing metadata, the fast path then continues at the same node, so that a long backing chain does
/// not cause nested calls. After [`MAX_SPLITS`] splits, the pieces of a range are read one after the other.
async fn read_on(
    node: Arc<Node>,
    offset: u64,
    buf: IoBufMut,
    splits: u32,
    entry: Entry,
) -> Result<IoBufMut> {
    let mut whole: Option<IoBufMut> = None;
    let mut left = vec![(node, offset, buf, entry)];
    while let Some((node, offset, buf, entry)) = left.pop() {
        let waited = entry == Entry::New;
        if waited {
            admit::wait(&node, MapOp::Read, offset, as_u64(buf.len())).await;
        }
        let loaded = match node.driver().load_map(offset, as_u64(buf.len())) {
            Some(load) if !buf.is_empty() => {
                load.await.map_err(|error| error.on_node(node.name()).at(offset))?;
                true
            }
            _ => false,
        };
        let next = match loaded || waited {
            true => fast::start_read(&node, offset, buf, Entry::Admitted),
            false => ReadStart::Slow { node: Arc::clone(&node), offset, buf },
        };
        let part = match next {
            ReadStart::Done(buf) => buf,
            ReadStart::InFlight(op) => match op.await {
                (Ok(done), buf) if done == buf.len() => buf,
                (outcome, buf) => Box::pin(finish_read(&node, offset, buf, outcome)).await?,
            },
            // Only the slow path at this node can read this range.
            ReadStart::Slow { node: same, offset, buf } if Arc::ptr_eq(&same, &node) => {
                Box::pin(slow::read(same, offset, buf)).await?
            }
            ReadStart::Slow { node, offset, buf } => {
                left.push((node, offset, buf, Entry::Admitted));
                continue;
            }
            ReadStart::Wait { node, offset, buf } => {
                left.push((node, offset, buf, Entry::New));
                continue;
            }
            ReadStart::Split { below, first, mut buf } => {
                let Place { node, offset } = below.unwrap_or(Place { node, offset });
                if splits < MAX_SPLITS {
                    Box::pin(read_split(&node, offset, buf, first, splits)).await?
                } else {
                    let (rest, next) = (buf.split_off(first), offset.saturating_add(as_u64(first)));
                    left.push((Arc::clone(&node), next, rest, Entry::Admitted));
                    left.push((node, offset, buf, Entry::Admitted));
                    continue;
                }
            }
        };
        match &mut whole {
            None => whole = Some(part),
            Some(whole) => whole.unsplit(part).map_err(|_| slow::replaced())?,
        }
    }
    whole.ok_or_else(|| Error::invalid("empty read"))
}

/// Reads a request that lies in several extents and that the node has admitted. All extents are read concurrently.
async fn read_split(
    node: &Arc<Node>,
    offset: u64,
    mut buf: IoBufMut,
    first: usize,
    splits: u32,
) -> Result<IoBufMut> {
    let splits = splits.saturating_add(1);
    let mut pieces = Vec::new();
    for (at, len) in fast::extents(node, MapOp::Read, offset, buf.len(), first) {
        let piece = buf.split_to(len);
        pieces.push(Box::pin(read_within(node, at, piece, splits, Entry::Admitted)));
    }
    let mut whole: Option<IoBufMut> = None;
    for part in try_join_all(pieces).await? {
        match &mut whole {
            None => whole = Some(part),
            Some(whole) => whole.unsplit(part).map_err(|_| slow::replaced())?,
        }
    }
    whole.ok_or_else(|| Error::invalid("empty read"))
}

/// A submitted write that consists of one operation on a host file.
pub(crate) struct InPlace {
    operation: WriteAt,
    data: IoBuf,
    /// If the leaf requires alignment. The write counts until the host has completed it, even if this value is dropped.
    counted: Option<UntilSettled<CountedWrite>>,
}

/// A write that has begun and that is not one operation on a host file. [`continue_write`] completes it.
pub(crate) struct Begun(WriteStart);

/// Submits a write if it consists of one operation on a host file; otherwise returns the write.
pub(crate) fn start_in_place(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
) -> std::result::Result<InPlace, Begun> {
    match fast::start_write(node, offset, data, Entry::New) {
        WriteStart::InFlight { op, data, .. } => Ok(InPlace { operation: op, data, counted: None }),
        WriteStart::Tracked { leaf, offset, data } => start_counted(&leaf, offset, data)
            .map_err(|data| Begun(WriteStart::Slow { node: leaf, offset, data })),
        begun => Err(Begun(begun)),
    }
}

/// Completes a write through `node` at `offset`.
pub(crate) async fn continue_write(node: &Arc<Node>, offset: u64, begun: Begun) -> Result<()> {
    let outcome = write_from(node, offset, begun.0, WriteFlags::empty()).await;
    node.mark_unflushed();
    outcome
}

/// Submits a write to a leaf whose requests must be aligned. The write is counted, so that a read-modify-write can wait for the
/// write to end. If a serialising request is in progress, or if a flag sends writes to the slow path, returns the data.
fn start_counted(
    leaf: &Arc<Node>,
    offset: u64,
    data: IoBuf,
) -> std::result::Result<InPlace, IoBuf> {
    let Some(file) = leaf.driver().host_file() else { return Err(data) };
    let Some(counted) = count_in_place(leaf, offset, as_u64(data.len())) else { return Err(data) };
    leaf.unflushed.expect();
    let operation = file.write_at(data.clone(), offset, false);
    Ok(InPlace { operation, data, counted: Some(counted) })
}

/// Counts a write that the caller submits next. `None` if the write must take the slow path.
fn count_in_place(leaf: &Arc<Node>, offset: u64, len: u64) -> Option<UntilSettled<CountedWrite>> {
    let counted = leaf.count_write(offset, len)?;
    (!leaf.gated()).then(|| UntilSettled::new(counted))
}

impl InPlace {
    /// Waits for the operation. If the host wrote only a part of the data, or failed, the caller must
    /// [finish](finish_in_place) the write.
    pub(crate) async fn done(self, node: &Node) -> std::result::Result<(), Unfinished> {
        let outcome = self.operation.await;
        end_in_place(node, self.counted);
        match outcome {
            Ok(done) if done == self.data.len() => Ok(()),
            outcome => Err(Unfinished { outcome, data: self.data }),
        }
    }
}

/// Records that the operation of a write in place has ended. If the host wrote only a part of the data, the rest may have to wait
/// for a range lock whose holder waits for the counted writes. So the write leaves the count now.
fn end_in_place(node: &Node, counted: Option<UntilSettled<CountedWrite>>) {
    drop(counted.and_then(UntilSettled::release));
    node.mark_unflushed();
}

/// The result of an operation that failed or wrote only a part of the data.
pub(crate) struct Unfinished {
    outcome: std::io::Result<usize>,
    data: IoBuf,
}

/// Completes a write in place whose operation wrote only a part of the data or failed with a transient error. Returns
/// other errors.
pub(crate) async fn finish_in_place(node: &Arc<Node>, offset: u64, rest: Unfinished) -> Result<()> {
    let outcome = finish_write(node, offset, rest.data, rest.outcome).await;
    node.mark_unflushed();
    outcome
}

async fn finish_write(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    outcome: std::io::Result<usize>,
) -> Result<()> {
    let place = fast::last_admitter(node, MapOp::Write, offset, data.len());
    slow::finish_write(&place.node, place.offset, data, outcome).await
}

/// Writes `data` at `offset`.
pub(crate) async fn write(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    if !flags.is_empty() {
        return Box::pin(write_flagged(node, offset, data, flags)).await;
    }
    write_within(node, offset, data, Entry::New, flags).await
}

async fn write_flagged(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    mut flags: WriteFlags,
) -> Result<()> {
    let is_serialising = flags.contains(WriteFlags::SERIALISING);
    if is_serialising {
        check_tracked(node)?;
    }
    let flushes = flags.contains(WriteFlags::FUA)
        && (flags.contains(WriteFlags::COMPRESSED) || !slow::implements_fua(node));
    flags.set(WriteFlags::FUA, flags.contains(WriteFlags::FUA) && !flushes);
    if flags.contains(WriteFlags::COMPRESSED) {
        write_compressed(node, offset, data).await?;
    } else if is_serialising || flags.contains(WriteFlags::FUA) {
        // These flags concern this node, so the write may not pass it on the fast path.
        admit::admit(node, RequestKind::Write, offset, as_u64(data.len())).await;
        slow::write(Arc::clone(node), offset, data, flags).await?;
    } else {
        write_within(node, offset, data, Entry::New, flags).await?;
    }
    if flushes {
        flush(node).await?;
    }
    Ok(())
}

/// Refuses a serialising request to a node that does not track all its requests in flight.
fn check_tracked(node: &Node) -> Result<()> {
    if node.has_gate(SlowPathFlags::TRACKS_ALL) {
        return Ok(());
    }
    Err(Error::invalid("The node does not track its requests").on_node(node.name()))
}

async fn write_compressed(node: &Arc<Node>, offset: u64, data: IoBuf) -> Result<()> {
    let len = as_u64(data.len());
    slow::check_write(node, offset, len)?;
    let compress = node.driver().compress().ok_or_else(cannot_compress)?;
    admit::admit(node, RequestKind::Write, offset, len).await;
    changed(node, offset, len, compress.write_compressed(offset, data)).await
}

/// Stores a cluster that the driver has compressed before.
pub(crate) async fn store_compressed(
    node: &Arc<Node>,
    offset: u64,
    cluster: CompressedCluster,
    flags: WriteFlags,
) -> Result<()> {
    let len = as_u64(cluster.plain.len());
    slow::check_write(node, offset, len)?;
    let compress = node.driver().compress().ok_or_else(cannot_compress)?;
    admit::admit(node, RequestKind::Write, offset, len).await;
    changed(node, offset, len, compress.store(offset, cluster)).await?;
    if flags.contains(WriteFlags::FUA) {
        flush(node).await?;
    }
    Ok(())
}

/// Carries out a driver's change of a range, and records the change in the bitmaps and for the next flush.
async fn changed(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    change: BoxFuture<'_, Result<()>>,
) -> Result<()> {
    node.note_write(offset, len);
    let changing = Changing::begin(node, offset, len);
    let outcome = align::in_turn(node, offset, len, change).await;
    changing.end();
    outcome.map_err(|e| e.on_node(node.name()).at(offset))
}

/// Writes `data`. Of the flags, only [`WriteFlags::UNCHANGED`] may be set.
async fn write_within(
    node: &Arc<Node>,
    offset: u64,
    data: IoBuf,
    entry: Entry,
    flags: WriteFlags,
) -> Result<()> {
    let start = fast::start_write(node, offset, data, entry);
    let outcome = write_from(node, offset, start, flags).await;
    node.mark_unflushed();
    outcome
}

/// Completes a write through `node` at `offset` that has begun.
async fn write_from(
    node: &Arc<Node>,
    offset: u64,
    start: WriteStart,
    flags: WriteFlags,
) -> Result<()> {
    match start {
        WriteStart::InFlight { op, len, data } => match op.await {
            Ok(done) if done == len => Ok(()),
            outcome => Box::pin(finish_write(node, offset, data, outcome)).await,
        },
        WriteStart::Tracked { leaf, offset: at, data } => match start_counted(&leaf, at, data) {
            Ok(operation) => match operation.done(&leaf).await {
                Ok(()) => Ok(()),
                Err(rest) => Box::pin(finish_in_place(&leaf, at, rest)).await,
            },
            Err(data) => Box::pin(slow::write(leaf, at, data, flags)).await,
        },
        WriteStart::Slow { node, offset, data } => {
            Box::pin(slow::write(node, offset, data, flags)).await
        }
        WriteStart::Wait { node, offset, data } => {
            admit::wait(&node, MapOp::Write, offset, as_u64(data.len())).await;
            Box::pin(write_within(&node, offset, data, Entry::Admitted, flags)).await
        }
        WriteStart::Split { below: Some(Place { node, offset }), first, data } => {
            Box::pin(write_split(&node, offset, data, first, flags)).await
        }
        WriteStart::Split { below: None, first, data } => {
            Box::pin(write_split(node, offset, data, first, flags)).await
        }
    }
}

/// Writes a request that lies in several extents and that the node has admitted.
async fn write_split(
    node: &Arc<Node>,
    offset: u64,
    mut data: IoBuf,
    first: usize,
    flags: WriteFlags,
) -> Result<()> {
    let mut pieces = Vec::new();
    for (at, len) in fast::extents(node, MapOp::Write, offset, data.len(), first) {
        let piece = data.split_to(len);
        pieces.push(Box::pin(write_within(node, at, piece, Entry::Admitted, flags)));
    }
    run_all(pieces).await
}

/// Sets the size of a node.
pub(crate) async fn resize(
    node: &Arc<Node>,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    check_length(size)?;
    if node.is_read_only() {
        return Err(Error::new(ErrorKind::Denied, "Image is read-only").errno(Errno::ACCES));
    }
    let Some(driver) = node.driver().resize() else {
        return Err(Error::unsupported("Image format driver does not support resize"));
    };
    let resized = driver.resize(size, preallocation).await;
    // Update the size after a failure too: the driver may have changed the size before it failed.
    node.set_size(node.driver().size());
    node.mark_unflushed();
    resized.map_err(|error| error.on_node(node.name()))
}

/// Copies a range between two nodes with the host's copy offload.
pub(crate) async fn copy_range(
    source: &Arc<Node>,
    offset: u64,
    target: &Arc<Node>,
    target_offset: u64,
    len: u64,
) -> Result<()> {
    let impossible = || Error::unsupported("Copy offload is not possible here");
    // The drivers count a copy only if it is possible: otherwise the caller reads and writes the range.
    if !fast::is_on_host(source, MapOp::Read, offset, len)
        || !fast::is_on_host(target, MapOp::Write, target_offset, len)
    {
        return Err(impossible());
    }
    let from = resolve_host(source, MapOp::Read, offset, len).await.ok_or_else(impossible)?;
    let to = resolve_host(target, MapOp::Write, target_offset, len).await.ok_or_else(impossible)?;
    let copy = from.node.driver().copy_range().ok_or_else(impossible)?;
    let copied = copy.copy_to(from.offset, to.node.driver(), to.offset, len);
    let outcome = align::in_turn(&to.node, to.offset, len, copied).await;
    // Mark the nodes after a failure too: the host may have copied a part of the data.
    to.node.mark_unflushed();
    target.mark_unflushed();
    outcome.map_err(|error| error.on_node(to.node.name()).at(to.offset))
}

/// The host file that contains the complete range. Waits until the nodes on the way admit the request.
async fn resolve_host(root: &Arc<Node>, op: MapOp, offset: u64, len: u64) -> Option<Place> {
    let size = usize::try_from(len).ok()?;
    let mut located = fast::locate(root, op, offset, size, Entry::New);
    loop {
        let Place { node, offset } = match located {
            Located::Host(place) => return Some(place),
            Located::Wait(place) => place,
            Located::Zero | Located::Slow(_) | Located::Split { .. } => return None,
        };
        admit::wait(&node, op, offset, len).await;
        located = fast::locate(&node, op, offset, size, Entry::Admitted);
    }
}

/// Converts `usize` to `u64`; without loss on all supported platforms.
pub(crate) fn as_u64(len: usize) -> u64 {
    len as u64
}

/// The smaller of a `u64` and a `usize`, as a `usize`.
pub(crate) fn min_len(len: u64, limit: usize) -> usize {
    usize::try_from(len).map_or(limit, |len| len.min(limit))
}
