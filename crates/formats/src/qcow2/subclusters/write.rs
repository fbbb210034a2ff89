//! Writes that `Driver::map` cannot forward to a host offset, in images with subclusters.
//!
//! The order is the same as in other writes (see [`super::super::write`]): data, refcounts, entries. A request is split
//! into runs, and each run is of one of these kinds:
//!
//! - *in place*: every touched subcluster has data, in clusters that the image owns (the copied flag is set);
//! - *owned*: the image owns the cluster, but some of its touched subclusters have no data yet;
//! - *new*: new clusters are needed, because the old clusters are unallocated, shared with a snapshot, or compressed.

use oxblk_core::{BoxFuture, Result, run_all};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::fill::length;
use super::super::layout::{ExtendedEntry, L2Kind, Subclusters};
use super::super::mapping::Extent;

/// The first run of a write, with its length in bytes.
enum Run {
    /// The data goes to `host`, and no entry changes.
    InPlace { host: u64, len: u64 },
    /// The run lies in one cluster at `host` that the image owns.
    Owned { host: u64, bitmap: Subclusters, len: u64 },
    /// The run needs new clusters.
    New { len: u64 },
}

impl Qcow2 {
    /// Writes `data` to the guest disk at `offset`. The caller holds the guest range lock.
    pub(in super::super) async fn write_subclusters(
        &self,
        offset: u64,
        mut data: IoBuf,
    ) -> Result<()> {
        let mut jobs: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut at = offset;
        while !data.is_empty() {
            let run = self.next_run(at, length(&data)).await?;
            let (Run::InPlace { len, .. } | Run::Owned { len, .. } | Run::New { len }) = run;
            let piece = data.split_to(usize::try_from(len).unwrap_or(usize::MAX).min(data.len()));
            jobs.push(match run {
                Run::InPlace { host, .. } => Box::pin(self.data.write_data(at, host, piece)),
                Run::Owned { host, bitmap, .. } => {
                    Box::pin(self.write_owned(at, piece, host, bitmap))
                }
                Run::New { .. } => Box::pin(self.write_new(at, piece, None)),
            });
            at = at.saturating_add(len);
        }
        run_all(jobs).await
    }

    async fn next_run(&self, offset: u64, len: u64) -> Result<Run> {
        if let Extent::Data { host, len: covered, owned: true } =
            self.metadata.extent_to_write(offset, len).await?
        {
            // If only a part of the touched subclusters has data, the cluster is written as one owned run.
            let end = offset.saturating_add(covered);
            let whole = if covered == len { end } else { self.geometry.cluster_start(end) };
            if whole > offset {
                return Ok(Run::InPlace { host, len: whole - offset });
            }
        }
        let mut covered = 0;
        while covered < len {
            let at = offset.saturating_add(covered);
            let room = (self.geometry.cluster_end(at.saturating_add(1)) - at).min(len - covered);
            match self.metadata.extended_entry(at).await? {
                (found, L2Kind::Data { host }) if found.entry.copied() => {
                    if covered > 0 {
                        break;
                    }
                    return Ok(Run::Owned { host, bitmap: found.bitmap, len: room });
                }
                _ => covered = covered.saturating_add(room),
            }
        }
        Ok(Run::New { len: covered })
    }

    /// Writes `data` into the owned cluster at `host`. `bitmap` says which subclusters of this cluster have data.
    async fn write_owned(
        &self,
        offset: u64,
        data: IoBuf,
        host: u64,
        bitmap: Subclusters,
    ) -> Result<()> {
        let first = self.geometry.cluster_start(offset);
        let end = offset.saturating_add(length(&data));
        let touched = Subclusters::touched_by(self.geometry, offset - first, end - first);
        let whole = self.round_to_subclusters(offset, end, bitmap.allocated());
        let place = host.saturating_add(offset - first);
        self.fill(whole, offset, data, place, false).await?;
        let with_data =
            |_, old: ExtendedEntry| ExtendedEntry { bitmap: old.bitmap.with_data(touched), ..old };
        self.metadata.link_extended(first, 1, None, with_data).await
    }
}
