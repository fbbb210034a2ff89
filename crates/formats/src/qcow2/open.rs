//! Opening and closing an image.
//!
//! Opening checks the header, and reads the L1 table and the refcount table. Opening for writing, except for a check, also
//! repairs an image that was not closed cleanly. Closing a writable image writes all metadata, so that no cluster leaks.

use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex};

use oxblk_core::check::Finding;
use oxblk_core::{
    BackingFile, ChildIdx, Children, ChildrenRef, Edge, Epochs, Error, ErrorKind, OpenContext,
    Options, Result,
};
use oxblk_ring::{Event, RangeLock};
use serde::{Deserialize, Serialize};

use roaring::RoaringTreemap;

use super::Qcow2;
use super::bitmaps::{Bitmaps, read_directory};
use super::check::repair_without_loss;
use super::clusters::{Clusters, RefcountTable};
use super::data::Data;
use super::encryption::{self, Encryption};
use super::image_state::ImageState;
use super::image_state::header::{clear_unknown_autoclear, read_header};
use super::image_state::run_options::{Modes, RunOptions};
use super::layout::{Autoclear, Geometry, Header, Incompatible};
use super::mapping::Mapping;
use super::metadata::{Metadata, SnapshotTable, visit_snapshots};
use super::snapshots::ImageSnapshots;
use crate::slice_cache::{Cleaner, SliceCache};

/// Default size of the L2 cache, in bytes.
const L2_CACHE: u64 = 64 << 20;
/// Default size of the refcount cache, in bytes.
const REFCOUNT_CACHE: u64 = 8 << 20;
const SLICE: u64 = 4096;

/// What a user can do about a dirty image with too many snapshots.
const REMOVE_SNAPSHOTS_HINT: &str =
    "You can force-remove overhanging snapshots with qemu-img check -r all";
/// What a user can do about a dirty image whose bitmap directory cannot be read.
const REMOVE_BITMAPS_HINT: &str = "You can force-remove all bitmaps with qemu-img check -r all";

/// The cache options of the driver, in bytes. Other modules parse the other options of the driver.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct OpenOptions {
    l2_cache_size: Option<u64>,
    l2_cache_entry_size: Option<u64>,
    refcount_cache_size: Option<u64>,
    cache_size: Option<u64>,
}

/// Sizes of the caches in bytes.
pub(super) struct CacheSizes {
    l2: u64,
    refcounts: u64,
    /// Size of one slice of the L2 cache.
    pub(super) slice: u64,
}

impl OpenOptions {
    pub(super) fn sizes(&self, geometry: Geometry) -> Result<CacheSizes> {
        let cluster = geometry.cluster_size();
        let slice = self.l2_cache_entry_size.unwrap_or(SLICE.min(cluster));
        if !slice.is_power_of_two() || slice < 512 || slice > cluster {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )));
        }
        let (l2, refcounts) = match (self.cache_size, self.l2_cache_size, self.refcount_cache_size)
        {
            (Some(_), Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
            (Some(all), Some(l2), None) if l2 <= all => (l2, all - l2),
            (Some(all), None, Some(refcounts)) if refcounts <= all => (all - refcounts, refcounts),
            (Some(_), Some(_), None) => {
                return Err(Error::invalid("l2-cache-size may not exceed cache-size"));
            }
            (Some(_), None, Some(_)) => {
                return Err(Error::invalid("refcount-cache-size may not exceed cache-size"));
            }
            (Some(all), None, None) => (all - all / 8, all / 8),
            (None, l2, refcounts) => (l2.unwrap_or(L2_CACHE), refcounts.unwrap_or(REFCOUNT_CACHE)),
        };
        if i32::try_from(refcounts / cluster).is_err() {
            return Err(Error::invalid("Refcount cache size too big"));
        }
        Ok(CacheSizes { l2, refcounts, slice })
    }
}

impl CacheSizes {
    /// The number of slices in the L2 cache: at most the number that an L1 table of `l1_entries` entries can map, but at
    /// least 8.
    pub(super) fn l2_slices(&self, geometry: Geometry, l1_entries: u64) -> usize {
        let whole = l1_entries.saturating_mul(geometry.cluster_size() / self.slice);
        let slices = (self.l2 / self.slice).min(whole);
        usize::try_from(slices).unwrap_or(usize::MAX).max(8)
    }

    /// The number of slices in the refcount cache, at least 4.
    pub(super) fn refcount_slices(&self, geometry: Geometry) -> usize {
        let slices = self.refcounts / refcount_slice(geometry);
        usize::try_from(slices).unwrap_or(usize::MAX).max(4)
    }
}

/// Bytes of one slice of the refcount cache.
fn refcount_slice(geometry: Geometry) -> u64 {
    SLICE.min(geometry.cluster_size())
}

