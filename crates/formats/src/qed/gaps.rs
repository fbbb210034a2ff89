//! Filling gaps (unused clusters) of the file: the last clusters are moved into the gaps, and the file is truncated.
//!
//! No request is in flight. The copy of a cluster or table is flushed before an entry refers to it. The original is freed after
//! the changed entry has been written and flushed.
//!
//! Each round fills the lowest gaps with the last data clusters. If the last cluster belongs to a table, the table is moved
//! into the lowest run of contiguous gaps that is long enough. If no run is long enough, the clusters directly after the
//! lowest gap are first moved to the end of the file. So the lowest gap moves towards the end of the file until no gap is
//! left. The last step truncates the file after its last cluster in use.

use std::sync::atomic::Ordering::AcqRel;

use oxblk_core::{Errno, Error, Result, WriteFlags};
use oxblk_ring::IoBufMut;

use super::Qed;
use super::survey::Owner;
use crate::blocks::Run;
use crate::file_len;

/// If an image has more gaps than this, no gap is filled when the image is closed.
pub(super) const MAX_AT_CLOSE: u64 = 64;
/// Maximum number of data clusters that are moved in one round.
const ROUND: u32 = 1024;
/// Data is copied in steps of this size in bytes.
const STEP: u64 = 1 << 20;

/// A data cluster or table that is moved: its first cluster, its owner and its new clusters.
type Move = (u32, Owner, Run);

impl Qed {
    /// Fills all gaps if there are at most `max_gaps` gaps. Then, in any case, truncates the file. No request is in flight.
    ///
    /// # Errors
    /// The errors of requests to the image file, and `ENOSPC` if a gap cannot be filled. The image is consistent after an error
    /// too.
    pub(super) async fn close_gaps(&self, max_gaps: u64) -> Result<()> {
        self.allocator.end_quarantine();
        if self.allocator.gaps().len() <= max_gaps {
            while self.close_next_gaps().await? {}
        }
        self.trim().await
    }

    /// Fills all gaps and truncates the file, after a change that is complete on disk. So a failure is only logged. The image
    /// has the need-check flag then, because the change has freed clusters. So the close of the image tries again, and a
    /// check after a crash finds the clusters.
    pub(super) async fn close_gaps_after_change(&self) {
        if let Err(error) = self.close_gaps(u64::MAX).await {
            tracing::warn!("qed: unused clusters stay in the image until it is closed: {error}");
        }
    }

    /// Runs one round. Returns whether another round may be necessary.
    async fn close_next_gaps(&self) -> Result<bool> {
        let gaps = self.allocator.gaps();
        let Some(lowest) = gaps.min() else { return Ok(false) };
        let end = self.allocator.end();
        let count = u32::try_from(gaps.len()).unwrap_or(u32::MAX).min(ROUND);
        let tables = self.geometry.table_clusters;
        let window = lowest..lowest.saturating_add(tables);
        let keep = end.saturating_sub(count.max(tables));
        let owners = self.owners(|cluster| cluster >= keep || window.contains(&cluster)).await?;
        let mut moves: Vec<Move> = Vec::new();
        for (cluster, owner) in owners.iter().rev() {
            let Owner::Data(_) = owner else { break };
            if moves.len() >= usize::try_from(count).unwrap_or(0) {
                break;
            }
            let run = self.allocator.reserve(1).await?;
            if run.start >= *cluster {
                // No gap with a lower offset than this cluster is left.
                break;
            }
            moves.push((*cluster, *owner, run));
        }
        if moves.is_empty() {
            let Some((cluster, owner)) = owners.last().copied() else { return Ok(false) };
            if cluster < lowest {
                return Ok(false);
            }
            moves = self.plan_table(cluster, owner, &window, &owners).await?;
        }
        self.move_clusters(moves).await?;
        self.allocator.end_quarantine();
        Ok(true)
    }

    /// Plans the move of the last table. If no run of gaps is long enough, first moves the clusters after the lowest gap to
    /// the end of the file.
    async fn plan_table(
        &self,
        cluster: u32,
        owner: Owner,
        window: &std::ops::Range<u32>,
        owners: &[(u32, Owner)],
    ) -> Result<Vec<Move>> {
        let run = self.reserve_table().await?;
        if run.start < cluster {
            return Ok(vec![(cluster, owner, run)]);
        }
        let tables = self.geometry.table_clusters;
        let size = |owner: &Owner| if matches!(owner, Owner::Data(_)) { 1 } else { tables };
        let (start, end) = (window.start, window.end);
        let in_the_way = owners.iter().filter(|(first, owner)| {
            *first < end && first.saturating_add(size(owner)) > start && *first != cluster
        });
        let mut moves = Vec::new();
        for (first, owner) in in_the_way {
            let place = self.allocator.reserve_at_end(size(owner))?;
            moves.push((*first, *owner, place));
        }
        if window.contains(&cluster) {
            // The gap lies directly before the table, and the new place would overlap the old place. So the table is moved
            // to the end of the file now, and into the gap in a later round.
            moves.push((cluster, owner, run));
            return Ok(moves);
        }
        self.move_clusters(moves).await?;
        drop(run);
        oxblk_ring::settled().await;
        self.allocator.end_quarantine();
        let run = self.reserve_table().await?;
        if run.start < cluster { Ok(vec![(cluster, owner, run)]) } else { Ok(Vec::new()) }
    }

    /// Copies clusters and tables to their new places, changes the entries that refer to them, and flushes.
    ///
    /// # Errors
    /// `ENOSPC` if there is nothing to move, and the errors of requests to the image file.
    async fn move_clusters(&self, moves: Vec<Move>) -> Result<()> {
        if moves.is_empty() {
            return Err(Error::from_errno(Errno::NOSPC).reword("Gaps cannot be closed"));
        }
        self.set_need_check().await?;
        for (from, _, run) in &moves {
            self.lengthen(run.end()).await?;
            let len = self.offset_of(run.count);
            self.copy_in_file(self.offset_of(*from), self.offset_of(run.start), len).await?;
        }
        for (from, owner, run) in moves {
            let to = self.offset_of(run.start);
            match owner {
                Owner::Data(guest) => self.set_data_entry(guest, to).await?,
                Owner::Table(index) => self.set_l1_entry(index, to),
                Owner::L1 => {
                    self.file()?.flush().await?;
                    self.change_header(|state| state.header.l1_offset = to).await?;
                }
            }
            let freed = from..from.saturating_add(run.count);
            run.keep();
            self.freed.add(freed);
        }
        self.write_back(true).await
    }

    /// Copies `len` bytes of the file from offset `from` to offset `to`. The ranges do not overlap.
    pub(super) async fn copy_in_file(&self, from: u64, to: u64, len: u64) -> Result<()> {
        let file = self.file()?;
        let mut done = 0_u64;
        while done < len {
            let step = STEP.min(len - done);
            let buf = IoBufMut::new(usize::try_from(step).unwrap_or(0));
            let data = file.read(from.saturating_add(done), buf).await?.freeze();
            file.write(to.saturating_add(done), data, WriteFlags::empty()).await?;
            done = done.saturating_add(step);
        }
        Ok(())
    }

    /// Truncates the file after its last cluster in use, if the file can change its length.
    pub(super) async fn trim(&self) -> Result<()> {
        let file = self.file()?;
        let end = self.offset_of(self.allocator.end());
        if file.size() <= end || !file.node().limits().grows {
            return Ok(());
        }
        self.file_end.fetch_min(end, AcqRel);
        if file_len::truncate(&file, end).await? {
            self.allocator.note_truncated();
        }
        Ok(())
    }
}
