//! Copies clusters to the target before they change.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{Edge, Result, Want, WriteFlags, ZeroFlags, run_all};
use oxblk_ring::IoBufMut;

use super::deadline::Deadline;
use super::snapshot::Snapshot;

/// Maximum number of bytes that are locked and copied at a time, if a cluster is not longer.
const MAX_CHUNK: u64 = 1 << 20;
/// Maximum number of bytes in one read.
pub(super) const MAX_READ: u64 = 1 << 20;
/// Maximum number of chunks that a request copies concurrently.
pub(super) const CHUNKS_AT_ONCE: usize = 4;

impl Snapshot {
    /// Whether a change of `range` needs [`Self::prepare_change`]. This function takes no lock.
    pub(super) fn must_copy(&self, range: &Range<u64>) -> bool {
        !self.is_broken.load(SeqCst) && self.clusters.next_uncopied(range, 1).is_some()
    }

    /// Copies all clusters that a change of `range` touches and that are not ready.
    ///
    /// # Errors
    /// The error of the first copy that failed. The clusters of the other copies are ready. `ETIMEDOUT` if `deadline` passes
    /// before the last copy begins.
    pub(super) async fn copy_all(
        &self,
        range: Range<u64>,
        deadline: Option<&Deadline>,
    ) -> Result<()> {
        let mut at = range.start;
        loop {
            let mut chunks = Vec::new();
            while chunks.len() < CHUNKS_AT_ONCE
                && let Some(chunk) = self.clusters.next_uncopied(&(at..range.end), MAX_CHUNK)
            {
                at = chunk.end;
                chunks.push(Box::pin(self.copy_chunk(chunk, deadline)));
            }
            if chunks.is_empty() {
                return Ok(());
            }
            run_all(chunks).await?;
        }
    }

    /// Makes the clusters of `chunk` ready.
    async fn copy_chunk(&self, chunk: Range<u64>, deadline: Option<&Deadline>) -> Result<()> {
        let locking = self.copies.lock(chunk.clone());
        let locked = match deadline {
            Some(deadline) => deadline.unless_passed(locking).await,
            None => Some(locking.await),
        };
        let Some(_copying) = locked else { return Err(self.too_late()) };
        // Another request may have copied some of the clusters meanwhile.
        while let Some(area) = self.clusters.next_uncopied(&chunk, MAX_CHUNK) {
            if deadline.is_some_and(Deadline::has_passed) {
                return Err(self.too_late());
            }
            let copied = self.copy(area.clone()).await;
            if copied.is_err() && deadline.is_some() {
                // A copy that failed may leave operations of the host in flight.
                oxblk_ring::settled().await;
            }
            copied?;
            self.clusters.set_copied(&area);
            oxblk_ring::perturb::point();
            self.wait_for_reads(&area).await;
            self.clusters.set_ready(&area);
        }
        Ok(())
    }

    /// Waits for the reads of the snapshot that read a part of `clusters` from the disk. Later reads find the clusters copied or
    /// discarded.
    pub(super) async fn wait_for_reads(&self, clusters: &Range<u64>) {
        drop(self.reads.lock(clusters.clone()).await);
    }

    /// Copies a range from the disk to the target. Stops if the snapshot becomes invalid.
    async fn copy(&self, range: Range<u64>) -> Result<()> {
        let (file, target) = (self.file()?, self.target()?);
        let mut at = range.start;
        while let Some(left) = range.end.checked_sub(at).filter(|left| *left > 0) {
            if self.is_broken.load(SeqCst) {
                return Err(self.too_late());
            }
            let status = file.chain_status(at, left, Want::Precise).await;
            let is_zero = status.as_ref().is_ok_and(oxblk_core::Status::is_zero);
            let len = match &status {
                // Behind the end of a disk that became shorter.
                Ok(status) if status.len == 0 => left,
                Ok(status) => status.len.min(left),
                Err(_) => left,
            };
            let len = if is_zero { len } else { len.min(MAX_READ) };
            match is_zero {
                true => zero(&target, at, len).await?,
                false => copy_data(&file, &target, at, len).await?,
            }
            at = at.saturating_add(len);
        }
        Ok(())
    }
}

/// The target records the zeroes itself: if the disk is the backing file of the target, the backing file changes next.
async fn zero(target: &Edge, offset: u64, len: u64) -> Result<()> {
    target.write_zeroes(offset, len, ZeroFlags::OWN | ZeroFlags::MAY_UNMAP).await
}

async fn copy_data(file: &Edge, target: &Edge, offset: u64, len: u64) -> Result<()> {
    let buf = IoBufMut::new(usize::try_from(len).unwrap_or(usize::MAX));
    let data = file.read(offset, buf).await?;
    target.write(offset, data.freeze(), WriteFlags::empty()).await
}
