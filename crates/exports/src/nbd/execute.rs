//! Execution of one request on a backend.
//!
//! A request that has passed the checks of the protocol is executed. A request that the checks have refused only gets
//! its error. If the backend returns an error, the errno value of the error is converted to the NBD error that is sent
//! to the client. The module `outbox` encodes the reply.

use super::account::{Hold, footprint};
use oxblk_core::{Backend, Errno, Error, Result, StatusFlags, Want, WriteFlags, ZeroFlags};
use oxblk_nbd::proto::AllocationFlags;
use oxblk_nbd::wire::StatusExtent;
use oxblk_nbd::{Command, ErrorCode, Request};
use oxblk_ring::{IoBuf, IoBufMut};
use std::borrow::Cow;
use std::rc::Rc;

/// Maximum number of extents in one reply to a block status request.
const MAX_EXTENTS: usize = 8192;
/// Length in bytes of one read of a prefetch.
const PREFETCH: usize = 1 << 20;
/// Maximum number of status queries of one request.
const MAX_QUERIES: usize = 1 << 16;
/// Number of status queries after which the task yields to other tasks of the thread.
const QUERIES_AT_ONCE: usize = 64;

/// The outcome of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Success without data.
    Done,
    /// Success with the data of a read. `whole`: the data must be sent as one chunk.
    Data { offset: u64, data: IoBuf, whole: bool },
    /// Extents of the context `base:allocation`; at least one extent.
    Status(Vec<StatusExtent>),
    /// The error, and a message of one line.
    Failed(ErrorCode, Cow<'static, str>),
}

/// The outcome of a request, and the cost that was accounted for the request.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) cookie: u64,
    pub(super) outcome: Outcome,
    pub(super) cost: Cost,
}

/// The cost of a request. The cost is accounted until the reply has been sent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    /// Bytes of data.
    pub(super) data: usize,
    /// Bytes of memory that are accounted for the request.
    pub(super) held: usize,
}

/// A request that was completely received. The request is either valid and accounted, or refused by the checks of the
/// protocol.
pub(super) struct Accepted {
    pub(super) cookie: u64,
    /// The request, with the data of a write; or the error if the request is refused.
    pub(super) work: std::result::Result<(Request, Option<IoBuf>), ErrorCode>,
    pub(super) cost: Cost,
    /// The receive block that contains the data of a small write.
    pub(super) block: Option<Rc<Hold>>,
}

/// The memory that the execution of a request takes, without the data of a write.
pub(super) fn memory(request: &Request) -> usize {
    let length = usize::try_from(request.length).unwrap_or(usize::MAX);
    match request.command {
        Command::Read { .. } => footprint(length),
        Command::Cache => footprint(length.min(PREFETCH)),
        Command::BlockStatus { one: false } => {
            // This estimate assumes that an extent covers at least one sector.
            footprint(MAX_EXTENTS.min(length / 512 + 1) * size_of::<(u64, AllocationFlags)>())
        }
        _ => 0,
    }
}

/// Executes a request.
pub(super) async fn execute(backend: Rc<Backend>, accepted: Accepted) -> Reply {
    let Accepted { cookie, work, cost, block } = accepted;
    let outcome = match work {
        Err(error) => Outcome::Failed(error, error.message().into()),
        Ok((request, payload)) => match perform(&backend, &request, payload).await {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::debug!(command = ?request.command, offset = request.offset, %error);
                let code = ErrorCode::from_errno(error.raw_errno());
                Outcome::Failed(code, error.to_string().into())
            }
        },
    };
    drop(block);
    Reply { cookie, outcome, cost }
}

