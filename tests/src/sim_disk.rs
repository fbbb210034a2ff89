//! A node on a simulated disk, for graphs that run in [`oxblk_ring::sim`].
//!
//! The driver is a simple replacement of the protocol driver for host files: every request is one operation on the disk, and
//! `map` returns the disk for reads and in-place writes. Outside the simulated executor, the disk completes each operation
//! immediately. With [`Pace::GivesWay`], the requests of a node often yield, so that other requests execute before them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use oxblk_core::driver::Resize;
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, Graph, HostFile, Limits, MapOp, Node,
    OpenContext, OpenFlags, Preallocation, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{Falloc, File, IoBuf, IoBufMut, sim::Disk};

use crate::random::Random;

/// The moment at which a node executes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Immediately.
    AtOnce,
    /// In many cases only after other tasks of the thread have run.
    GivesWay,
}

/// The factory of the driver. [`add`] creates nodes: the driver cannot be opened by name.
pub struct SimFactory;

impl DriverFactory for SimFactory {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("a simulated disk is not opened by name")) })
    }
}

/// A part of a disk. Several nodes on one disk lose power at the same moment.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// All of the disk.
    Whole,
    /// The first bytes of the disk, up to this offset. The node has a fixed size.
    First(u64),
    /// The bytes from this offset on. The node can grow.
    Behind(u64),
}

impl Part {
    fn start(self) -> u64 {
        match self {
            Part::Whole | Part::First(_) => 0,
            Part::Behind(start) => start,
        }
    }

    fn size(self, disk: &Disk) -> u64 {
        match self {
            Part::Whole => disk.len(),
            Part::First(size) => size,
            Part::Behind(start) => disk.len().saturating_sub(start),
        }
    }
}

/// Adds a node named `name` on `disk`.
///
/// # Errors
/// When the name is in use.
pub fn add(
    graph: &Graph,
    name: &str,
    disk: &Disk,
    read_only: bool,
    pace: Pace,
) -> Result<Arc<Node>> {
    add_part(graph, name, (disk, Part::Whole), read_only, pace)
}

/// Adds a node named `name` on a part of a disk.
///
/// # Errors
/// When the name is in use.
pub fn add_part(
    graph: &Graph,
    name: &str,
    (disk, part): (&Disk, Part),
    read_only: bool,
    pace: Pace,
) -> Result<Arc<Node>> {
    let size = AtomicU64::new(part.size(disk));
    let driver = SimDriver { file: File::sim(disk), part, size, pace, turn: AtomicU64::new(0) };
    let flags = OpenFlags { read_only, unmap: true, ..OpenFlags::default() };
    graph.add_node(Some(name), &SimFactory, Box::new(driver), flags)
}

struct SimDriver {
    file: File,
    part: Part,
    size: AtomicU64,
    pace: Pace,
    /// Counts the requests, to choose which of them yield.
    turn: AtomicU64,
}

impl SimDriver {
    /// Returns a random number for the next request.
    fn draw(&self) -> u64 {
        Random::new(self.turn.fetch_add(1, Relaxed)).below(8)
    }

    /// Converts an offset of the node to an offset of the disk.
    fn at(&self, offset: u64) -> u64 {
        self.part.start() + offset
    }

    fn grows(&self) -> bool {
        !matches!(self.part, Part::First(_))
    }

    async fn give_way(&self) {
        if self.pace == Pace::GivesWay {
            for _ in 4..self.draw() {
                oxblk_ring::yield_now().await;
            }
        }
    }
}

fn len_of(bytes: usize) -> u64 {
    bytes as u64
}

impl Driver for SimDriver {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        let size = self.size.load(SeqCst);
        if offset >= size || (op == MapOp::Write && offset + len > size) {
            return Step::Slow;
        }
        if self.pace == Pace::GivesWay && self.draw() < 6 {
            return Step::Slow;
        }
        Step::Host { offset: self.at(offset), len: len.min(size - offset) }
    }

    fn host_file(&self) -> Option<HostFile<'_>> {
        Some(HostFile::Fixed(&self.file))
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.give_way().await;
            Ok(self.file.read_full_at(buf, self.at(offset)).await?.0)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.give_way().await;
            let end = offset + len_of(data.len());
            let fua = flags.contains(WriteFlags::FUA);
            self.file.write_all_at(data, self.at(offset), fua).await?;
            self.size.fetch_max(end, SeqCst);
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.give_way().await;
            let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
            let inside = offset + len <= self.size.load(SeqCst);
            let mode = if unmap && inside { Falloc::PunchHole } else { Falloc::ZeroRange };
            self.file.fallocate(mode, self.at(offset), len).await?;
            self.size.fetch_max(offset + len, SeqCst);
            Ok(())
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.give_way().await;
            Ok(self.file.fallocate(Falloc::PunchHole, self.at(offset), len).await?)
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async {
            self.give_way().await;
            Ok(self.file.sync(true).await?)
        }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            let extent = self.file.seek_extent(self.at(offset)).await?;
            let len = len.min(extent.end - self.at(offset));
            Ok(if extent.is_data { Status::data(len) } else { Status::zero(len) })
        }))
    }

    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_flags: ZeroFlags::MAY_UNMAP,
            grows: self.grows(),
            has_zero_init: true,
            ..Limits::default()
        }
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for SimDriver {
    fn resize(&self, size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if !self.grows() {
                return Err(Error::unsupported("a part of a disk has the size that it has"));
            }
            self.file.set_len(self.at(size)).await?;
            self.size.store(size, SeqCst);
            Ok(())
        })
    }
}
