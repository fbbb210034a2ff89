//! Writing data into newly allocated clusters.

use oxblk_core::{BoxFuture, Result, run_all};
use oxblk_ring::IoBuf;

use super::Qcow2;
use super::data::NewData;
use super::fill::length;
use super::layout::L2Entry;

impl Qcow2 {
    /// Writes `data` into newly allocated clusters. If host cluster `behind` is free, the new clusters begin there.
    /// `behind` is the host cluster that follows the data in front of `offset`, so the data becomes contiguous in the file.
    pub(super) async fn write_new(
        &self,
        offset: u64,
        mut data: IoBuf,
        mut behind: Option<u64>,
    ) -> Result<()> {
        let mut at = offset;
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        while !data.is_empty() {
            let first = self.geometry.cluster_start(at);
            let end = self.geometry.cluster_end(at.saturating_add(length(&data)));
            let count = (end - first) >> self.geometry.cluster_bits;
            let count = self.metadata.table_before_data(first, count).await?;
            let run = self.data.reserve_data(first, count, behind).await?;
            behind = Some(run.start.saturating_add(run.count));
            let reach = first.saturating_add(run.count << self.geometry.cluster_bits);
            let room = usize::try_from(reach - at).unwrap_or(usize::MAX).min(data.len());
            let piece = data.split_to(room);
            let next = at.saturating_add(length(&piece));
            jobs.push(match self.geometry.extended_l2 {
                true => Box::pin(self.fill_new(at, piece, run)),
                false => Box::pin(self.fill_and_link(at, piece, run)),
            });
            at = next;
        }
        run_all(jobs).await
    }

    async fn fill_and_link(&self, offset: u64, data: IoBuf, mut run: NewData<'_>) -> Result<()> {
        let first = self.geometry.cluster_start(offset);
        let (start, count) = (run.start, run.count);
        run.begin_write();
        let whole = first..self.geometry.cluster_end(offset.saturating_add(length(&data)));
        let place = (start << self.geometry.cluster_bits).saturating_add(offset - first);
        let filled = self.fill(whole, offset, data, place, self.data.reads_as_zeroes(&run)).await;
        let counted = run.count_if(filled, &self.clusters).await?;
        let bits = self.geometry.cluster_bits;
        let entry = |index| L2Entry::data(start.saturating_add(index) << bits);
        self.metadata.link(first, count, counted, entry).await
    }
}
