//! Writing metadata back, in an order that survives a crash at any point.
//!
//! One cycle runs at a time (`writing_back`). During its I/O, a cycle holds no lock that a cache hit or a guest write in
//! place needs. The steps of a cycle are:
//!
//! 1. take the list of dropped references, the changed L1 entries with their values, and copies of the dirty L2 slices, in this
//!    order. So the copies contain the changes that dropped the references and filled the new tables. Each cluster that the
//!    copies refer to was written before, and its refcount was raised in the cache;
//! 2. write the dirty refcounts. If there are copies or L1 entries to write, flush the file and the data file, so that data
//!    and refcounts are durable. With lazy refcounts, set the dirty bit in the header instead of writing refcounts;
//! 3. write the copies. Flush if L1 entries follow;
//! 4. write the L1 entries. Flush if refcounts are to be lowered, or if the caller requests durability;
//! 5. lower the refcounts of the dropped references. Clusters whose refcount reaches 0 are quarantined until the requests that
//!    may still use them have ended (see `clusters/allocator`).
//!
//! If a cycle fails or is cancelled before step 4 has ended, all its slices and L1 entries are dirty again, also those that
//! were written. The dropped references whose refcounts were not lowered return to the list. The next cycle waits until the
//! I/O of a cancelled cycle has ended (see `write_barrier`). An I/O error in step 5 does not fail the cycle: the next cycle
//! tries to lower these refcounts again.

use std::collections::{BTreeMap, VecDeque};

use oxblk_core::{DebugEvent, Edge, ErrorKind, Result, WriteFlags, run_all};
use oxblk_ring::IoBuf;
use oxblk_ring::perturb::point;

use super::Metadata;
use crate::qcow2::clusters::Dropped;
use crate::qcow2::clusters::Reserved;
use crate::qcow2::image_state::run_options::Modes;
use crate::qcow2::layout::L1Entry;
use crate::slice_cache::DirtyCopy;

impl Metadata {
    /// Refuses to free a cluster as guest data if it contains protected metadata.
    async fn check_release(&self, offset: u64) -> Result<()> {
        if self.is_protected(offset, self.geometry.cluster_size()) {
            let text = format!("Preventing invalid freeing of metadata at offset {offset:#x}");
            return Err(self.image_state.mark_corrupt(&text, offset).await);
        }
        Ok(())
    }

    /// Runs a write-back cycle if many references were dropped. If the file cannot grow (a device) and few free clusters are
    /// left, one dropped reference is enough: the clusters that the cycle frees can be reused only after all current requests
    /// have ended, so the cycle must run before the file is full.
    pub(in crate::qcow2) async fn write_back_if_needed(&self) -> Result<()> {
        if self.clusters.needs_write_back().await? { self.write_back(false).await } else { Ok(()) }
    }

    /// Runs one write-back cycle. With `durable`, all changes that completed before the call are on stable storage
    /// afterwards, except for some refcounts: the next cycle writes the refcounts that this cycle lowers, and lazy refcounts
    /// may be written as late as when the image is closed.
    pub(in crate::qcow2) async fn write_back(&self, durable: bool) -> Result<()> {
        let _guard = self.writing_back.lock().await;
        let file = self.image_state.file()?;
        let mut cycle = Cycle::begin(self);
        if let Err(stopped) = self.image_state.check_usable() {
            // The image is corrupt, or a pointer on disk may differ from memory, so no metadata may be written. If no table
            // has changed, a flush is enough: the refcounts on disk are correct or too high, or the dirty bit is set on disk
            // (lazy refcounts).
            return if cycle.changes_tables() {
                Err(stopped)
            } else {
                self.flush_files(&file).await
            };
        }
        let drops = !cycle.dropped.is_empty();
        let writing = self.barrier.pass().await;
        let outcome = self.write_ordered(&file, &cycle.copies, &cycle.l1, drops, durable).await;
        writing.done();
        outcome?;
        cycle.written();
        point();
        if drops {
            self.image_state.event(DebugEvent::ClusterFree).await;
        }
        match self
            .clusters
            .lower(&mut cycle.dropped, async |offset| self.check_release(offset).await)
            .await
        {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(error),
            // All tables are written, so the cycle succeeds. The next cycle lowers the remaining refcounts.
            Err(error) => tracing::warn!(
                "qcow2: refcounts could not be lowered yet; the next write-back tries again: {error}"
            ),
            Ok(()) => {}
        }
        self.clusters.free_quarantined().await
    }

    /// Flushes the data file and the image file.
    async fn flush_files(&self, file: &Edge) -> Result<()> {
        self.image_state.flush_data().await?;
        file.flush().await
    }

