//! The old contents: the state that the driver shares with its copies, and reads of the snapshot.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use futures_util::future::try_join_all;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildrenRef, Edge, Errno, Error, Result, SnapshotAccess, Status,
    StatusFlags, Want,
};
use oxblk_ring::{IoBufMut, RangeLock};

use super::clusters::Clusters;
use super::deadline::Running;
use super::options::OnError;

/// The contents of a disk at one point in time. See the module [`super`] for the order of the steps.
pub(super) struct Snapshot {
    /// The node-name, for errors.
    pub(super) name: String,
    pub(super) children: ChildrenRef,
    pub(super) target: ChildIdx,
    pub(super) clusters: Clusters,
    pub(super) on_error: OnError,
    /// The time limit of the copies for one request.
    pub(super) timeout: Option<Duration>,
    /// A cluster has changed that could not be copied. Nothing is copied any more.
    pub(super) is_broken: AtomicBool,
    /// The clusters that are being copied or discarded.
    pub(super) copies: RangeLock,
    /// The ranges that reads of the snapshot read from the disk.
    pub(super) reads: RangeLock,
    pub(super) background: Running,
}

impl Snapshot {
    /// The edge to the disk.
    pub(super) fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    /// The edge to the target.
    pub(super) fn target(&self) -> Result<Arc<Edge>> {
        self.children.require(self.target)
    }

    /// Fails unless the complete range is accessible.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let error = || Error::from_errno(Errno::ACCES).on_node(&self.name).at(offset);
        if self.is_broken.load(SeqCst) {
            return Err(error().prefix("The snapshot is not valid any more"));
        }
        if self.clusters.accessible(offset, len) < len {
            return Err(error().prefix("The snapshot does not contain the range"));
        }
        Ok(())
    }

    /// Reads a part of the snapshot. Parts that are in the same place are read with one request; all of them concurrently.
    async fn read_parts(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let mut parts = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let (_, len) = self.clusters.copied(at, as_u64(buf.len()));
            let part =
                buf.split_to(usize::try_from(len.max(1)).unwrap_or(usize::MAX).min(buf.len()));
            let next = at.saturating_add(as_u64(part.len()));
            parts.push(self.read_part(at, part));
            at = next;
        }
        joined(try_join_all(parts).await?)
    }

    /// Reads a range that was in one place at the last look. Clusters that were copied meanwhile are read from the target.
    async fn read_part(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let mut parts = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let place = self.place(at, as_u64(buf.len())).await?;
            let len = usize::try_from(place.len.max(1)).unwrap_or(usize::MAX).min(buf.len());
            let part = place.edge.read(at, buf.split_to(len)).await?;
            at = at.saturating_add(as_u64(part.len()));
            parts.push(part);
        }
        joined(parts)
    }

    /// Finds the old data of the start of a range.
    async fn place(&self, offset: u64, len: u64) -> Result<Place<'_>> {
        let (is_copied, len) = self.clusters.copied(offset, len);
        if is_copied {
            return Ok(Place { edge: self.target()?, len, is_copied, _reading: None });
        }
        oxblk_ring::perturb::point();
        let reading = self.reads.lock_shared(offset..offset.saturating_add(len)).await;
        // A copy may have ended before the lock was taken. Later changes of this range wait until the lock is released.
        let (is_copied, len) = self.clusters.copied(offset, len);
        if is_copied {
            return Ok(Place { edge: self.target()?, len, is_copied, _reading: None });
        }
        Ok(Place { edge: self.file()?, len, is_copied, _reading: Some(reading) })
    }
}

/// Where old data is. The data does not change as long as this value exists.
struct Place<'a> {
    edge: Arc<Edge>,
    /// The number of bytes that are there.
    len: u64,
    is_copied: bool,
    _reading: Option<oxblk_ring::RangeGuard<'a>>,
}

impl SnapshotAccess for Snapshot {
    fn size(&self) -> u64 {
        self.clusters.size()
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let len = as_u64(buf.len());
            self.check(offset, len)?;
            let buf = self.read_parts(offset, buf).await?;
            // A change that broke the snapshot did not wait for this read, and neither did a discard of the range.
            self.check(offset, len)?;
            Ok(buf)
        })
    }

    fn block_status(&self, offset: u64, len: u64, want: Want) -> BoxFuture<'_, Result<Status>> {
        Box::pin(async move {
            let len = self.clusters.accessible(offset, len).max(1);
            self.check(offset, len)?;
            let place = self.place(offset, len).await?;
            let found = place.edge.chain_status(offset, place.len, want).await?;
            self.check(offset, len)?;
            let mut status = match found.is_zero() {
                true => Status::zero(found.len),
                false => Status::data(found.len),
            };
            if found.len == 0 {
                // Behind the end of a disk that became shorter.
                status = Status::zero(place.len);
            }
            if !place.is_copied && found.flags.contains(StatusFlags::OFFSET_VALID) {
                status.flags |= StatusFlags::OFFSET_VALID;
                (status.host, status.child) = (found.host, Some(ChildIdx::FILE));
            }
            Ok(status)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let clusters = self.clusters.whole(offset, len);
            if clusters.is_empty() {
                return Ok(());
            }
            self.clusters.set_discarded(&clusters);
            let _copying = self.copies.lock(clusters.clone()).await;
            self.wait_for_reads(&clusters).await;
            self.clusters.set_ready(&clusters);
            discard_copies(&*self.target()?, &clusters).await
        })
    }

    fn restart(&self) {
        self.clusters.restart();
        self.is_broken.store(false, SeqCst);
    }
}

/// Discards clusters of the target, as far as the target has them.
async fn discard_copies(target: &Edge, clusters: &Range<u64>) -> Result<()> {
    let end = clusters.end.min(target.size());
    match end.checked_sub(clusters.start).filter(|len| *len > 0) {
        Some(len) => target.discard(clusters.start, len).await,
        None => Ok(()),
    }
}

/// Joins buffers that were parts of one buffer.
fn joined(parts: Vec<IoBufMut>) -> Result<IoBufMut> {
    let mut parts = parts.into_iter();
    let Some(mut whole) = parts.next() else { return Ok(IoBufMut::new(0)) };
    for part in parts {
        let replaced =
            |_| Error::from_errno(Errno::IO).prefix("A node replaced the buffer of a read");
        whole.unsplit(part).map_err(replaced)?;
    }
    Ok(whole)
}

fn as_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
