//! Changing the bitmaps extension of the header. The extension contains the offset of the bitmap directory.
//!
//! `plan_extension` computes the writes, and `write_planned` executes these writes. So a header without space for the extension
//! is reported before anything is written. Each write is flushed before the next write starts.

use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::layout::{
    Autoclear, BitmapsExtension, Header, HeaderWrite, change_bitmaps_extension, field_offsets,
};

/// Plans the writes that make the header of the image in `file` refer to the directory `new`. With `None`, the header
/// refers to no directory after these writes.
///
/// # Errors
/// The errors of requests to the image file. [`oxblk_core::ErrorKind::NoSpace`] when the header has no space for the extension.
/// An error when the header extensions on disk are invalid.
pub(in super::super) async fn plan_extension(
    file: &Edge,
    header: &Header,
    new: Option<&BitmapsExtension>,
) -> Result<Vec<HeaderWrite>> {
    let len = usize::try_from(header.geometry.cluster_size()).unwrap_or(0);
    let head = file.read(0, IoBufMut::new(len)).await?;
    change_bitmaps_extension(&head, new)
}

/// Executes the writes of [`plan_extension`], with a flush after each write.
///
/// # Errors
/// The errors of requests to the image file. After an error, it is unknown whether the header refers to the old or to the new
/// directory.
pub(in super::super) async fn write_planned(file: &Edge, writes: Vec<HeaderWrite>) -> Result<()> {
    for HeaderWrite { offset, bytes } in writes {
        file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Clears the autoclear bit of bitmaps in the header on disk, and flushes. Until [`write_planned`] sets the bit again, the
/// bitmaps count as inconsistent.
///
/// # Errors
/// The errors of requests to the image file.
pub(in super::super) async fn clear_bitmaps_autoclear(file: &Edge) -> Result<()> {
    let place = field_offsets::AUTOCLEAR;
    let field = file.read(place, IoBufMut::new(8)).await?;
    let bits = field.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    let bits = Autoclear::from_bits_retain(bits) - Autoclear::BITMAPS;
    file.write(place, IoBuf::from(bits.bits().to_be_bytes().to_vec()), WriteFlags::empty()).await?;
    file.flush().await
}
