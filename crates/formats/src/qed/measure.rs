//! Computes the file size of a new image.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Result, StatusFlags, Want};

use super::create::{Wanted, empty_bytes};
use super::header::Geometry;

/// Longest range of the source in one status query.
const STATUS_CHUNK: u64 = 1 << 40;

/// Measures a new image with the contents of the source. Without a source, measures an empty image.
///
/// # Errors
/// Fails if an option is invalid or not supported. Also returns the errors of requests to the source.
pub(super) async fn measure(request: MeasureRequest<'_>) -> Result<Measure> {
    let mut options = request.options;
    if let Some(source) = request.source {
        options.insert("size", source.size());
    }
    let wanted = Wanted::from_options(options)?;
    let geometry = wanted.geometry;
    let empty = empty_bytes(geometry);
    let tables = wanted.size.div_ceil(geometry.table_reach());
    let fully_allocated = empty
        .saturating_add(tables.saturating_mul(geometry.table_bytes()))
        .saturating_add(geometry.end(wanted.size));
    let required = match request.source {
        Some(source) => empty.saturating_add(used_bytes(source, geometry).await?),
        None => empty,
    };
    Ok(Measure { required, fully_allocated, bitmaps: None })
}

/// Total size of the clusters for which the block status of the source reports data that is not zero, and of the tables
/// that map these clusters.
async fn used_bytes(source: &Backend, geometry: Geometry) -> Result<u64> {
    let size = source.size();
    let reach = geometry.table_reach();
    let (mut used, mut offset) = (0_u64, 0_u64);
    // The end of the part of the disk whose tables are included in `used`.
    let mut counted = 0_u64;
    while offset < size {
        let asked = STATUS_CHUNK.min(size - offset);
        let status = source.block_status(offset, asked, Want::Precise).await?.status;
        let mut end = offset.saturating_add(status.len.max(1));
        let stored = StatusFlags::DATA | StatusFlags::ALLOCATED;
        if !status.is_zero() && status.flags.contains(stored) {
            end = geometry.end(end);
            used = used.saturating_add(end.saturating_sub(geometry.start(offset)));
            let from = (offset - offset % reach).max(counted);
            counted = end.checked_next_multiple_of(reach).unwrap_or(u64::MAX).max(counted);
            let tables = counted.saturating_sub(from).div_ceil(reach);
            used = used.saturating_add(tables.saturating_mul(geometry.table_bytes()));
        }
        offset = end;
    }
    Ok(used)
}
