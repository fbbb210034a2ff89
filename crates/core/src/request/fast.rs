//! The fast path: maps a request from a node down to one operation on a host file, without I/O.
//!
//! Each hop borrows the child's edge from the slot without counting a reference. So threads that use the same chain
//! write to no shared cache line. No borrow outlives the submission of the operation: the operation itself keeps its
//! file and its buffer alive, and the graph changes only after requests have ended.

use std::sync::Arc;

use arc_swap::Guard;
use oxblk_ring::{IoBuf, IoBufMut, ReadAt, WriteAt};

use super::{as_u64, min_len};
use crate::driver::{MapOp, Step};
use crate::node::SlowPathFlags;
use crate::{Edge, Node};

pub(super) enum ReadStart {
    Done(IoBufMut),
    InFlight(ReadAt),
    Slow {
        node: Arc<Node>,
        offset: u64,
        buf: IoBufMut,
    },
    /// Only the first `first` bytes can be read with one operation.
    Split {
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
    Slow {
        node: Arc<Node>,
        offset: u64,
        data: IoBuf,
    },
    Split {
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
    /// Only the first `first` bytes (more than 0) can be transferred with one operation.
    Split { first: usize },
}

/// Walks from `root` down to the storage of `offset..offset + len` and passes the end point to `then`.
fn walk<T>(
    root: &Arc<Node>,
    op: MapOp,
    offset: u64,
    len: usize,
    then: impl FnOnce(End<'_>) -> T,
) -> T {
    let mut hop: Option<Guard<Option<Arc<Edge>>>> = None;
    let mut at = offset;
    loop {
        let node = match &hop {
            None => root,
            Some(edge) => match edge.as_ref() {
                Some(edge) => edge.node(),
                // Unreachable: the slot was checked before the hop.
                None => return then(End::Slow { node: root, offset }),
            },
        };
        let room = node.size().saturating_sub(at);
        if room < as_u64(len) {
            let end = match (op, min_len(room, len)) {
                (MapOp::Write, _) => End::Slow { node, offset: at },
                (MapOp::Read, 0) => End::Zero,
                (MapOp::Read, first) => End::Split { first },
            };
            return then(end);
        }
        if node.must_go_slow(op, at, len) {
            return then(End::Slow { node, offset: at });
        }
        let next = match node.driver().map(op, at, as_u64(len)) {
            Step::Slow => return then(End::Slow { node, offset: at }),
            Step::Zero { len: covered } => {
                let first = min_len(covered, len);
                let end = if first < len { End::Split { first } } else { End::Zero };
                return then(end);
            }
            Step::Host { offset: host, len: covered } => {
                let first = min_len(covered, len);
                if first < len {
                    return then(End::Split { first });
                }
                if op == MapOp::Write {
                    node.note_write(at, as_u64(len));
                }
                return then(End::Host { leaf: node, offset: host });
            }
            Step::Forward { child, offset: below, len: covered } => {
                let first = min_len(covered, len);
                if first < len {
                    return then(End::Split { first });
                }
                // On the fast path only a leaf counts the write, but this node must count the write too; see
                // [`super::align`].
                if op == MapOp::Write && node.request_alignment() > 1 {
                    return then(End::Slow { node, offset: at });
                }
                let edge = node.children().peek(child);
                if edge.is_none() {
                    return then(End::Slow { node, offset: at });
                }
                if op == MapOp::Write {
                    node.note_write(at, as_u64(len));
                }
                at = below;
                edge
            }
        };
        if op == MapOp::Write {
            node.unflushed.expect();
        }
        hop = Some(next);
    }
}

/// The reasons why a read must take the slow path.
const SLOW_READS: SlowPathFlags = SlowPathFlags::COPY_ON_READ.union(SlowPathFlags::REPORTS_EVENTS);

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

pub(super) fn start_read(root: &Arc<Node>, offset: u64, mut buf: IoBufMut) -> ReadStart {
    let len = buf.len();
    let address = buf.as_ptr().addr();
    walk(root, MapOp::Read, offset, len, |end| match end {
        End::Zero => {
            buf.fill(0);
            ReadStart::Done(buf)
        }
        End::Split { first } => ReadStart::Split { first, buf },
        End::Slow { node, offset } => ReadStart::Slow { node: Arc::clone(node), offset, buf },
        End::Host { leaf, offset } => match leaf.driver().host_file() {
            Some(file) if leaf.takes_memory_at(address) => {
                ReadStart::InFlight(file.read_at(buf, offset))
            }
            _ => ReadStart::Slow { node: Arc::clone(leaf), offset, buf },
        },
    })
}

pub(super) fn start_write(root: &Arc<Node>, offset: u64, data: IoBuf) -> WriteStart {
    let len = data.len();
    let address = data.as_ptr().addr();
    walk(root, MapOp::Write, offset, len, |end| match end {
        End::Split { first } => WriteStart::Split { first, data },
        End::Slow { node, offset } => WriteStart::Slow { node: Arc::clone(node), offset, data },
        // A driver must not return `Zero` for a write. If a driver does so, the write takes the slow path at the root.
        End::Zero => WriteStart::Slow { node: Arc::clone(root), offset, data },
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

/// Number of bytes from `offset` on (1 to `len`) that can be transferred with one operation.
pub(super) fn extent_len(root: &Arc<Node>, op: MapOp, offset: u64, len: usize) -> usize {
    walk(root, op, offset, len, |end| match end {
        End::Split { first } => first.clamp(1, len),
        _ => len,
    })
}

/// A contiguous range in a host file.
pub(super) struct HostRange {
    pub(super) node: Arc<Node>,
    pub(super) offset: u64,
}

/// The host file that contains the complete range, if the drivers can map it without I/O.
pub(super) fn resolve_host(
    root: &Arc<Node>,
    op: MapOp,
    offset: u64,
    len: u64,
) -> Option<HostRange> {
    let len = usize::try_from(len).ok()?;
    walk(root, op, offset, len, |end| match end {
        End::Host { leaf, offset } => Some(HostRange { node: Arc::clone(leaf), offset }),
        _ => None,
    })
}
