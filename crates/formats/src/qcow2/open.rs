//! Opening and closing an image.
//!
//! Opening checks the header, and reads the L1 table and the refcount table. Opening for writing also repairs an image that was
//! not closed cleanly. Closing writes all metadata, so that no cluster leaks.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex};

use oxblk_core::check::Fix;
use oxblk_core::{
    BackingFile, ChildIdx, Children, ChildrenRef, Edge, Epochs, Errno, Error, ErrorKind,
    OpenContext, Options, Preallocation, Result,
};
use oxblk_ring::{Event, IoBufMut, Mutex as AsyncMutex, RangeLock};
use serde::{Deserialize, Serialize};

use super::Qcow2;
use super::bitmaps::Bitmaps;
use super::cache::{Cleaner, Radix, SliceCache};
use super::check::check;
use super::compressed::Tail;
use super::encryption::{self, Encryption};
use super::header::HeaderState;
use super::layout::{Autoclear, Geometry, Header, Incompatible, L1Entry, header_extent};
use super::read_ahead::read_ahead;
use super::refcounts::{Refcounts, TablePlace};
use super::run_options::{Modes, RunOptions};
use super::snapshots::TablePlace as SnapshotTable;
use super::stopped::ReplacedBy;

/// Size of the first read of the header and its extensions. It usually covers all of them.
const HEAD: u64 = 64 << 10;
/// Default size of the L2 cache, in bytes.
const L2_CACHE: u64 = 64 << 20;
/// Default size of the refcount cache, in bytes.
const REFCOUNT_CACHE: u64 = 8 << 20;
const SLICE: u64 = 4096;

/// Options of the driver, besides `file` and `backing`.
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
    /// The number of slices in the L2 cache. It is limited to the number that covers the complete disk.
    pub(super) fn l2_slices(&self, geometry: Geometry, l1_entries: u64) -> usize {
        let whole = l1_entries.saturating_mul(geometry.cluster_size() / self.slice);
        let slices = (self.l2 / self.slice).min(whole);
        usize::try_from(slices).unwrap_or(usize::MAX).max(8)
    }

    /// The number of slices in the refcount cache.
    pub(super) fn refcount_slices(&self, geometry: Geometry) -> usize {
        let slices = self.refcounts / refcount_slice(geometry);
        usize::try_from(slices).unwrap_or(usize::MAX).max(4)
    }
}

/// Bytes of one slice of the refcount cache.
fn refcount_slice(geometry: Geometry) -> u64 {
    SLICE.min(geometry.cluster_size())
}

/// Opens the image in `context`'s file child.
pub(super) async fn open(context: &mut OpenContext) -> Result<Qcow2> {
    let options: OpenOptions = context.options.extract()?;
    let encrypt = encryption::Given::take(&mut context.options)?;
    let run = RunOptions::take(&mut context.options)?;
    let file = context.file()?;
    let mut header = read_header(&file).await?;
    // A check skips these tests, because it repairs the faults that would make an ordinary open fail.
    if !context.flags.check {
        header.require_refcounts()?;
        header.require_bitmaps()?;
        header.require_snapshots()?;
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
    let modes = run.settle(&header, context.flags.unmap)?;
    let surroundings = Surroundings {
        children: Arc::clone(&context.children),
        epochs: Arc::clone(&context.epochs),
        read_only: context.flags.read_only,
    };
    let image = build(surroundings, header, &sizes, encryption, modes).await?;
    image.read_l1(&file).await?;
    if !context.flags.check {
        let inactive = image.note_snapshots(&file).await?;
        if modes.contains(Modes::INACTIVE_L2) && !image.is_read_only() {
            image.note_inactive_tables().await?;
        }
        if !image.is_read_only() {
            image.find_overlaps(inactive);
            image.clear_autoclear().await?;
        }
    }
    image.cleaner.set_interval(run.clean_interval());
    Ok(image)
}

/// Opens the data file of an image that has one. An open without I/O does not need the data file.
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

/// Rebuilds the refcounts of an image that was not closed cleanly ("Incompatible features", dirty bit).
pub(super) async fn repair_dirty(file: &Edge, header: &Header) -> Result<Header> {
    let report = check(file, header, Fix::All, &|_| ()).await;
    let report = report.map_err(|error| error.prefix("Could not repair dirty image"))?;
    if (report.corruptions, report.check_errors) != (0, 0) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "Could not repair dirty image: errors are left that img check -r all tells of",
        ));
    }
    tracing::error!("qcow2: the image was not closed cleanly: its refcounts have been repaired");
    read_header(file).await
}

