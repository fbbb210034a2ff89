//! Computing the size of a new image, as `qemu-img measure` does.
//!
//! The fully allocated size is the size of the layout that [`super::create`] plans with all clusters preallocated. The required
//! size omits the data clusters for which the source has no data, unless the options preallocate data or set a backing file.
//! The required size always includes the metadata of all clusters, as in `qemu-img measure`.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Errno, Error, Node, Options, Preallocation, Result, StatusFlags, Want};

use super::create_options::{cluster_bits, refcount_order};
use super::encryption::create::Wanted as Encryption;
use super::layout::{BitmapEntry, Geometry, bitmap_bytes};
use super::plan::fully_allocated;

/// Maximum length of the range of one status query to the source, in bytes.
const STATUS_CHUNK: u64 = 1 << 40;

/// Measures a new image for the contents of the source. Without a source, measures an empty image.
///
/// # Errors
/// When the options are wrong, when the image is too large, and the errors of requests to the source.
pub(super) async fn measure(request: MeasureRequest<'_>) -> Result<Measure> {
    let wanted = Wanted::from_options(request.options)?;
    let geometry = wanted.geometry;
    let size = match request.source {
        Some(source) => source.size(),
        None => wanted.size,
    };
    let virtual_size =
        size.checked_next_multiple_of(geometry.cluster_size()).ok_or_else(too_large)?;
    let fully_allocated = fully_allocated(geometry, virtual_size).ok_or_else(too_large)?;
    // The LUKS header is added to both sizes.
    let luks = geometry.clusters_for(wanted.encryption.header_len()) * geometry.cluster_size();
    if luks > 0 {
        wanted.encryption.password(request.secrets)?;
    }
    let data = match (wanted.preallocation, request.source) {
        (Preallocation::Falloc | Preallocation::Full, _) => virtual_size,
        // It is unknown how much data of the source is also in the backing file, so the image may need all data clusters.
        (_, Some(_)) if wanted.has_backing => virtual_size,
        (_, Some(source)) => used_bytes(source, geometry).await?,
        (_, None) => 0,
    };
    let bitmaps = match request.source {
        Some(source) if wanted.version >= 3 => bitmaps(&*source.node()?, geometry),
        _ => None,
    };
    Ok(Measure {
        required: (fully_allocated - virtual_size).saturating_add(data).saturating_add(luks),
        fully_allocated: fully_allocated.saturating_add(luks),
        bitmaps,
    })
}

fn too_large() -> Error {
    Error::invalid("The image size is too large (try using a larger cluster size)")
        .errno(Errno::FBIG)
}

/// The options that affect the size. `create` checks the other options.
struct Wanted {
    size: u64,
    version: u32,
    geometry: Geometry,
    preallocation: Preallocation,
    has_backing: bool,
    encryption: Encryption,
}

impl Wanted {
    fn from_options(mut options: Options) -> Result<Self> {
        // Other encryption formats do not change the size, so their options are ignored.
        let is_luks = options.get_str("encrypt.format") == Some("luks");
        let encryption =
            if is_luks { Encryption::take(&mut options)? } else { Encryption::default() };
        let extended_l2 = options.take_bool("extended_l2")?.unwrap_or(false);
        let cluster_bits = cluster_bits(options.take_size("cluster_size")?, extended_l2)?;
        let preallocation = match options.take_str("preallocation")? {
            None => Preallocation::Off,
            Some(name) => Preallocation::parse(&name)
                .ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))?,
        };
        let version = match options.take_str("compat")?.as_deref() {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => {
                return Err(Error::invalid(format!("Invalid compatibility level: '{other}'")));
            }
        };
        let refcount_order = refcount_order(options.take_number("refcount_bits")?)?;
        if version < 3 && refcount_order != 4 {
            return Err(Error::invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            ));
        }
        Ok(Self {
            size: options.take_size("size")?.unwrap_or(0),
            version,
            geometry: Geometry { cluster_bits, refcount_order, extended_l2, data_file: false },
            preallocation,
            encryption,
            has_backing: options.contains("backing_file"),
        })
    }
}

/// Bytes that the persistent bitmaps of the source need if all their clusters are allocated. `None` if the source cannot store
/// bitmaps.
fn bitmaps(source: &Node, geometry: Geometry) -> Option<u64> {
    source.driver().persistent_bitmaps().filter(|persistent| persistent.are_supported())?;
    let bytes_in = |clusters: u64| clusters.saturating_mul(geometry.cluster_size());
    let (mut total, mut directory) = (0_u64, 0_u64);
    for bitmap in source.bitmaps().snapshot().iter().filter(|bitmap| bitmap.is_persistent()) {
        let granularity = bitmap.map().granularity();
        let data = geometry.clusters_for(bitmap_bytes(source.size(), granularity));
        let table = geometry.clusters_for(data.saturating_mul(8));
        total = total.saturating_add(bytes_in(data)).saturating_add(bytes_in(table));
        let entry = BitmapEntry::new(bitmap.name(), granularity).encoded_len();
        directory = directory.saturating_add(entry);
    }
    Some(total.saturating_add(bytes_in(geometry.clusters_for(directory))))
}

/// Total size of the clusters in which the source or its backing chain has data that is not known to be zero.
async fn used_bytes(source: &Backend, geometry: Geometry) -> Result<u64> {
    let size = source.size();
    let mut used: u64 = 0;
    let mut offset = 0;
    while offset < size {
        let asked = STATUS_CHUNK.min(size - offset);
        let status = source.block_status(offset, asked, Want::Precise).await?.status;
        let mut end = offset.saturating_add(status.len.max(1));
        let stored = StatusFlags::DATA | StatusFlags::ALLOCATED;
        if !status.is_zero() && status.flags.contains(stored) {
            end = end.checked_next_multiple_of(geometry.cluster_size()).ok_or_else(too_large)?;
            used = used.saturating_add(end - geometry.cluster_start(offset));
        }
        offset = end;
    }
    Ok(used)
}
