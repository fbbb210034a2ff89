//! The bitmaps extension of the header, which names the bitmap directory.
//!
//! Header changes are first planned and then carried out, so that a caller learns before any write whether the header
//! has space for the extension. Each write is flushed before the next one starts.

use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::layout::{
    Autoclear, BitmapsExtension, Header, HeaderWrite, change_bitmaps_extension, field_offsets,
};

/// Plans the writes that make the header of the image in `file` name the directory `new`. With `None` the header names
/// no directory afterwards.
///
/// # Errors
/// As the file reports; [`oxblk_core::ErrorKind::NoSpace`] when the header has no space for the extension.
pub(in super::super) async fn plan(
    file: &Edge,
    header: &Header,
    new: Option<&BitmapsExtension>,
) -> Result<Vec<HeaderWrite>> {
    let len = usize::try_from(header.geometry.cluster_size()).unwrap_or(0);
    let head = file.read(0, IoBufMut::new(len)).await?;
    change_bitmaps_extension(&head, new)
}

/// Carries out the writes of [`plan`], and flushes each of them.
///
/// # Errors
/// As the file reports. After an error it is unknown which directory the header names.
pub(in super::super) async fn carry_out(file: &Edge, writes: Vec<HeaderWrite>) -> Result<()> {
    for HeaderWrite { offset, bytes } in writes {
        file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Clears the autoclear bit of bitmaps durably: until the extension is changed, the bitmaps count as inconsistent.
///
/// # Errors
/// As the file reports.
pub(in super::super) async fn distrust(file: &Edge) -> Result<()> {
    let place = field_offsets::AUTOCLEAR;
    let field = file.read(place, IoBufMut::new(8)).await?;
    let bits = field.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    let bits = Autoclear::from_bits_retain(bits) - Autoclear::BITMAPS;
    file.write(place, IoBuf::from(bits.bits().to_be_bytes().to_vec()), WriteFlags::empty()).await?;
    file.flush().await
}
