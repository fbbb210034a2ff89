//! The fast path: maps a request from a node down to one operation on a host file, without I/O.
//!
//! Each hop borrows the child's edge from the slot without counting a reference. So threads that use the same chain
//! write to no shared cache line. No borrow outlives the submission of the operation: the operation itself keeps its
//! file and its buffer alive, and the graph changes only after requests have ended.

use std::sync::Arc;

use arc_swap::Guard;
use oxblk_ring::{IoBuf, IoBufMut, ReadAt, WriteAt};

use super::admit::{Entry, incoming, try_admit};
use super::{as_u64, min_len};
use crate::driver::{MapOp, Step};
use crate::node::SlowPathFlags;
use crate::{Edge, Node};

/// A node at which a request continues. The node has admitted the request.
pub(super) struct Place {
    pub(super) node: Arc<Node>,
    pub(super) offset: u64,
}

pub(super) enum ReadStart {
    Done(IoBufMut),
    InFlight(ReadAt),
    /// The node has admitted the request.
    Slow {
        node: Arc<Node>,
        offset: u64,
        buf: IoBufMut,
    },
    /// The request must wait until the node admits it.
    Wait {
        node: Arc<Node>,
        offset: u64,
        buf: IoBufMut,
    },
    /// Only the first `first` bytes can be read with one operation.
    Split {
        /// The last node that has admitted the request, if there is one below the first node. The pieces continue there.
        below: Option<Place>,
        first: usize,
        buf: IoBufMut,
    },
}

pub(super) enum WriteStart {
    InFlight {
        op: WriteAt,
        len: usize,
        data: IoBuf,
    },
    /// The request is aligned, and the leaf requires alignment. So the write must be counted.
    Tracked {
        leaf: Arc<Node>,
        offset: u64,
        data: IoBuf,
    },
    /// The node has admitted the request.
    Slow {
        node: Arc<Node>,
        offset: u64,
        data: IoBuf,
    },
    /// The request must wait until the node admits it.
    Wait {
        node: Arc<Node>,
        offset: u64,
        data: IoBuf,
    },
    Split {
        /// See [`ReadStart::Split`].
        below: Option<Place>,
        first: usize,
        data: IoBuf,
    },
}

/// The point where the walk down from a node ended.
enum End<'a> {
    /// The range lies in the host file of this leaf.
    Host { leaf: &'a Arc<Node>, offset: u64 },
    /// The range reads as zeroes.
    Zero,
    /// The node needs the slow path.
    Slow { node: &'a Arc<Node>, offset: u64 },
    /// The request must wait until the node admits it.
    Wait { node: &'a Arc<Node>, offset: u64 },
    /// Only the first `first` bytes (more than 0) can be transferred with one operation.
    Split { first: usize },
}

/// The last node below the first node of a walk that has admitted the request.
type Admitter<'a> = Option<(&'a Arc<Node>, u64)>;

/// Whether a walk asks the nodes for admission.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// The first node and the nodes below it.
    All,
    /// The nodes below the first node.
    Below,
    /// No node: the walk only looks up where the range lies.
    None,
}

impl From<Entry> for Ask {
    fn from(entry: Entry) -> Self {
        match entry {
            Entry::New => Self::All,
            Entry::Admitted => Self::Below,
        }
    }
}

impl Place {
    fn of((node, offset): (&Arc<Node>, u64)) -> Self {
        Self { node: Arc::clone(node), offset }
    }
}

