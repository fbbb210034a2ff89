//! Computes the file size of a new image.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Result, StatusFlags, Want};

use super::create::Wanted;
use super::header::{BLOCK, Header};

/// Longest range of the source in one status query.
const STATUS_CHUNK: u64 = 1 << 40;

/// Measures a new image with the contents of the source. Without a source, measures an empty image.
///
/// # Errors
/// Fails if an option is invalid or not supported. Also returns the errors of requests to the source.
pub(super) async fn measure(request: MeasureRequest<'_>) -> Result<Measure> {
    let wanted = Wanted::from_options(request.options, request.source.map(Backend::size))?;
    let header = Header::new(wanted.size, wanted.blocks, wanted.is_static, [[0; 16]; 2]);
    let fully_allocated = header.block_offset(header.blocks);
    let required = match request.source {
        _ if wanted.is_static => fully_allocated,
        Some(source) => header.data_offset.saturating_add(used_bytes(source).await?),
        None => header.data_offset,
    };
    Ok(Measure { required, fully_allocated, bitmaps: None })
}

/// Total size of the blocks for which the block status of the source reports data that is not zero.
async fn used_bytes(source: &Backend) -> Result<u64> {
    let size = source.size();
    let (mut used, mut offset) = (0_u64, 0);
    while offset < size {
        let asked = STATUS_CHUNK.min(size - offset);
        let status = source.block_status(offset, asked, Want::Precise).await?.status;
        let mut end = offset.saturating_add(status.len.max(1));
        let stored = StatusFlags::DATA | StatusFlags::ALLOCATED;
        if !status.is_zero() && status.flags.contains(stored) {
            end = end.next_multiple_of(BLOCK);
            used = used.saturating_add(end - (offset - offset % BLOCK));
        }
        offset = end;
    }
    Ok(used)
}
