//! Reads into and writes from foreign memory ([`ForeignVec`]), which others may change at any time.
//!
//! If the range lies in a host file, the host transfers the data straight from or to the memory. Otherwise, and if the memory does
//! not have the alignment that the file requires, the data is copied once: no driver, and no part of the request path, sees
//! bytes that may change.

use std::sync::Arc;

use oxblk_ring::{ForeignVec, ForeignVecMut, IoBufMut, UntilSettled, WriteForeignAt};

use super::admit::{self, Entry};
use super::fast::{self, Located, Place};
use super::{
    MAX_SPLITS, Unfinished, as_u64, count_in_place, end_in_place, finish_in_place, read_on,
    read_within, run_all, slow, write,
};
use crate::counted::CountedWrite;
use crate::driver::{BoxFuture, MapOp};
use crate::{Node, Result, WriteFlags};

impl Node {
    /// Whether the host file of the node accepts the memory of a transfer.
    fn takes_ranges(&self, is_aligned: impl Fn(usize) -> bool) -> bool {
        let alignment = self.mem_alignment().max(self.request_alignment());
        is_aligned(usize::try_from(alignment).unwrap_or(usize::MAX))
    }
}

/// Reads `memory.len()` bytes at `offset`. Bytes past the end of the node read as zeroes. After an error, the contents of the
/// memory are undefined. When the returned future completes, also with an error, no operation of the host on the memory is in
/// flight.
pub(crate) async fn read_into(node: &Arc<Node>, offset: u64, memory: ForeignVecMut) -> Result<()> {
    read(node, offset, memory, Entry::New, 0).await
}

async fn read(
    node: &Arc<Node>,
    offset: u64,
    memory: ForeignVecMut,
    entry: Entry,
    splits: u32,
) -> Result<()> {
    match fast::locate(node, MapOp::Read, offset, memory.len(), entry) {
        Located::Host(leaf) => {
            if leaf.node.takes_ranges(|alignment| memory.is_aligned(alignment)) {
                let operation = leaf
                    .node
                    .driver()
                    .host_file()
                    .map(|file| file.read_foreign_at(memory.clone(), leaf.offset));
                if let Some(operation) = operation
                    && matches!(operation.await, Ok(done) if done == memory.len())
                {
                    return Ok(());
                }
                // A short read or an error: the copying read completes the rest or reports the error.
            }
            Box::pin(copy(
                read_within(
                    &leaf.node,
                    leaf.offset,
                    IoBufMut::new(memory.len()),
                    splits,
                    Entry::Admitted,
                ),
                &memory,
            ))
            .await
        }
        Located::Zero => {
            memory.zero();
            Ok(())
        }
        Located::Slow(place) => Box::pin(read_slow(place, memory, splits, Entry::Admitted)).await,
        Located::Wait(place) => Box::pin(read_slow(place, memory, splits, Entry::New)).await,
        Located::Split { below: Some(place), first } => {
            Box::pin(read_split(&place.node, place.offset, memory, first, splits)).await
        }
        Located::Split { below: None, first } => {
            Box::pin(read_split(node, offset, memory, first, splits)).await
        }
    }
}

/// Continues a read at a node. With [`Entry::New`], the request first waits until the node admits it.
async fn read_slow(
    Place { node, offset }: Place,
    memory: ForeignVecMut,
    splits: u32,
    entry: Entry,
) -> Result<()> {
    if entry == Entry::New {
        admit::wait(&node, MapOp::Read, offset, as_u64(memory.len())).await;
        let below: BoxFuture<'_, Result<()>> =
            Box::pin(read(&node, offset, memory, Entry::Admitted, splits));
        return below.await;
    }
    let buf = IoBufMut::new(memory.len());
    copy(read_on(node, offset, buf, splits, entry), &memory).await
}

/// Copies the data of a read to the memory.
async fn copy(read: impl Future<Output = Result<IoBufMut>>, memory: &ForeignVecMut) -> Result<()> {
    memory.copy_from(&read.await?);
    Ok(())
}

/// Reads a range that lies in several extents and that the node has admitted.
async fn read_split(
    node: &Arc<Node>,
    offset: u64,
    mut memory: ForeignVecMut,
    first: usize,
    splits: u32,
) -> Result<()> {
    if splits >= MAX_SPLITS {
        let buf = IoBufMut::new(memory.len());
        return copy(read_within(node, offset, buf, splits, Entry::Admitted), &memory).await;
    }
    let splits = splits.saturating_add(1);
    let mut pieces = Vec::new();
    for (at, len) in fast::extents(node, MapOp::Read, offset, memory.len(), first) {
        let piece = memory.split_to(len);
        pieces.push(Box::pin(read(node, at, piece, Entry::Admitted, splits)));
    }
    // After an error too, all pieces end first: otherwise, the host could still write to the memory after the read.
    run_all(pieces).await
}