/// Walks from `root` down to the storage of `offset..offset + len` and passes the end point to `then`, with the last node below
/// `root` that has admitted the request. A request that continues after the walk continues there, not at `root`.
fn walk<T>(
    root: &Arc<Node>,
    op: MapOp,
    offset: u64,
    len: usize,
    ask: Ask,
    then: impl FnOnce(End<'_>, Admitter<'_>) -> T,
) -> T {
    let mut hop: Option<Guard<Option<Arc<Edge>>>> = None;
    let mut at = offset;
    // The edge to the last node that has admitted the request, and the offset in this node.
    let mut admitter: Option<(Guard<Option<Arc<Edge>>>, u64)> = None;
    // The end, and the last node if it has admitted the request.
    let (end, here) = loop {
        let node = match &hop {
            None => root,
            Some(edge) => match edge.as_ref() {
                Some(edge) => edge.node(),
                // Unreachable: the slot was checked before the hop.
                None => break (End::Slow { node: root, offset }, None),
            },
        };
        let admits = node.has_gate(SlowPathFlags::ADMITS);
        let asks = admits
            && match ask {
                Ask::All => true,
                Ask::Below => hop.is_some(),
                Ask::None => false,
            };
        if asks && !try_admit(node, &incoming(op, at, as_u64(len))) {
            break (End::Wait { node, offset: at }, None);
        }
        let is_admitter = admits && hop.is_some();
        let here = is_admitter.then_some((node, at));
        let room = node.size().saturating_sub(at);
        if room < as_u64(len) {
            let end = match (op, min_len(room, len)) {
                (MapOp::Write, _) => End::Slow { node, offset: at },
                (MapOp::Read, 0) => End::Zero,
                (MapOp::Read, first) => End::Split { first },
            };
            break (end, here);
        }
        if node.must_go_slow(op, at, len) {
            break (End::Slow { node, offset: at }, here);
        }
        let next = match node.driver().map(op, at, as_u64(len)) {
            Step::Slow => break (End::Slow { node, offset: at }, here),
            Step::Zero { len: covered } => {
                let first = min_len(covered, len);
                let end = if first < len { End::Split { first } } else { End::Zero };
                break (end, here);
            }
            Step::Host { offset: host, len: covered } => {
                let first = min_len(covered, len);
                // The node counts the whole write. The pieces of a split write do not count beyond it.
                if op == MapOp::Write {
                    node.note_write(at, as_u64(len));
                }
                let end = match first < len {
                    true => End::Split { first },
                    false => End::Host { leaf: node, offset: host },
                };
                break (end, here);
            }
            Step::Forward { child, offset: below, len: covered } => {
                let first = min_len(covered, len);
                if first < len {
                    // The node counts the whole write. The pieces do not count beyond it.
                    if op == MapOp::Write {
                        node.note_write(at, as_u64(len));
                    }
                    break (End::Split { first }, here);
                }
                // On the fast path only a leaf counts the write, but this node must count the write too; see
                // [`super::align`].
                if op == MapOp::Write && node.request_alignment() > 1 {
                    break (End::Slow { node, offset: at }, here);
                }
                let edge = node.children().peek(child);
                if edge.is_none() {
                    break (End::Slow { node, offset: at }, here);
                }
                if op == MapOp::Write {
                    node.note_write(at, as_u64(len));
                }
                (edge, below)
            }
        };
        if op == MapOp::Write {
            node.unflushed.expect();
        }
        let passed = hop.replace(next.0);
        if is_admitter {
            admitter = passed.map(|edge| (edge, at));
        }
        at = next.1;
    };
    let above = || {
        let (edge, offset) = admitter.as_ref()?;
        Some((edge.as_ref()?.node(), *offset))
    };
    then(end, here.or_else(above))
}

/// The reasons why a read must take the slow path.
const SLOW_READS: SlowPathFlags =
    SlowPathFlags::COPY_ON_READ.union(SlowPathFlags::REPORTS_EVENTS).union(SlowPathFlags::TRACKS);

impl Node {
    /// Whether a request must take the slow path at this node, regardless of the driver's `map`.
    fn must_go_slow(&self, op: MapOp, offset: u64, len: usize) -> bool {
        let gated = match op {
            MapOp::Read => self.has_gate(SLOW_READS),
            MapOp::Write => self.gated() || self.is_read_only(),
        };
        if gated {
            return true;
        }
        let mask = u64::from(self.request_alignment()).saturating_sub(1);
        (offset | as_u64(len)) & mask != 0
    }
}

pub(super) fn start_read(
    root: &Arc<Node>,
    offset: u64,
    mut buf: IoBufMut,
    entry: Entry,
) -> ReadStart {
    let len = buf.len();
    let address = buf.as_ptr().addr();
    walk(root, MapOp::Read, offset, len, entry.into(), |end, admitter| match end {
        End::Zero => {
            buf.fill(0);
            ReadStart::Done(buf)
        }
        End::Split { first } => ReadStart::Split { below: admitter.map(Place::of), first, buf },
        End::Slow { node, offset } => ReadStart::Slow { node: Arc::clone(node), offset, buf },
        End::Wait { node, offset } => ReadStart::Wait { node: Arc::clone(node), offset, buf },
        End::Host { leaf, offset } => match leaf.driver().host_file() {
            Some(file) if leaf.takes_memory_at(address) => {
                ReadStart::InFlight(file.read_at(buf, offset))
            }
            _ => ReadStart::Slow { node: Arc::clone(leaf), offset, buf },
        },
    })
}

