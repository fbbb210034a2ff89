//! Opening and closing an image.
//!
//! If an image with the need-check flag is opened for writing and not for a check, it is repaired first. If the flag is
//! absent and the file can grow, all clusters of the file count as used, as in QEMU. In the other cases, all tables are
//! read to find the clusters in use. Closing a writable image writes all tables. If the image was changed, closing also
//! fills a small number of gaps, and removes the need-check flag.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, Release},
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oxblk_core::check::{Finding, Fix};
use oxblk_core::{BackingFile, ChildIdx, Edge, Error, ErrorKind, OpenContext, Result};
use oxblk_ring::{Event, IoBufMut, Mutex as AsyncMutex, RangeLock};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::gaps::MAX_AT_CLOSE;
use super::header::{ENTRY_BYTES, HEADER_BYTES, Header};
use super::{HeaderState, Qed};
use crate::blocks::{Allocator, FreedBlocks};
use crate::header_mark::Mark;
use crate::slice_cache::{Cleaner, Radix, SliceCache};
use crate::write_barrier::WriteBarrier;

/// Default size of the cache of L2 tables, in bytes.
const L2_CACHE: u64 = 16 << 20;
/// The L1 table is read in steps of this size in bytes.
const STEP: u64 = 1 << 20;
/// Slices that have not been used for this time are removed from the cache.
const CLEAN_INTERVAL: Duration = Duration::from_secs(600);

/// Options of the driver, besides `file` and `backing`.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct OpenOptions {
    l2_cache_size: Option<u64>,
}

impl OpenOptions {
    /// Number of slices in the cache, at least 8.
    pub(super) fn slices(&self, slice_words: u64) -> usize {
        let bytes = self.l2_cache_size.unwrap_or(L2_CACHE);
        let slices = bytes / slice_words.saturating_mul(ENTRY_BYTES);
        usize::try_from(slices).unwrap_or(usize::MAX).max(8)
    }
}

/// Number of entries of a slice. A slice has 4 KiB, or 32 KiB if clusters have 1 MiB or more, so that the number of slices fits
/// in 32 bits.
fn slice_words(header: &Header) -> u64 {
    if header.geometry.cluster_bits < 20 { 512 } else { 4096 }
}

/// Reads the header and the name of the backing file.
pub(super) async fn read_header(file: &Edge) -> Result<HeaderState> {
    let size = file.size();
    let len = usize::try_from(size.min(HEADER_BYTES)).unwrap_or(0);
    let failed = |error: Error| error.prefix("Could not read the QED header");
    let bytes = file.read(0, IoBufMut::new(len)).await.map_err(failed)?;
    let header = Header::parse(&bytes, size)?;
    let mut backing = None;
    if let Some(name) = &header.backing {
        // The parser has checked that the name is not longer than `MAX_NAME`.
        let buf = IoBufMut::new(usize::try_from(name.len).unwrap_or(0));
        let bytes = file.read(name.offset.into(), buf).await.map_err(failed)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let bytes = bytes.get(..end).unwrap_or_default();
        backing = Some(oxblk_core::names::to_text(bytes));
    }
    Ok(HeaderState { header, backing: backing.filter(|name| !name.is_empty()) })
}

/// Opens the image that is stored in the file child of `context`.
pub(super) async fn open(context: &mut OpenContext) -> Result<Qed> {
    let options: OpenOptions = context.options.extract()?;
    let file = context.file()?;
    let state = read_header(&file).await?;
    context.backing = state.backing.clone().map(|filename| BackingFile {
        filename,
        format: state.backing_format().map(str::to_owned),
    });
    let image = build(context, state, &file, &options);
    image.read_l1(&file, |index, entry| image.note_l1_entry(index, entry)).await?;
    if !context.flags.read_only && !context.flags.check {
        image.begin_to_write(&file).await?;
    }
    image.cleaner.set_interval(CLEAN_INTERVAL);
    Ok(image)
}

fn build(context: &OpenContext, state: HeaderState, file: &Edge, options: &OpenOptions) -> Qed {
    let header = &state.header;
    let words = slice_words(header);
    let filled = Arc::new(Event::new());
    let cache_words = usize::try_from(words).unwrap_or(512);
    let l2 = Arc::new(SliceCache::new(cache_words, options.slices(words), Arc::clone(&filled)));
    Qed {
        geometry: header.geometry,
        children: Arc::clone(&context.children),
        read_only: AtomicBool::new(context.flags.read_only),
        prepared: Mutex::default(),
        size: AtomicU64::new(header.size),
        first_cluster: header.first_cluster(),
        file_end: AtomicU64::new(file.size()),
        l1: Radix::default(),
        l1_dirty: Mutex::default(),
        cleaner: Cleaner::new(filled, [Arc::downgrade(&l2)]),
        l2,
        slice_words: words,
        allocator: Allocator::new(u32::MAX, Arc::clone(&context.epochs)),
        freed: FreedBlocks::default(),
        mark: Mark::new(header.need_check),
        stopped: AtomicBool::new(false),
        guest: RangeLock::new(),
        tables: AsyncMutex::new(()),
        writing_back: AsyncMutex::new(()),
        header_write: AsyncMutex::new(()),
        growing: AsyncMutex::new(()),
        barrier: WriteBarrier::default(),
        flag_barrier: WriteBarrier::default(),
        header: Mutex::new(state),
    }
}

