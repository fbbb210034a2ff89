//! Reopen: changing read-only mode, the cache sizes, and the runtime options.
//!
//! An image that becomes read-only first writes all its metadata. An image that becomes writable must pass two checks.
//! First, its header must permit writing. Second, the sizes and table offsets in the header, the L1 table, the refcount
//! table and the bitmaps on disk must be the same as in memory, because another program may have written the image if
//! locking is off. Then the image drops its cached slices, because slices that were loaded while the image was read-only
//! were not checked for overlaps with metadata.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Edge, Error, OpenFlags, Options, Result};
use oxblk_ring::IoBufMut;
use roaring::RoaringTreemap;

use super::Qcow2;
use super::encryption::EncryptOptions;
use super::image_state::header::read_header;
use super::image_state::run_options::{Modes, RunOptions};
use super::layout::{Header, Incompatible, L1Entry};
use super::open::{OpenOptions, note_header_targets, repair_dirty};
use crate::not_writable;

/// A reopen that is prepared and waits for commit or abort.
pub(super) struct Prepared {
    read_only: bool,
    l2_slices: usize,
    refcount_slices: usize,
    modes: Modes,
    clean_interval: Duration,
    /// The image was not closed cleanly, so the commit must repair it.
    repair: bool,
}

impl Qcow2 {
    async fn prepare_reopen(&self, flags: OpenFlags, mut options: Options) -> Result<Prepared> {
        let own: OpenOptions = options.extract()?;
        EncryptOptions::take(&mut options)?.require_same(self.data.encryption())?;
        let run = RunOptions::take(&mut options)?;
        if let Some(key) = options.first_key() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        let sizes = own.sizes(self.geometry)?;
        if sizes.slice != self.mapping.slice_bytes() {
            return Err(Error::invalid("Cannot change the option 'l2-cache-entry-size'"));
        }
        let modes = run.effective_modes(&self.image_state.header(), flags.unmap)?;
        let mut repair = false;
        match (self.image_state.is_read_only(), flags.read_only) {
            (true, false) => repair = self.check_can_be_written().await?,
            (false, true) => self.complete_or_stay_writable().await?,
            _ => {}
        }
        Ok(Prepared {
            modes,
            clean_interval: run.clean_interval(),
            repair,
            read_only: flags.read_only,
            l2_slices: sizes.l2_slices(self.geometry, self.mapping.l1_entries()),
            refcount_slices: sizes.refcount_slices(self.geometry),
        })
    }

    /// Writes all metadata and bitmaps. After a failure, the image stays writable, and its bitmaps are marked as in use
    /// again.
    async fn complete_or_stay_writable(&self) -> Result<()> {
        let completed = self.complete_image().await;
        if completed.is_err() {
            self.bitmaps.use_bitmaps().await;
        }
        completed
    }

    /// Checks that a read-only image can become writable. Returns whether the image must be repaired first.
    async fn check_can_be_written(&self) -> Result<bool> {
        let file = self.image_state.file()?;
        let header = read_header(&file).await?;
        header.require_refcounts()?;
        header.require_bitmaps()?;
        header.require_snapshots()?;
        self.metadata.check_snapshot_table(&file).await?;
        header.require_writable()?;
        let same = self.is_as_on_disk(&file, &header).await?;
        if same && self.bitmaps.has_bitmaps_on_disk(&file, &header).await? {
            return Ok(header.incompatible.contains(Incompatible::DIRTY));
        }
        Err(not_writable::changed_meanwhile())
    }