pub(super) async fn read_header(file: &Edge) -> Result<Header> {
    let size = file.size();
    let len = usize::try_from(size.min(HEAD)).unwrap_or(0);
    let mut head = read_ahead(file, 0, len).await.bytes;
    loop {
        let have = u64::try_from(head.len()).unwrap_or(u64::MAX);
        let needed = header_extent(&head).min(size);
        if needed <= have {
            return Header::parse(&head, size);
        }
        let more = IoBufMut::new(usize::try_from(needed - have).unwrap_or(0));
        let more = file.read(have, more).await;
        head.extend_from_slice(&more.map_err(|e| e.prefix("Could not read qcow2 header"))?);
    }
}

/// Opens an image that was just created in `file`, to continue its creation. Its guest data goes into `data`, if there is one.
/// The image is not a node of any graph, and only the caller uses it.
pub(super) async fn open_new(
    file: &Arc<Edge>,
    data: Option<&Arc<Edge>>,
    header: Header,
) -> Result<Qcow2> {
    let children = Arc::<Children>::default();
    children.set(ChildIdx::FILE, Some(Arc::clone(file)));
    children.set(ChildIdx::DATA, data.map(Arc::clone));
    let sizes = OpenOptions::default().sizes(header.geometry)?;
    // Refcounts are not lazy while the image is being created.
    let modes = RunOptions::take(&mut Options::new())?.settle(&header, false)? - Modes::LAZY;
    let surroundings = Surroundings { children, epochs: Arc::default(), read_only: false };
    let image = build(surroundings, header, &sizes, None, modes).await?;
    image.read_l1(file).await?;
    Ok(image)
}

/// The surroundings of an image: its children, the epochs, and the read-only state.
struct Surroundings {
    children: ChildrenRef,
    epochs: Arc<Epochs>,
    read_only: bool,
}

async fn build(
    context: Surroundings,
    header: Header,
    sizes: &CacheSizes,
    encryption: Option<Encryption>,
    modes: Modes,
) -> Result<Qcow2> {
    let geometry = header.geometry;
    let place = TablePlace {
        offset: header.refcount_table_offset,
        clusters: u64::from(header.refcount_table_clusters),
    };
    let filled = Arc::new(Event::new());
    let cache = |bytes: u64, slices| {
        let words = usize::try_from(bytes / 8).unwrap_or(64);
        Arc::new(SliceCache::new(words, slices, Arc::clone(&filled)))
    };
    let corrupt = Arc::new(AtomicBool::new(false));
    let refcounts = Refcounts::open(
        geometry,
        Arc::clone(&context.children),
        place,
        cache(refcount_slice(geometry), sizes.refcount_slices(geometry)),
        refcount_slice(geometry),
        (Arc::clone(&context.epochs), Arc::clone(&corrupt)),
    )
    .await
    .map_err(|error| error.prefix("Could not initialize refcount handling"))?;
    note_named_places(&refcounts, &header, &*context.children.require(ChildIdx::FILE)?);
    let slice_words = sizes.slice / 8;
    let slices = sizes.l2_slices(geometry, u64::from(header.l1_entries));
    let l2 = cache(sizes.slice, slices);
    let caches = [Arc::downgrade(&l2), Arc::downgrade(refcounts.cache())];
    Ok(Qcow2 {
        geometry,
        version: header.version,
        compression: header.compression,
        read_only: AtomicBool::new(context.read_only),
        children: context.children,
        encryption,
        epochs: context.epochs,
        size: AtomicU64::new(header.size),
        corrupt,
        replaced: ReplacedBy::default(),
        signalled: AtomicBool::new(false),
        preallocated: AtomicU8::new(0),
        l1: Radix::default(),
        l1_offset: AtomicU64::new(header.l1_offset),
        l1_entries: AtomicU64::new(u64::from(header.l1_entries)),
        l2,
        cleaner: Cleaner::new(filled, caches),
        slice_words,
        refcounts,
        guest: RangeLock::new(),
        compressed_tail: Tail::default(),
        tables: AsyncMutex::new(()),
        writing_back: AsyncMutex::new(()),
        barrier: crate::write_barrier::WriteBarrier::default(),
        l1_dirty: Mutex::default(),
        snapshots: Mutex::new(SnapshotTable::of(&header)),
        bitmaps: Bitmaps::of(&header),
        modes: AtomicU32::new(modes.bits()),
        dirty_bit: super::dirty_bit::DirtyBit::default(),
        unfinished: AtomicBool::new(false),
        prepared: Mutex::default(),
        header: HeaderState::new(header),
    })
}

