//! Executes operations on a disk and checks their results.

use std::cell::RefCell;
use std::rc::Rc;

use oxblk_core::{Backend, Want, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::ops::{Op, content};
use super::oracle::{Oracle, StatusExtent};

/// The result of an operation.
#[derive(Debug)]
pub enum Seen {
    /// Completion without data.
    Done,
    /// The bytes of a read.
    Bytes(IoBufMut),
    /// The extents of a status query.
    Extents(Vec<StatusExtent>),
}

/// Executes one operation.
///
/// # Errors
/// The error that the disk reports.
pub async fn execute(disk: &Backend, op: &Op) -> oxblk_core::Result<Seen> {
    match *op {
        Op::Read { offset, len } => {
            let buf = IoBufMut::filled(usize::try_from(len).expect("fits in memory"), 0xee);
            return disk.read(offset, buf).await.map(Seen::Bytes);
        }
        Op::Write { offset, len, seed, fua } => {
            let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
            disk.write(offset, IoBuf::from(content(seed, offset, len)), flags).await?;
        }
        Op::WriteCompressed { offset, len, seed } => {
            let data = IoBuf::from(content(seed, offset, len));
            disk.write(offset, data, WriteFlags::COMPRESSED).await?;
        }
        Op::WriteZeroes { offset, len, unmap } => {
            let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            disk.write_zeroes(offset, len, flags).await?;
        }
        Op::Discard { offset, len } => disk.discard(offset, len).await?,
        Op::Status { offset, len } => return status(disk, offset, len).await.map(Seen::Extents),
        Op::Flush => disk.flush().await?,
    }
    Ok(Seen::Done)
}

/// Returns the extents of a range, up to the end of the disk. An empty answer is allowed only at the end of the disk.
async fn status(disk: &Backend, offset: u64, len: u64) -> oxblk_core::Result<Vec<StatusExtent>> {
    let mut extents = Vec::new();
    let mut at = offset;
    while at < offset + len {
        let extent = disk.block_status(at, offset + len - at, Want::Precise).await?.status;
        if extent.len == 0 && at >= disk.size() {
            break;
        }
        assert!(extent.len > 0 && extent.len <= offset + len - at, "status at {at}: {extent:?}");
        extents.push(StatusExtent { len: extent.len, zero: extent.is_zero() });
        at += extent.len;
    }
    Ok(extents)
}

/// Checks the result of an operation, or applies the operation to the model.
///
/// # Errors
/// Describes the difference.
pub fn judge(oracle: &mut Oracle, op: &Op, seen: &Seen) -> Result<(), String> {
    let start = op.range().start;
    match seen {
        Seen::Done => {
            oracle.apply(op);
            Ok(())
        }
        Seen::Bytes(bytes) => oracle.check_read(start, bytes),
        Seen::Extents(extents) => oracle.check_status(start, extents),
    }
    .map_err(|message| format!("{op:?}: {message}"))
}

/// Executes the operations of one batch concurrently and checks their results.
///
/// # Errors
/// Describes the first difference.
pub async fn run_batch(disk: &Backend, oracle: &mut Oracle, batch: &[Op]) -> Result<(), String> {
    let outcomes = Rc::new(RefCell::new(Vec::new()));
    // In a reduced sequence, a resize may have been removed. So leave out operations past the end of the disk.
    let size = disk.size();
    let tasks: Vec<_> = batch
        .iter()
        .filter(|op| op.range().end <= size)
        .map(|op| {
            let (disk, op, outcomes) = (disk.clone(), op.clone(), Rc::clone(&outcomes));
            oxblk_ring::spawn(async move {
                let outcome = execute(&disk, &op).await;
                outcomes.borrow_mut().push((op, outcome));
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    for (op, outcome) in outcomes.take() {
        let seen = outcome.map_err(|error| format!("{op:?}: {error}"))?;
        judge(oracle, &op, &seen)?;
    }
    Ok(())
}

/// Reads the disk and compares it with the model.
///
/// # Errors
/// A text with the position of the first wrong byte.
pub async fn compare_all(disk: &Backend, oracle: &mut Oracle) -> Result<(), String> {
    const STEP: u64 = 1 << 20;
    if disk.size() != oracle.len() {
        return Err(format!("the disk has {} bytes, not {}", disk.size(), oracle.len()));
    }
    let mut offset = 0;
    while offset < oracle.len() {
        let op = Op::Read { offset, len: STEP.min(oracle.len() - offset) };
        let seen = execute(disk, &op).await.map_err(|error| format!("{op:?}: {error}"))?;
        judge(oracle, &op, &seen)?;
        offset += STEP;
    }
    Ok(())
}