impl HeaderState {
    /// The format of the backing file, if the header says that it is raw.
    pub(super) fn backing_format(&self) -> Option<&'static str> {
        self.header.backing.as_ref().filter(|backing| backing.is_raw).map(|_| "raw")
    }
}

impl Qed {
    /// Reads the L1 table, and calls `each` with the index and the value of each entry that is not 0.
    pub(super) async fn read_l1(&self, file: &Edge, mut each: impl FnMut(u64, u64)) -> Result<()> {
        let table = self.header().header.l1_offset;
        let len = self.geometry.l1_entries().saturating_mul(ENTRY_BYTES);
        let (mut at, mut index) = (0_u64, 0_u64);
        while at < len {
            let step = STEP.min(len - at);
            let buf = IoBufMut::new(usize::try_from(step).unwrap_or(0));
            let read = file.read(table.saturating_add(at), buf).await;
            let bytes = read.map_err(|error| error.prefix("Could not read the L1 table"))?;
            for word in bytes.chunks_exact(usize::try_from(ENTRY_BYTES).unwrap_or(8)) {
                let entry = word.try_into().map_or(0, u64::from_le_bytes);
                if entry != 0 {
                    each(index, entry);
                }
                index = index.saturating_add(1);
            }
            at = at.saturating_add(step);
        }
        Ok(())
    }

    /// Prepares an image that is opened for writing: repairs the image if necessary, and initialises the allocator.
    async fn begin_to_write(&self, file: &Edge) -> Result<()> {
        self.clear_autoclear().await?;
        if self.mark.is_possible() {
            self.make_consistent().await?;
        }
        let used = self.used_clusters(file).await?;
        self.allow_allocations(file, &used);
        if self.mark.is_possible() {
            self.complete_image().await?;
        }
        Ok(())
    }

    /// Checks and repairs an image that was not closed.
    ///
    /// # Errors
    /// `Corrupt` if the repair leaves faults, and the errors of the check.
    async fn make_consistent(&self) -> Result<()> {
        let report_finding = |finding: Finding| tracing::error!("qed: {finding}");
        let failed = |error: Error| error.prefix("Could not repair dirty image");
        let report = self.check_image(Fix::All, &report_finding).await;
        let report = match report {
            // If the file cannot grow, unused clusters may stay in the file.
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.check_image(Fix::Nothing, &report_finding).await.map_err(failed)?
            }
            report => report.map_err(failed)?,
        };
        if report.corruptions > 0 {
            return Err(Error::new(ErrorKind::Corrupt, "Could not repair dirty image"));
        }
        Ok(())
    }

    /// The clusters of the file that count as used: all clusters if the file can grow and the need-check flag is absent;
    /// otherwise those that the tables refer to.
    ///
    /// # Errors
    /// The errors of requests to the image file. `Corrupt` if the tables were read and contain invalid entries.
    pub(super) async fn used_clusters(&self, file: &Edge) -> Result<RoaringBitmap> {
        if file.node().limits().grows && !self.mark.is_possible() {
            let clusters = self.geometry.index(self.geometry.end(file.size()));
            let mut used = RoaringBitmap::new();
            used.insert_range(0..u32::try_from(clusters).unwrap_or(u32::MAX));
            return Ok(used);
        }
        let mut faults = 0_u64;
        let survey = self.survey(|_| faults = faults.saturating_add(1)).await?;
        if faults > 0 {
            return Err(Error::corrupt("Image is corrupt: entries of its tables are invalid")
                .with_hint("'img check' reports them, 'img check -r all' repairs the image."));
        }
        Ok(survey.used)
    }

    /// Tells the allocator which clusters of the file are in use, so that clusters can be allocated.
    pub(super) fn allow_allocations(&self, file: &Edge, used: &RoaringBitmap) {
        self.allocator.set_used(used, self.fresh_from(file), 0);
    }

    /// The first cluster that lies completely behind the end of the file. `None` if the file cannot grow.
    fn fresh_from(&self, file: &Edge) -> Option<u32> {
        let clusters = self.geometry.index(self.geometry.end(file.size()));
        file.node().limits().grows.then(|| u32::try_from(clusters).unwrap_or(u32::MAX))
    }

    /// Takes over the size of the file, and whether it can grow. No request is in flight.
    pub(super) fn file_changed(&self) {
        if let Some(file) = self.children.get(ChildIdx::FILE) {
            self.allocator.set_fresh(self.fresh_from(&file));
            self.file_end.store(file.size(), Release);
        }
    }

    /// Writes all tables. If the image was changed, fills a small number of gaps, truncates the file, and removes the
    /// need-check flag. Does nothing if the image is read-only or accepts no writes. No request is in flight.
    pub(super) async fn complete_image(&self) -> Result<()> {
        if self.is_read_only() || self.stopped.load(Relaxed) {
            return Ok(());
        }
        self.write_back(true).await?;
        if !self.allocator.is_known() {
            return Ok(());
        }
        if self.mark.is_possible()
            && let Err(error) = self.close_gaps(MAX_AT_CLOSE).await
        {
            tracing::warn!("qed: unused clusters stay in the image: {error}");
            // Some entries of moved clusters may have changed in memory only.
            self.write_back(true).await?;
        }
        self.clear_need_check().await
    }
}