/// Notes the L1 table and the LUKS header as metadata.
pub(super) fn note_named_places(refcounts: &Refcounts, header: &Header, file: &Edge) {
    let allocator = &refcounts.allocator;
    allocator.note_metadata(header.l1_offset, u64::from(header.l1_entries).saturating_mul(8));
    if let Some(crypto) = header.extensions.crypto {
        // The length in the header may be wrong. Guest data lies within the file, so the length is limited to the file.
        let len = crypto.length.min(file.size().saturating_sub(crypto.offset));
        allocator.note_metadata(crypto.offset, len);
    }
}

impl Qcow2 {
    pub(super) async fn read_l1(&self, file: &Edge) -> Result<()> {
        let bytes = self.l1_entries().saturating_mul(8);
        let len = usize::try_from(bytes).map_err(|_| Error::from_errno(Errno::FBIG))?;
        if len == 0 {
            return Ok(());
        }
        let table = file.read(self.l1_offset.load(Acquire), IoBufMut::new(len)).await;
        let table = table.map_err(|error| error.prefix("Could not read L1 table"))?;
        for (index, word) in (0_u64..).zip(table.chunks_exact(8)) {
            let entry = L1Entry(word.try_into().map_or(0, u64::from_be_bytes));
            let table = entry.l2_offset(self.geometry);
            // An entry without an offset refers to no table, even if it has flags. In memory it is like an empty entry.
            if table == Ok(None) {
                continue;
            }
            self.l1.get_or_make(index).store(entry.0, Release);
            if !self.is_read_only()
                && let Ok(Some(offset)) = table
            {
                self.refcounts.allocator.note_metadata(offset, self.geometry.cluster_size());
            }
        }
        Ok(())
    }

    /// As [`Self::close_image`], and stores the persistent bitmaps. Afterwards the image must not be written unless the bitmaps
    /// are marked as in use again.
    pub(super) async fn complete_image(&self) -> Result<()> {
        self.close_image().await?;
        let stored = self.store_bitmaps().await;
        let stored = stored.map_err(|error| error.prefix("Could not store the bitmaps"));
        // The second call frees the clusters of the old bitmaps.
        stored.and(self.close_image().await)
    }

    /// Writes all metadata, so that the image on disk is complete and no cluster leaks.
    pub(super) async fn close_image(&self) -> Result<()> {
        if self.is_read_only() || self.corrupt.load(Relaxed) {
            return Ok(());
        }
        // The first cycle lowers refcounts, the second writes them.
        self.write_back(true).await?;
        let written = self.write_back(true).await;
        let written = written.and(self.write_postponed().await);
        let written = written.and(self.complete_last_cluster().await);
        written.map_err(|error| {
            if error.kind() == ErrorKind::NoSpace {
                error.prefix("Could not close the image cleanly")
            } else {
                error
            }
        })
    }

    /// Extends the file to the end of its last cluster or subcluster, as QEMU does. The last cluster may be new and only partly
    /// written. The added part is a hole.
    async fn complete_last_cluster(&self) -> Result<()> {
        let file = self.children.require(ChildIdx::FILE)?;
        let (size, unit) = (file.size(), self.geometry.subcluster_size());
        let cluster = self.geometry.cluster_index(size);
        if size.is_multiple_of(unit)
            || !self.refcounts.allocator.is_new_data(cluster)
            || self.compressed_tail.is_in(cluster, self.geometry.cluster_bits)
            || self.refcounts.get(cluster).await? == 0
        {
            return Ok(());
        }
        let end = size.checked_next_multiple_of(unit).unwrap_or(size);
        file.resize(end, Preallocation::Off).await
    }
}