/// Opens the image that the file child of `context` contains.
pub(super) async fn open(context: &mut OpenContext) -> Result<Qcow2> {
    let options: OpenOptions = context.options.extract()?;
    let encrypt = encryption::EncryptOptions::take(&mut context.options)?;
    let run = RunOptions::take(&mut context.options)?;
    let file = context.file()?;
    let mut header = read_header(&file).await?;
    // An open for a check skips these tests, because the check reports or repairs the faults that make an ordinary open
    // fail.
    if !context.flags.check {
        header.require_refcounts()?;
        header.require_bitmaps()?;
    }
    if !context.flags.check && !context.flags.read_only {
        header.require_writable()?;
        if header.incompatible.contains(Incompatible::DIRTY) {
            header = repair_dirty(&file, &header).await?;
        }
    }
    open_data(context, &header).await?;
    context.backing = header
        .backing_file
        .clone()
        .map(|filename| BackingFile { filename, format: header.extensions.backing_format.clone() });
    let sizes = options.sizes(header.geometry)?;
    let encryption = encryption::open(context, &file, &header, encrypt).await?;
    let modes = run.effective_modes(&header, context.flags.unmap)?;
    let parts = OpenContextParts {
        children: Arc::clone(&context.children),
        epochs: Arc::clone(&context.epochs),
        read_only: context.flags.read_only,
    };
    let image = build(parts, header, &sizes, encryption, modes).await?;
    image.metadata.read_l1(&file).await?;
    if !context.flags.check {
        let inactive = match image.metadata.note_snapshots(&file).await {
            // Reads of the active disk state do not need the snapshot table, so a read-only open ignores this error.
            Err(error) if image.image_state.is_read_only() => {
                image.metadata.leave_out_snapshots(&error);
                RoaringTreemap::new()
            }
            noted => noted?,
        };
        if modes.contains(Modes::INACTIVE_L2) && !image.image_state.is_read_only() {
            image.metadata.note_inactive_tables().await?;
        }
        if !image.image_state.is_read_only() {
            image.metadata.find_overlaps(inactive);
            image.image_state.clear_autoclear(image.bitmaps.autoclear()).await?;
        }
    }
    image.cleaner.set_interval(run.clean_interval());
    Ok(image)
}

/// Opens the data file of an image that has one. An open without I/O (`no_io`) does not open the data file.
async fn open_data(context: &mut OpenContext, header: &Header) -> Result<()> {
    if context.flags.no_io {
        context.options.take(ChildIdx::DATA.name());
        return Ok(());
    }
    if !header.geometry.data_file {
        if context.options.contains(ChildIdx::DATA.name()) {
            return Err(Error::invalid(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        if header.autoclear.contains(Autoclear::RAW_DATA_FILE) {
            return Err(Error::invalid("data-file-raw requires a data file"));
        }
        return Ok(());
    }
    if context.open_data_file(header.extensions.data_file.as_deref()).await? {
        return Ok(());
    }
    Err(Error::invalid("'data-file' is required for this image"))
}

/// Repairs an image that was not closed cleanly: the dirty bit of its header is set. Returns the header after the repair.
/// The repair removes no snapshots, no bitmaps and no data of a snapshot.
///
/// # Errors `Corrupt` if the repair leaves errors. Also returns the errors of the check and of requests to the image file.
/// Before anything is written: the errors of a snapshot table or a bitmap directory that cannot be read.
pub(super) async fn repair_dirty(file: &Edge, header: &Header) -> Result<Header> {
    header.require_snapshots().map_err(|error| error.with_hint(REMOVE_SNAPSHOTS_HINT))?;
    visit_snapshots(file, SnapshotTable::of(header), drop).await?;
    if let Some(directory) = &header.extensions.bitmaps {
        let entries = read_directory(file, directory).await;
        entries.map_err(|error| error.with_hint(REMOVE_BITMAPS_HINT))?;
    }
    clear_unknown_autoclear(file, header).await?;
    let log = |finding: Finding| tracing::info!("qcow2: {}", finding.text);
    let report = repair_without_loss(file, header, &log).await;
    let report = report.map_err(|error| error.prefix("Could not repair dirty image"))?;
    if (report.corruptions, report.check_errors) != (0, 0) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "Could not repair dirty image: 'check -r all' reports the faults that are left",
        ));
    }
    tracing::error!("qcow2: the image was not closed cleanly: its refcounts have been repaired");
    read_header(file).await
}