    async fn write_ordered(
        &self,
        file: &Edge,
        copies: &[DirtyCopy<'_>],
        l1: &BTreeMap<u64, L1Entry>,
        drops: bool,
        durable: bool,
    ) -> Result<()> {
        let postponed = self.image_state.modes().contains(Modes::LAZY);
        if !postponed {
            self.clusters.write_back_refcounts().await?;
        }
        if !copies.is_empty() || !l1.is_empty() {
            if postponed {
                self.postpone_refcounts().await?;
            }
            self.flush_files(file).await?;
            self.write_slices(file, copies).await?;
        }
        if !l1.is_empty() {
            file.flush().await?;
            self.write_l1(file, l1).await?;
        }
        if durable {
            self.image_state.event(DebugEvent::FlushToDisk).await;
            self.image_state.flush_data().await?;
        }
        if drops || durable {
            file.flush().await?;
        }
        Ok(())
    }

    async fn write_slices(&self, file: &Edge, copies: &[DirtyCopy<'_>]) -> Result<()> {
        let mut writes = Vec::with_capacity(copies.len());
        for copy in copies {
            if let Some(place) = self.mapping.slice_place(copy.slice).await? {
                self.clusters
                    .check_overlaps(
                        Modes::ACTIVE_L2,
                        place,
                        u64::try_from(copy.bytes.len()).unwrap_or(u64::MAX),
                    )
                    .await?;
                writes.push(file.write(
                    place,
                    IoBuf::from(copy.bytes.clone()),
                    WriteFlags::empty(),
                ));
            }
        }
        if !writes.is_empty() {
            self.image_state.event(DebugEvent::L2Update).await;
        }
        run_all(writes).await
    }

    async fn write_l1(&self, file: &Edge, entries: &BTreeMap<u64, L1Entry>) -> Result<()> {
        let base = self.mapping.l1_offset();
        let bytes = self.mapping.l1_entries().saturating_mul(8);
        self.clusters.check_overlaps(Modes::ACTIVE_L1, base, bytes).await?;
        let writes = entries.iter().map(|(index, entry)| {
            let place = base.saturating_add(index.saturating_mul(8));
            let entry = entry.0.to_be_bytes().to_vec();
            file.write(place, IoBuf::from(entry), WriteFlags::empty())
        });
        self.image_state.event(DebugEvent::L1Update).await;
        run_all(writes).await
    }

    /// Reserves `count` contiguous clusters, or fewer
    /// ([`Clusters::reserve_to_use_behind`](crate::qcow2::clusters::Clusters::reserve_to_use_behind)). First runs a
    /// write-back cycle if one is needed.
    pub(super) async fn reserve_to_use(&self, count: u64) -> Result<Reserved<'_>> {
        self.reserve_to_use_behind(None, count).await
    }

    /// Like [`Self::reserve_to_use`], but the run starts at cluster `behind` if this cluster is free.
    pub(in crate::qcow2) async fn reserve_to_use_behind(
        &self,
        behind: Option<u64>,
        count: u64,
    ) -> Result<Reserved<'_>> {
        self.write_back_if_needed().await?;
        self.clusters.reserve_to_use_behind(behind, count).await
    }
}

/// The input of one write-back cycle. If the cycle fails or is cancelled, dropping this value marks the slices and L1
/// entries dirty again, and returns the dropped references to the list.
struct Cycle<'a> {
    metadata: &'a Metadata,
    dropped: VecDeque<Dropped>,
    /// The changed L1 entries, with the values that they had when the cycle began. A later value may refer to a table that this
    /// cycle does not write.
    l1: BTreeMap<u64, L1Entry>,
    copies: Vec<DirtyCopy<'a>>,
}

impl<'a> Cycle<'a> {
    fn begin(metadata: &'a Metadata) -> Self {
        // The order matters; see step 1 in the module documentation.
        let dropped = metadata.clusters.take_dropped();
        point();
        let l1 = metadata.mapping.take_dirty_l1();
        point();
        Self { metadata, dropped, l1, copies: metadata.mapping.take_dirty_slices() }
    }

    fn changes_tables(&self) -> bool {
        !(self.l1.is_empty() && self.copies.is_empty())
    }

    /// Call this when the slices and the L1 entries are written. After that, the refcounts of the dropped references can be
    /// lowered.
    fn written(&mut self) {
        self.l1.clear();
        self.copies.drain(..).for_each(DirtyCopy::written);
    }
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        self.metadata.mapping.restore_dirty_l1(std::mem::take(&mut self.l1).into_keys());
        self.metadata.clusters.restore_dropped(self.dropped.drain(..));
    }
}