/// A submitted write that consists of one operation on a host file.
pub(crate) struct InPlace {
    operation: WriteForeignAt,
    memory: ForeignVec,
    /// See [`super::InPlace`].
    counted: Option<UntilSettled<CountedWrite>>,
}

/// A write that has begun and that is not one operation on a host file.
pub(crate) struct Begun {
    located: Located,
    memory: ForeignVec,
}

/// The result of [`start_write_from`].
pub(crate) enum Start {
    /// The write was submitted.
    InPlace(InPlace),
    /// [`continue_write_from`] completes the write.
    Begun(Begun),
}

/// Submits a write if it consists of one operation on a host file; otherwise returns the write.
pub(crate) fn start_write_from(node: &Arc<Node>, offset: u64, memory: ForeignVec) -> Start {
    let located = fast::locate(node, MapOp::Write, offset, memory.len(), Entry::New);
    start(Begun { located, memory })
}

fn start(begun: Begun) -> Start {
    let Located::Host(Place { node: leaf, offset }) = &begun.located else {
        return Start::Begun(begun);
    };
    if !leaf.takes_ranges(|alignment| begun.memory.is_aligned(alignment)) {
        return Start::Begun(begun);
    }
    let Some(file) = leaf.driver().host_file() else { return Start::Begun(begun) };
    let counted = match leaf.request_alignment() > 1 {
        false => None,
        true => match count_in_place(leaf, *offset, as_u64(begun.memory.len())) {
            None => return Start::Begun(begun),
            counted => counted,
        },
    };
    leaf.unflushed.expect();
    let operation = file.write_foreign_at(begun.memory.clone(), *offset, false);
    Start::InPlace(InPlace { operation, memory: begun.memory, counted })
}

impl InPlace {
    /// Waits for the operation. If the host wrote only a part of the data, or failed, the caller must
    /// [finish](finish_in_place) the write with a copy of the data.
    pub(crate) async fn done(self, node: &Node) -> std::result::Result<(), Unfinished> {
        let outcome = self.operation.await;
        end_in_place(node, self.counted);
        match outcome {
            Ok(done) if done == self.memory.len() => Ok(()),
            outcome => Err(Unfinished { outcome, data: self.memory.to_buf() }),
        }
    }
}

/// Completes a write through `node` at `offset`. Of the flags, only [`WriteFlags::UNCHANGED`] may be set.
pub(crate) async fn continue_write_from(
    node: &Arc<Node>,
    offset: u64,
    begun: Begun,
    flags: WriteFlags,
) -> Result<()> {
    let outcome = write_located(node, offset, begun, flags).await;
    node.mark_unflushed();
    outcome
}

fn write_located<'a>(
    node: &'a Arc<Node>,
    offset: u64,
    begun: Begun,
    flags: WriteFlags,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        let Begun { located, memory } = match start(begun) {
            Start::InPlace(operation) => {
                return match operation.done(node).await {
                    Ok(()) => Ok(()),
                    Err(rest) => finish_in_place(node, offset, rest).await,
                };
            }
            Start::Begun(begun) => begun,
        };
        match located {
            Located::Host(place) | Located::Slow(place) => {
                slow::write(place.node, place.offset, memory.to_buf(), flags).await
            }
            // A driver must not report zeroes for a write.
            Located::Zero => write(node, offset, memory.to_buf(), flags).await,
            Located::Wait(Place { node, offset }) => {
                admit::wait(&node, MapOp::Write, offset, as_u64(memory.len())).await;
                write_admitted(&node, offset, memory, flags).await
            }
            Located::Split { below, first } => {
                let Place { node, offset } =
                    below.unwrap_or_else(|| Place { node: Arc::clone(node), offset });
                write_split(&node, offset, memory, first, flags).await
            }
        }
    })
}

/// Writes to a node that has admitted the request.
async fn write_admitted(
    node: &Arc<Node>,
    offset: u64,
    memory: ForeignVec,
    flags: WriteFlags,
) -> Result<()> {
    let located = fast::locate(node, MapOp::Write, offset, memory.len(), Entry::Admitted);
    continue_write_from(node, offset, Begun { located, memory }, flags).await
}

async fn write_split(
    node: &Arc<Node>,
    offset: u64,
    mut memory: ForeignVec,
    first: usize,
    flags: WriteFlags,
) -> Result<()> {
    let mut pieces = Vec::new();
    for (at, len) in fast::extents(node, MapOp::Write, offset, memory.len(), first) {
        let piece = memory.split_to(len);
        pieces.push(write_admitted(node, at, piece, flags));
    }
    run_all(pieces).await
}
