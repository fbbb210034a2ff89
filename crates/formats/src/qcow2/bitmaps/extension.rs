//! The header's word of where the directory is.

use oxblk_core::{Edge, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::super::layout::{
    Autoclear, BitmapsExtension, Header, HeaderWrite, change_bitmaps_extension, field_offsets,
};

/// The writes that have the header of the image in `file` name the directory `new`, or none.
///
/// # Errors
/// As the file reports; [`oxblk_core::ErrorKind::NoSpace`] when the header has no room for the extension.
pub(in super::super) async fn plan(
    file: &Edge,
    header: &Header,
    new: Option<&BitmapsExtension>,
) -> Result<Vec<HeaderWrite>> {
    let len = usize::try_from(header.geometry.cluster_size()).unwrap_or(0);
    let head = file.read(0, IoBufMut::new(len)).await?;
    change_bitmaps_extension(&head, new)
}

/// Carries such writes out, durably.
///
/// # Errors
/// As the file reports: then nobody knows which directory is named.
pub(in super::super) async fn carry_out(file: &Edge, writes: Vec<HeaderWrite>) -> Result<()> {
    for HeaderWrite { offset, bytes } in writes {
        file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Has the header say that the bitmaps are not consistent, durably, until the extension is changed.
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
