//! Reads the footers and the header of an image, and chooses the footer that is used.
//!
//! A dynamic image has two footers. The copy at the beginning is used if it is valid, because guest writes never change it.
//! If the copy is damaged, the footer at the end is used. A fixed image has only the footer at the end. Sector 0 of a fixed
//! image belongs to the guest, and the guest may write data there that looks like the copy of a footer. So an image is
//! refused if it has a valid copy of the footer of a dynamic image at the beginning and a valid footer of a fixed image at
//! the end.

use oxblk_core::{Edge, Error, ErrorKind, Result};
use oxblk_ring::IoBufMut;

use super::footer::{DiskType, FOOTER_BYTES, Footer, Invalid, SizeRule};
use super::header::{HEADER_BYTES, Header};

/// The state of one of the two footers of a dynamic image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    /// This footer equals the footer that is used.
    Good,
    /// The cookie or the checksum of this footer is wrong.
    Damaged,
    /// This footer is valid, but has other contents than the footer that is used.
    Different,
}

/// The footer and the header of a dynamic image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Metadata {
    /// The footer that is used: one of the two footers of the file.
    pub(super) footer: Footer,
    pub(super) header: Header,
    /// The copy at the beginning of the file.
    pub(super) at_start: Copy,
    /// The footer in the last sector of the file.
    pub(super) at_end: Copy,
}

/// The metadata of an image.
#[derive(Debug)]
pub(super) enum Found {
    Fixed { footer: Box<Footer>, size: u64 },
    Dynamic { metadata: Box<Metadata>, size: u64 },
}

/// Byte offset of the last sector of a file. If the file ends inside this sector, the rest of the sector counts as
/// zeroes.
pub(super) fn last_sector(file_size: u64) -> u64 {
    file_size.div_ceil(FOOTER_BYTES).saturating_sub(1).saturating_mul(FOOTER_BYTES)
}

/// Reads `len` bytes, or fewer if the file ends before that.
async fn read(file: &Edge, offset: u64, len: u64, what: &str) -> Result<IoBufMut> {
    let len = len.min(file.size().saturating_sub(offset));
    let bytes = file.read(offset, IoBufMut::new(usize::try_from(len).unwrap_or(0))).await;
    bytes.map_err(|error| error.prefix(format_args!("Could not read the VHD {what}")))
}

/// Reads and parses the footer at `offset`.
pub(super) async fn read_footer(file: &Edge, offset: u64) -> Result<Result<Footer, Invalid>> {
    Ok(Footer::parse(&read(file, offset, FOOTER_BYTES, "footer").await?))
}

/// Reads the metadata of an image.
///
/// # Errors
/// Fails if the file is not a VHD image, or if the image is invalid or has an unsupported property. Also returns the errors
/// of requests to the image file.
pub(super) async fn read_metadata(file: &Edge, rule: SizeRule) -> Result<Found> {
    let file_size = file.size();
    if file_size < FOOTER_BYTES {
        return Err(Error::new(ErrorKind::Invalid, "File too small for a VHD header"));
    }
    let first = read_footer(file, 0).await?;
    let last = read_footer(file, last_sector(file_size)).await?;
    let is_fixed = |footer: &Footer| footer.disk_type() == DiskType::Fixed;
    let footer = match (first, last) {
        (Ok(first), Ok(last)) if !is_fixed(&first) && is_fixed(&last) => {
            return Err(Error::corrupt(
                "The image has the footer of a fixed image and the header of a dynamic image",
            ));
        }
        (Ok(first), _) if !is_fixed(&first) => first,
        (_, Ok(last)) => last,
        (Err(Invalid::Checksum), Err(_)) | (_, Err(Invalid::Checksum)) => {
            return Err(Error::new(ErrorKind::Invalid, "Incorrect header checksum"));
        }
        (_, Err(Invalid::Cookie)) => {
            return Err(Error::new(ErrorKind::Invalid, "invalid VPC image"));
        }
    };
    let size = footer.size(rule)?;
    match footer.disk_type() {
        DiskType::Fixed => {
            let end = last_sector(file_size);
            if size > end {
                return Err(Error::corrupt(format!(
                    "The image has been truncated: the disk has {size} bytes, but the file only {end} before its footer"
                )));
            }
            return Ok(Found::Fixed { footer: Box::new(footer), size });
        }
        DiskType::Differencing => {
            return Err(Error::unsupported("Differencing VHD images are not supported"));
        }
        DiskType::Dynamic | DiskType::Other(_) => {}
    }
    let offset = footer.header_offset();
    if offset >= file_size {
        return Err(Error::corrupt(
            "Error reading dynamic VHD header: it lies behind the end of the file",
        ));
    }
    let bytes = read(file, offset, HEADER_BYTES, "header").await?;
    let header = Header::parse(&bytes, offset, size, file_size)?;
    let copy = |other| match other {
        Ok(other) if other == footer => Copy::Good,
        Ok(_) => Copy::Different,
        Err(_) => Copy::Damaged,
    };
    let (at_start, at_end) = (copy(first), copy(last));
    let metadata = Box::new(Metadata { footer, header, at_start, at_end });
    Ok(Found::Dynamic { metadata, size })
}