/// Opens a new image in `file`, to continue its creation. `data` is the data file of the image, if there is one. The image
/// is not a node of a graph, and only the caller uses it.
pub(super) async fn open_new(
    file: &Arc<Edge>,
    data: Option<&Arc<Edge>>,
    header: Header,
) -> Result<Qcow2> {
    let data = data.map(|data| (ChildIdx::DATA, Arc::clone(data)));
    let children = Children::of([(ChildIdx::FILE, Arc::clone(file))].into_iter().chain(data));
    let children = Arc::new(children);
    let sizes = OpenOptions::default().sizes(header.geometry)?;
    // Refcounts are not lazy while the image is being created.
    let modes =
        RunOptions::take(&mut Options::new())?.effective_modes(&header, false)? - Modes::LAZY;
    let parts = OpenContextParts { children, epochs: Arc::default(), read_only: false };
    let image = build(parts, header, &sizes, None, modes).await?;
    image.metadata.read_l1(file).await?;
    Ok(image)
}

/// The values that an image gets from `oxblk_core`: its children, the epochs of its requests, and the read-only mode.
struct OpenContextParts {
    children: ChildrenRef,
    epochs: Arc<Epochs>,
    read_only: bool,
}

async fn build(
    context: OpenContextParts,
    header: Header,
    sizes: &CacheSizes,
    encryption: Option<Encryption>,
    modes: Modes,
) -> Result<Qcow2> {
    let geometry = header.geometry;
    let place = RefcountTable {
        offset: header.refcount_table_offset,
        clusters: u64::from(header.refcount_table_clusters),
    };
    let filled = Arc::new(Event::new());
    let cache = |bytes: u64, slices| {
        let words = usize::try_from(bytes / 8).unwrap_or(64);
        Arc::new(SliceCache::new(words, slices, Arc::clone(&filled)))
    };
    let compression = header.compression;
    let (l1_offset, l1_entries) = (header.l1_offset, u64::from(header.l1_entries));
    let snapshots = SnapshotTable::of(&header);
    let image_state = Arc::new(ImageState::new(
        header,
        modes,
        context.children,
        context.epochs,
        context.read_only,
    ));
    let clusters = Clusters::open(
        Arc::clone(&image_state),
        place,
        cache(refcount_slice(geometry), sizes.refcount_slices(geometry)),
        refcount_slice(geometry),
    )
    .await
    .map_err(|error| error.prefix("Could not initialize refcount handling"))?;
    note_header_targets(&clusters, &image_state.header(), &*image_state.file()?);
    let slice_words = sizes.slice / 8;
    let slices = sizes.l2_slices(geometry, l1_entries);
    let l2 = cache(sizes.slice, slices);
    let caches = [Arc::downgrade(&l2), Arc::downgrade(clusters.cache())];
    let clusters = Arc::new(clusters);
    let l1 = (l1_offset, l1_entries);
    let mapping = Arc::new(Mapping::new(Arc::clone(&image_state), l1, l2, slice_words));
    let metadata = Arc::new(Metadata::new(
        Arc::clone(&image_state),
        Arc::clone(&clusters),
        Arc::clone(&mapping),
        snapshots,
    ));
    let bitmaps = Arc::new(Bitmaps::new(Arc::clone(&image_state), Arc::clone(&clusters)));
    Ok(Qcow2 {
        snapshots: ImageSnapshots::new(
            Arc::clone(&image_state),
            Arc::clone(&clusters),
            Arc::clone(&mapping),
            Arc::clone(&metadata),
            Arc::clone(&bitmaps),
        ),
        data: Data::new(Arc::clone(&image_state), Arc::clone(&metadata), encryption),
        geometry,
        image_state,
        clusters,
        mapping,
        metadata,
        compression,
        preallocated: AtomicU8::new(0),
        cleaner: Cleaner::new(filled, caches),
        guest: RangeLock::new(),
        bitmaps,
        prepared: Mutex::default(),
    })
}

/// Records the L1 table and the LUKS header as metadata.
pub(super) fn note_header_targets(clusters: &Clusters, header: &Header, file: &Edge) {
    clusters.note_metadata(header.l1_offset, u64::from(header.l1_entries).saturating_mul(8));
    if let Some(crypto) = header.extensions.crypto {
        // The length in the image header may be wrong, so the range is limited to the size of the file.
        let len = crypto.length.min(file.size().saturating_sub(crypto.offset));
        clusters.note_metadata(crypto.offset, len);
    }
}

impl Qcow2 {
    /// Writes all metadata ([`Metadata::close_image`]) and stores the persistent bitmaps. After this call, the image must not
    /// be written unless the bitmaps are marked as in use again.
    pub(super) async fn complete_image(&self) -> Result<()> {
        self.metadata.close_image().await?;
        let stored = self.bitmaps.store_bitmaps().await;
        let stored = stored.map_err(|error| error.prefix("Could not store the bitmaps"));
        // The second call frees the clusters of the old bitmaps.
        stored.and(self.metadata.close_image().await)
    }
}
