//! Preallocation: guest clusters get host clusters before the guest writes to them.
//!
//! First, a run of host clusters is made to read as zeroes. Then its refcounts are raised. Then L2 entries refer to the
//! run. An ordinary write has the same order (see [`super::write`]). The modes differ in how the file is made to read as
//! zeroes.
//!
//! The modes `falloc` and `full` also allocate the space on the host. If the file can grow and contains the unencrypted
//! guest data, these modes allocate all data in one contiguous run at the end of the file, behind the refcount blocks of
//! this run and the refcount table. This is the layout that QEMU's tools produce.

use oxblk_core::{Edge, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_ring::IoBuf;

use super::Qcow2;
use super::clusters::Counted;
use super::clusters::ReleaseReason;
use super::clusters::Reserved;
use super::layout::{ExtendedEntry, L2Entry};

/// Maximum number of guest bytes that one step allocates.
const STEP: u64 = 1 << 30;
/// Number of zero bytes per write.
const WRITE: u64 = 1 << 20;

impl Qcow2 {
    /// Allocates all guest clusters that begin in `from..to`, and makes their host clusters read as zeroes. Flushes at the
    /// end.
    pub(super) async fn preallocate(&self, from: u64, to: u64, mode: Preallocation) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let file = self.image_state.children().require(self.image_state.data_child())?;
        let on_host = matches!(mode, Preallocation::Falloc | Preallocation::Full);
        if on_host && !self.geometry.data_file && self.data.is_plain() && file.node().limits().grows
        {
            return self.preallocate_in_one_piece(&file, from, to, mode).await;
        }
        let (mut at, end) = (self.geometry.cluster_end(from), self.geometry.cluster_end(to));
        while at < end {
            let count = (end - at).min(STEP.max(self.geometry.cluster_size())) >> bits;
            let count = self.metadata.table_before_data(at, count).await?;
            let mut run = self.data.reserve_data(at, count, None).await?;
            let (start, count) = (run.start, run.count);
            run.begin_write();
            // The part that a resize added to a data file reads as zeroes, if the data file can grow.
            let untouched = run.untouched || self.geometry.data_file && file.node().limits().grows;
            let host = start << bits;
            let end = start.saturating_add(count) << bits;
            // A data file ends at the new end of the disk. An image file ends at the end of its last subcluster.
            let unit = if self.geometry.data_file { 1 } else { self.geometry.subcluster_size() };
            let disk_end = host.saturating_add((to - at).div_ceil(unit).saturating_mul(unit));
            let end = end.min(disk_end);
            let len = end.saturating_sub(host);
            let zeroed = if self.zeroes_as_entries() || self.data.is_plain() {
                zero(&file, host, len, mode, untouched).await
            } else {
                self.write_zero_ciphertext(at, host, len).await
            };
            let counted = run.count_if(zeroed, &self.clusters).await?;
            self.link_preallocated(at, (start, count), counted).await?;
            self.metadata.write_back_if_needed().await?;
            at = at.saturating_add(count << bits);
        }
        self.metadata.write_back(true).await
    }

    async fn preallocate_in_one_piece(
        &self,
        file: &Edge,
        from: u64,
        to: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let entries = self.geometry.l2_entries();
        let (mut at, end) = (self.geometry.cluster_end(from), self.geometry.cluster_end(to));
        let count = end.saturating_sub(at) >> bits;
        let run = self.reserve_behind_refcounts(count, count.div_ceil(entries)).await?;
        let Some(mut run) = run else { return self.metadata.write_back(true).await };
        let (host, len) = (run.start() << bits, count << bits);
        run.begin_write();
        if let Err(error) = zero(file, host, len, mode, run.is_untouched()).await {
            run.give_back();
            return Err(error);
        }
        while at < end {
            let in_table = entries - self.geometry.cluster_index(at) % entries;
            let part = run.split_first(in_table.min((end - at) >> bits));
            let place = (part.start(), part.count());
            let counted = self.clusters.count(part, ReleaseReason::Data).await?;
            self.link_preallocated(at, place, Some(counted)).await?;
            self.metadata.write_back_if_needed().await?;
            at = at.saturating_add(place.1 << bits);
        }
        self.metadata.write_back(true).await
    }

    /// Reserves `count` clusters behind all clusters in use, and behind the refcount blocks for these clusters and for `tables`
    /// L2 tables. Returns `None` if `count` is 0.
    async fn reserve_behind_refcounts(
        &self,
        count: u64,
        tables: u64,
    ) -> Result<Option<Reserved<'_>>> {
        let file = self.image_state.file()?;
        let in_file = self.geometry.clusters_for(file.size());
        let mut start = self.clusters.last_in_use(in_file).await?.map_or(0, |last| last + 1);
        loop {
            // The data may begin and end in the middle of the range of an L2 table, so the data may need one more table.
            let counted = count.saturating_add(tables).saturating_add(1);
            if let Some(run) = self.clusters.make_room(start, counted, count).await? {
                return Ok(Some(run).filter(|_| count > 0));
            }
            // The run may contain quarantined clusters, so the next attempt starts one cluster later.
            start = start.saturating_add(1);
        }
    }

    /// Makes the L2 entries from guest offset `at` on refer to `count` host clusters from `start` on. These clusters read
    /// as zeroes.
    async fn link_preallocated(
        &self,
        at: u64,
        (start, count): (u64, u64),
        counted: Option<Counted<'_>>,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let place = |index: u64| start.saturating_add(index) << bits;
        if self.geometry.extended_l2 {
            // The subclusters keep their state: zero or unallocated.
            let kept = |index, old: ExtendedEntry| ExtendedEntry {
                entry: L2Entry::data(place(index)),
                bitmap: old.bitmap.without_data(),
            };
            return self.metadata.link_extended(at, count, counted, kept).await;
        }
        if self.zeroes_as_entries() {
            let entry = |index| L2Entry::zero_allocated(place(index));
            return self.metadata.link(at, count, counted, entry).await;
        }
        self.metadata.link(at, count, counted, |index| L2Entry::data(place(index))).await
    }

    /// Whether preallocated clusters get zero entries (in images without extended L2 entries). In an encrypted image,
    /// zeroes in the file do not decrypt to zeroes.
    fn zeroes_as_entries(&self) -> bool {
        !self.data.is_plain() && self.image_state.version() >= 3
    }

    /// Writes encrypted zeroes.
    async fn write_zero_ciphertext(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        let zeroes = IoBuf::zeroes(usize::try_from(WRITE).unwrap_or(0));
        let mut done = 0;
        while done < len {
            let step = usize::try_from((len - done).min(WRITE)).unwrap_or(0);
            let (guest, host) = (guest.saturating_add(done), host.saturating_add(done));
            self.data.write_data(guest, host, zeroes.slice(..step)).await?;
            done = done.saturating_add(WRITE);
        }
        Ok(())
    }
}

/// Makes a range of the file read as zeroes. `untouched`: the range was never written, so the part inside the file reads as
/// zeroes already.
async fn zero(
    file: &Edge,
    offset: u64,
    len: u64,
    mode: Preallocation,
    untouched: bool,
) -> Result<()> {
    match mode {
        Preallocation::Off | Preallocation::Metadata if untouched => {
            // The file must not become shorter. `oxblk_core` has drained the node, so no other task changes the size
            // concurrently.
            let end = offset.saturating_add(len);
            if end > file.size() { file.resize(end, Preallocation::Off).await } else { Ok(()) }
        }
        Preallocation::Off | Preallocation::Metadata => {
            file.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await
        }
        Preallocation::Falloc => file.write_zeroes(offset, len, ZeroFlags::empty()).await,
        Preallocation::Full => {
            let zeroes = IoBuf::zeroes(usize::try_from(WRITE).unwrap_or(0));
            let mut done = 0;
            while done < len {
                let step = usize::try_from((len - done).min(WRITE)).unwrap_or(0);
                let piece = zeroes.slice(..step);
                file.write(offset.saturating_add(done), piece, WriteFlags::empty()).await?;
                done = done.saturating_add(WRITE);
            }
            Ok(())
        }
    }
}