    async fn is_as_on_disk(&self, file: &Edge, header: &Header) -> Result<bool> {
        let same = header.geometry == self.geometry
            && header.size == self.image_state.size_in_header()
            && header.l1_offset == self.mapping.l1_offset()
            && u64::from(header.l1_entries) == self.mapping.l1_entries()
            && header.crypt_method == self.image_state.header().crypt_method
            && header.extensions.crypto == self.image_state.header().extensions.crypto
            && header.snapshots_offset == self.metadata.snapshot_table().offset
            && header.snapshot_count == self.metadata.snapshot_table().count;
        if !same {
            return Ok(false);
        }
        let clusters = u64::from(header.refcount_table_clusters);
        if !self.clusters.is_as_on_disk(header.refcount_table_offset, clusters).await? {
            return Ok(false);
        }
        let bytes = usize::try_from(self.mapping.l1_entries().saturating_mul(8)).unwrap_or(0);
        let table = file.read(header.l1_offset, IoBufMut::new(bytes)).await?;
        let entries = table.chunks_exact(8).map(|word| {
            let entry = L1Entry(word.try_into().map_or(0, u64::from_be_bytes));
            // The L1 table in memory contains 0 for an entry that refers to no table.
            if entry.l2_offset(self.geometry) == Ok(None) { 0 } else { entry.0 }
        });
        Ok((0..).zip(entries).all(|(index, entry)| self.mapping.l1_entry(index).0 == entry))
    }

    async fn commit_reopen(&self, prepared: Prepared) {
        self.mapping.set_limit(prepared.l2_slices);
        self.clusters.cache().set_limit(prepared.refcount_slices);
        self.image_state.set_modes(prepared.modes);
        self.cleaner.set_interval(prepared.clean_interval);
        let was_read_only = self.image_state.set_read_only(prepared.read_only);
        if prepared.read_only || !was_read_only {
            self.bitmaps.set_bitmaps_read_only(prepared.read_only);
            return;
        }
        if prepared.repair
            && let Err(error) = self.repair_and_reload().await
        {
            tracing::error!("qcow2: the image cannot be made writable: {error}");
            self.image_state.disable();
            return;
        }
        self.mapping.clear();
        self.clusters.cache().clear();
        self.clusters.forget_free();
        let mut tables = RoaringTreemap::new();
        for index in 0..self.mapping.l1_entries() {
            if let Ok(Some(offset)) = self.mapping.l1_entry(index).l2_offset(self.geometry) {
                tables.insert(self.geometry.cluster_index(offset));
                self.clusters.note_metadata(offset, self.geometry.cluster_size());
            }
        }
        self.bitmaps.forget_overlapping_clusters(&tables);
        if let Err(error) = self.metadata.note_overlaps().await {
            tracing::error!("qcow2: the image cannot be made writable: {error}");
            self.image_state.disable();
            return;
        }
        self.image_state.log_next_corruption();
        if let Err(error) = self.image_state.clear_autoclear(self.bitmaps.autoclear()).await {
            // The reopen can no longer be rolled back, and the image must not be written with these autoclear bits.
            tracing::error!("qcow2: the image cannot be made writable: {error}");
            self.image_state.disable();
            return;
        }
        self.bitmaps.use_bitmaps().await;
    }

    /// Repairs an image that was not closed cleanly, and reloads the changed metadata.
    ///
    /// # Errors
    /// The errors of the repair and of requests to the image file.
    async fn repair_and_reload(&self) -> Result<()> {
        let file = self.image_state.file()?;
        let header = read_header(&file).await?;
        let header = repair_dirty(&file, &header).await?;
        // The repair may have moved or freed structures, except bitmaps. After this function, the caller records L2 tables and
        // snapshots as metadata.
        self.clusters.forget_all_metadata();
        self.clusters.reload(&header).await?;
        note_header_targets(&self.clusters, &header, &file);
        self.bitmaps.note_bitmaps();
        self.mapping.forget_l1();
        self.metadata.read_l1(&file).await?;
        self.metadata.reload_snapshot_table(&header);
        self.image_state.adopt_header(header);
        self.metadata.note_repair();
        Ok(())
    }

    fn prepared(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reopen for Qcow2 {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = options.clone();
        Box::pin(async move {
            let prepared = self.prepare_reopen(flags, options).await?;
            *self.prepared() = Some(prepared);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let prepared = self.prepared().take();
            if let Some(prepared) = prepared {
                self.commit_reopen(prepared).await;
            }
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let prepared = self.prepared().take();
            if prepared
                .is_some_and(|prepared| prepared.read_only && !self.image_state.is_read_only())
            {
                self.bitmaps.use_bitmaps().await;
            }
        })
    }
}