pub(super) fn start_write(root: &Arc<Node>, offset: u64, data: IoBuf, entry: Entry) -> WriteStart {
    let len = data.len();
    let address = data.as_ptr().addr();
    walk(root, MapOp::Write, offset, len, entry.into(), |end, admitter| match end {
        End::Split { first } => WriteStart::Split { below: admitter.map(Place::of), first, data },
        End::Slow { node, offset } => WriteStart::Slow { node: Arc::clone(node), offset, data },
        End::Wait { node, offset } => WriteStart::Wait { node: Arc::clone(node), offset, data },
        // A driver must not return `Zero` for a write. If a driver does so, the write takes the slow path.
        End::Zero => {
            let Place { node, offset } = Place::of(admitter.unwrap_or((root, offset)));
            WriteStart::Slow { node, offset, data }
        }
        End::Host { leaf, offset } => match leaf.driver().host_file() {
            Some(file) if leaf.takes_memory_at(address) => {
                if leaf.request_alignment() > 1 {
                    return WriteStart::Tracked { leaf: Arc::clone(leaf), offset, data };
                }
                leaf.unflushed.expect();
                WriteStart::InFlight { op: file.write_at(data.clone(), offset, false), len, data }
            }
            _ => WriteStart::Slow { node: Arc::clone(leaf), offset, data },
        },
    })
}

/// The offset and the length of each piece of a range that is transferred with several operations. `first` is the length of the
/// first piece.
pub(super) fn extents(
    root: &Arc<Node>,
    op: MapOp,
    offset: u64,
    len: usize,
    first: usize,
) -> impl Iterator<Item = (u64, usize)> {
    let (mut at, mut left, mut first) = (offset, len, Some(first));
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let len = match first.take() {
            Some(first) => first.min(left),
            None => extent_len(root, op, at, left),
        };
        let piece = (at, len);
        at = at.saturating_add(as_u64(len));
        left -= len;
        Some(piece)
    })
}

/// Number of bytes from `offset` on (1 to `len`) that can be transferred with one operation.
fn extent_len(root: &Arc<Node>, op: MapOp, offset: u64, len: usize) -> usize {
    walk(root, op, offset, len, Ask::None, |end, _| match end {
        End::Split { first } => first.clamp(1, len),
        _ => len,
    })
}

/// The node at which the rest of a request continues after its operation on the host has transferred only a part: the last
/// node that has admitted the request, or `root`.
pub(super) fn last_admitter(root: &Arc<Node>, op: MapOp, offset: u64, len: usize) -> Place {
    walk(root, op, offset, len, Ask::None, |_, admitter| {
        Place::of(admitter.unwrap_or((root, offset)))
    })
}

/// Whether a host file contains the complete range, and the drivers can map it without I/O.
pub(super) fn is_on_host(root: &Arc<Node>, op: MapOp, offset: u64, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| {
        walk(root, op, offset, len, Ask::None, |end, _| matches!(end, End::Host { .. }))
    })
}

/// Where a request ended its walk; see [`locate`].
pub(super) enum Located {
    /// The range lies in the host file of this node.
    Host(Place),
    /// The range reads as zeroes.
    Zero,
    /// The request takes the slow path at the node, which has admitted it.
    Slow(Place),
    /// The request must wait until the node admits it.
    Wait(Place),
    /// See [`ReadStart::Split`].
    Split { below: Option<Place>, first: usize },
}

/// Walks down with a request, and starts no operation.
pub(super) fn locate(
    root: &Arc<Node>,
    op: MapOp,
    offset: u64,
    len: usize,
    entry: Entry,
) -> Located {
    walk(root, op, offset, len, entry.into(), |end, admitter| match end {
        End::Host { leaf, offset } => Located::Host(Place::of((leaf, offset))),
        End::Zero => Located::Zero,
        End::Slow { node, offset } => Located::Slow(Place::of((node, offset))),
        End::Wait { node, offset } => Located::Wait(Place::of((node, offset))),
        End::Split { first } => Located::Split { below: admitter.map(Place::of), first },
    })
}
