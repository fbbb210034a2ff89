//! Computes the file size of a new image.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, Result, StatusFlags, Want};

use super::create::Wanted;
use super::footer::FOOTER_BYTES;
use super::header::{Header, NEW_BLOCK};

/// Longest range of the source in one status query.
const STATUS_CHUNK: u64 = 1 << 40;

/// Measures a new image with the contents of the source. Without a source, measures an empty image.
///
/// # Errors
/// Fails if an option is invalid or not supported. Also returns the errors of requests to the source.
pub(super) async fn measure(request: MeasureRequest<'_>) -> Result<Measure> {
    let wanted = Wanted::from_options(request.options, request.source.map(Backend::size))?;
    if wanted.is_fixed {
        let len = wanted.size.saturating_add(FOOTER_BYTES);
        return Ok(Measure { required: len, fully_allocated: len, bitmaps: None });
    }
    let header = Header::new(wanted.size);
    let with = |blocks: u64| {
        let blocks = blocks.saturating_mul(header.stride());
        header.metadata_end().saturating_add(blocks).saturating_add(FOOTER_BYTES)
    };
    let used = match request.source {
        Some(source) => used_blocks(source).await?,
        None => 0,
    };
    let fully_allocated = with(header.blocks.into());
    Ok(Measure { required: with(used), fully_allocated, bitmaps: None })
}

/// Number of blocks for which the block status of the source reports data that is not zero.
async fn used_blocks(source: &Backend) -> Result<u64> {
    let size = source.size();
    let (mut used, mut offset) = (0_u64, 0);
    while offset < size {
        let asked = STATUS_CHUNK.min(size - offset);
        let status = source.block_status(offset, asked, Want::Precise).await?.status;
        let mut end = offset.saturating_add(status.len.max(1));
        let stored = StatusFlags::DATA | StatusFlags::ALLOCATED;
        if !status.is_zero() && status.flags.contains(stored) {
            end = end.next_multiple_of(NEW_BLOCK);
            used = used.saturating_add((end - (offset - offset % NEW_BLOCK)) / NEW_BLOCK);
        }
        offset = end;
    }
    Ok(used)
}