async fn perform(backend: &Backend, request: &Request, payload: Option<IoBuf>) -> Result<Outcome> {
    let (offset, length) = (request.offset, u64::from(request.length));
    if length == 0 && request.command != Command::Flush {
        let read = matches!(request.command, Command::Read { .. });
        let empty = Outcome::Data { offset, data: IoBuf::zeroes(0), whole: false };
        return Ok(if read { empty } else { Outcome::Done });
    }
    match request.command {
        Command::Read { dont_fragment } => {
            let buf = buffer(usize::try_from(length).unwrap_or(usize::MAX))?;
            let data = backend.read(offset, buf).await?.freeze();
            return Ok(Outcome::Data { offset, data, whole: dont_fragment });
        }
        Command::Write { fua } => {
            let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
            backend.write(offset, payload.unwrap_or_else(|| IoBuf::zeroes(0)), flags).await?;
        }
        Command::WriteZeroes { fua, may_unmap, fast } => {
            let mut flags = ZeroFlags::empty();
            flags.set(ZeroFlags::FUA, fua);
            flags.set(ZeroFlags::MAY_UNMAP, may_unmap);
            flags.set(ZeroFlags::NO_FALLBACK, fast);
            Box::pin(backend.write_zeroes(offset, length, flags)).await?;
        }
        Command::Trim { fua } => Box::pin(trim(backend, offset, length, fua)).await?,
        Command::Flush => Box::pin(backend.flush()).await?,
        Command::Cache => Box::pin(prefetch(backend, offset, length)).await?,
        Command::BlockStatus { one } => {
            return Box::pin(status(backend, offset, length, one)).await.map(Outcome::Status);
        }
        Command::Disconnect => {}
    }
    Ok(Outcome::Done)
}

/// Allocates a buffer whose length the client chooses. If the memory is not available, this function returns `ENOMEM`
/// and does not abort the process.
fn buffer(len: usize) -> Result<IoBufMut> {
    IoBufMut::try_new(len).ok_or_else(|| Error::from_errno(Errno::NOMEM))
}

async fn trim(backend: &Backend, offset: u64, length: u64, fua: bool) -> Result<()> {
    backend.discard(offset, length).await?;
    if fua { backend.flush().await } else { Ok(()) }
}

/// Reads a range, so that the page cache of the host contains the range.
async fn prefetch(backend: &Backend, mut offset: u64, mut length: u64) -> Result<()> {
    while length > 0 {
        let step = usize::try_from(length).unwrap_or(PREFETCH).min(PREFETCH);
        backend.read(offset, buffer(step)?).await?;
        let step = u64::try_from(step).unwrap_or(length);
        offset = offset.saturating_add(step);
        length -= step;
    }
    Ok(())
}

/// The extents of a range. Adjacent extents with equal flags are merged. To limit the work of one request, the extents
/// may end before the end of the range. The protocol allows this.
async fn status(
    backend: &Backend,
    mut offset: u64,
    mut length: u64,
    one: bool,
) -> Result<Vec<StatusExtent>> {
    let mut extents: Vec<(u64, AllocationFlags)> = Vec::new();
    let mut queries = 0_usize;
    while length > 0 && queries < MAX_QUERIES {
        queries += 1;
        if queries.is_multiple_of(QUERIES_AT_ONCE) {
            oxblk_ring::yield_now().await;
        }
        let status = backend.block_status(offset, length, Want::Precise).await?.status;
        let step = status.len.clamp(1, length);
        let flags = allocation(status.flags);
        let full = extents.len() >= if one { 1 } else { MAX_EXTENTS };
        match extents.last_mut() {
            Some((len, last)) if *last == flags => *len += step,
            _ if full => break,
            _ => extents.push((step, flags)),
        }
        offset = offset.saturating_add(step);
        length -= step;
    }
    Ok(extents
        .into_iter()
        .map(|(len, flags)| StatusExtent {
            length: u32::try_from(len).unwrap_or(u32::MAX).into(),
            flags: flags.bits().into(),
        })
        .collect())
}

fn allocation(status: StatusFlags) -> AllocationFlags {
    let mut flags = AllocationFlags::empty();
    flags.set(AllocationFlags::HOLE, !status.contains(StatusFlags::DATA));
    flags.set(AllocationFlags::ZERO, status.contains(StatusFlags::ZERO));
    flags
}
