//! Creating images. An image whose creation was interrupted is either complete or cannot be opened: old footers in the file are
//! erased first, and the last write completes the image. This write is the footer of a fixed image, and the header of a dynamic
//! image, because one of the two footers is enough to open a dynamic image. Only the first sector of the header contains
//! other bytes than zeroes.

use std::time::{SystemTime, UNIX_EPOCH};

use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, OptionType};
use oxblk_core::{Edge, Errno, Error, Options, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_crypto::random;
use oxblk_ring::IoBuf;

use super::footer::{DiskType, FOOTER_BYTES, Footer, MAX_SIZE, NewFooter, SECTOR};
use super::geometry::Geometry;
use super::header::Header;
use super::metadata::last_sector;

/// Maximum number of bytes of the BAT in one write.
const MAX_BYTES: u64 = 1 << 20;

/// The options of the format itself. `preallocation` is an option of the protocol, because it preallocates the file.
pub(super) static OPTIONS: &[CreateOption] = &[
    CreateOption { name: "size", kind: OptionType::Size, help: "Virtual disk size", default: None },
    CreateOption {
        name: "subformat",
        kind: OptionType::String,
        help: "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
        default: None,
    },
    CreateOption {
        name: "force_size",
        kind: OptionType::Bool,
        help: "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation",
        default: None,
    },
];

/// Creation options that have been checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Virtual size in bytes.
    pub(super) size: u64,
    pub(super) is_fixed: bool,
    geometry: Option<Geometry>,
    preallocation: Preallocation,
}

impl Wanted {
    /// Reads the options. `size`, if given, replaces the `size` option. Without `force_size`, the size is rounded up to
    /// cylinders × heads × sectors of a geometry, unless it needs the largest geometry.
    ///
    /// # Errors
    /// Fails if a value is invalid or not supported, or the size is too large. The messages are the same as in QEMU's
    /// tools.
    pub(super) fn from_options(mut options: Options, size: Option<u64>) -> Result<Self> {
        let own = options.take_size("size")?;
        let size = size.or(own).unwrap_or(0);
        let preallocation = match options.take_str("preallocation")? {
            None => Preallocation::Off,
            Some(name) => match Preallocation::parse(&name) {
                Some(Preallocation::Metadata) => {
                    return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
                }
                Some(mode) => mode,
                None => return Err(Error::invalid(format!("invalid parameter value: {name}"))),
            },
        };
        let is_fixed = match options.take_str("subformat")?.as_deref() {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "Parameter 'subformat' does not accept value '{other}'"
                )));
            }
        };
        let force_size = options.take_bool("force_size")?.unwrap_or(false);
        let sectors = size.div_ceil(SECTOR);
        let geometry = (!force_size).then(|| Geometry::holding(sectors));
        let rounded = match geometry {
            Some(geometry) if geometry != Geometry::LARGEST => geometry.product(),
            _ => sectors,
        };
        let size = rounded.checked_mul(SECTOR).filter(|size| *size <= MAX_SIZE);
        let size = size.ok_or_else(|| {
            let text = "The image size is too large for file format 'vpc'";
            Error::from_errno(Errno::FBIG).reword(text)
        })?;
        Ok(Self { size, is_fixed, geometry, preallocation })
    }

    fn footer(&self) -> Result<Footer> {
        let mut uuid = [0; 16];
        random::fill(&mut uuid).map_err(|error| Error::unsupported(error.to_string()))?;
        // A random (version 4) UUID.
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut uuid;
        *version = *version & 0x0f | 0x40;
        *variant = *variant & 0x3f | 0x80;
        Ok(Footer::new(NewFooter {
            disk_type: if self.is_fixed { DiskType::Fixed } else { DiskType::Dynamic },
            size: self.size,
            geometry: self.geometry,
            header_offset: if self.is_fixed { u64::MAX } else { FOOTER_BYTES },
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            uuid,
        }))
    }
}

/// Creates an image.
///
/// # Errors
/// Fails if an option is invalid or not supported, or if the target is not a file. Also returns the errors of requests to the
/// image file.
pub(super) async fn create(request: CreateRequest) -> Result<()> {
    let wanted = Wanted::from_options(request.options, None)?;
    let CreateTarget::File(file) = request.target else {
        return Err(Error::invalid("A vpc image is created in a file"));
    };
    let footer = wanted.footer()?;
    erase_footers(&file).await?;
    if wanted.is_fixed {
        allocate(&file, wanted).await?;
        file.flush().await?;
        write_last_footer(&file, wanted.size, &footer).await?;
    } else {
        let header = Header::new(wanted.size);
        write(&file, header.offset, vec![0; header.encode().len()]).await?;
        write_table(&file, &header).await?;
        file.flush().await?;
        write_last_footer(&file, header.metadata_end(), &footer).await?;
        write(&file, 0, footer.encode()).await?;
        file.flush().await?;
        write(&file, header.offset, header.encode()).await?;
    }
    file.flush().await
}

/// Writes the footer at `offset`, and truncates the file after it.
async fn write_last_footer(file: &Edge, offset: u64, footer: &Footer) -> Result<()> {
    write(file, offset, footer.encode()).await?;
    let end = offset.saturating_add(FOOTER_BYTES);
    if file.size() > end && file.node().limits().grows {
        file.resize(end, Preallocation::Off).await?;
    }
    Ok(())
}

async fn write(file: &Edge, offset: u64, bytes: Vec<u8>) -> Result<()> {
    file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await
}

/// Erases the footers of an old image in the file, and flushes each time. The first sector of an old fixed image contains data
/// of the disk, so the footer at the end is erased first. An old dynamic image can be opened with either of its two footers, so
/// both are erased.
async fn erase_footers(file: &Edge) -> Result<()> {
    let size = file.size();
    if size == 0 {
        return Ok(());
    }
    for offset in [last_sector(size), 0] {
        let len = FOOTER_BYTES.min(size.saturating_sub(offset));
        file.write_zeroes(offset, len, ZeroFlags::empty()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Extends the file so that it contains the disk and the footer, and makes the disk read as zeroes.
async fn allocate(file: &Edge, wanted: Wanted) -> Result<()> {
    let limits = file.node().limits();
    let is_zero = limits.has_zero_init && limits.grows && file.size() == 0;
    file.resize(wanted.size.saturating_add(FOOTER_BYTES), wanted.preallocation).await?;
    if is_zero || wanted.size == 0 {
        return Ok(());
    }
    file.write_zeroes(0, wanted.size, ZeroFlags::MAY_UNMAP).await
}

/// Writes a BAT without allocated blocks, padded to a multiple of the sector size.
async fn write_table(file: &Edge, header: &Header) -> Result<()> {
    let (mut at, end) = (header.table_offset(), header.metadata_end());
    let absent = IoBuf::from(vec![0xff; usize::try_from(MAX_BYTES.min(end - at)).unwrap_or(0)]);
    while at < end {
        let len = MAX_BYTES.min(end - at);
        let mut bytes = absent.clone();
        let bytes = bytes.split_to(usize::try_from(len).unwrap_or(0));
        file.write(at, bytes, WriteFlags::empty()).await?;
        at = at.saturating_add(len);
    }
    Ok(())
}
