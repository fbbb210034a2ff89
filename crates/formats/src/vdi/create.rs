//! Creating images. If a creation is interrupted, the file is either not recognised as vdi or contains the complete image:
//! an old header in the file is erased first, and the new header is written after everything else has been flushed.

use std::ops::Range;

use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, OptionType};
use oxblk_core::{Edge, Error, Options, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_crypto::random;
use oxblk_ring::IoBuf;

use super::entry::Entry;
use super::header::{BLOCK, HEADER_BYTES, Header, MAX_SIZE, SECTOR, too_large};
use crate::blocks::ENTRY_BYTES;

/// Maximum number of entries of the map in one write.
const ENTRIES_AT_ONCE: u32 = 1 << 18;

/// The options of the format itself. `preallocation` is an option of the protocol, because it preallocates the file.
pub(super) static OPTIONS: &[CreateOption] = &[
    CreateOption { name: "size", kind: OptionType::Size, help: "Virtual disk size", default: None },
    CreateOption {
        name: "static",
        kind: OptionType::Bool,
        help: "VDI static (pre-allocated) image",
        default: Some("off"),
    },
];

/// Creation options that have been checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) size: u64,
    pub(super) blocks: u32,
    pub(super) is_static: bool,
    preallocation: Preallocation,
}

impl Wanted {
    /// Reads the options. `size`, if given, replaces the `size` option.
    ///
    /// # Errors
    /// Fails if a value is invalid or not supported. The messages are the same as in QEMU's tools.
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
        let is_static = options.take_bool("static")?.unwrap_or(false);
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        if size > MAX_SIZE {
            return Err(too_large(size));
        }
        let blocks = u32::try_from(size.div_ceil(BLOCK)).map_err(|_| too_large(size))?;
        Ok(Self { size, blocks, is_static, preallocation })
    }
}

/// A random (version 4) UUID in its stored form: the first three parts are little-endian.
fn uuid() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    random::fill(&mut bytes).map_err(|error| Error::unsupported(error.to_string()))?;
    let [_, _, _, _, _, _, _, version, variant, ..] = &mut bytes;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    Ok(bytes)
}

/// Creates an image.
///
/// # Errors
/// Fails if an option is invalid or not supported, or if the target is not a file. Also returns the errors of requests to the
/// image file.
pub(super) async fn create(request: CreateRequest) -> Result<()> {
    let wanted = Wanted::from_options(request.options, None)?;
    let CreateTarget::File(file) = request.target else {
        return Err(Error::invalid("A vdi image is created in a file"));
    };
    let uuids = [uuid()?, uuid()?];
    let header = Header::new(wanted.size, wanted.blocks, wanted.is_static, uuids);
    if file.size() > 0 {
        let len = HEADER_BYTES.min(file.size());
        file.write_zeroes(0, len, ZeroFlags::empty()).await?;
        file.flush().await?;
    }
    if wanted.is_static {
        allocate(&file, &header, wanted.preallocation).await?;
    }
    write_map(&file, &header).await?;
    file.flush().await?;
    let written = file.write(0, IoBuf::from(header.encode()), WriteFlags::empty()).await;
    written.map_err(|error| error.prefix("Error writing header"))?;
    file.flush().await
}

/// Extends the file so that it contains all blocks, and makes the blocks read as zeroes.
async fn allocate(file: &Edge, header: &Header, preallocation: Preallocation) -> Result<()> {
    let limits = file.node().limits();
    let is_zero = limits.has_zero_init && limits.grows && file.size() == 0;
    let end = header.block_offset(header.blocks);
    file.resize(end, preallocation).await?;
    let len = end.saturating_sub(header.data_offset);
    if is_zero || len == 0 {
        return Ok(());
    }
    file.write_zeroes(header.data_offset, len, ZeroFlags::MAY_UNMAP).await
}

/// Writes the block map, padded to a multiple of the sector size.
async fn write_map(file: &Edge, header: &Header) -> Result<()> {
    // The map of a dynamic image consists of equal entries, so the writes can share one buffer.
    let absent = IoBuf::from(encode_entries(0..ENTRIES_AT_ONCE, |_| Entry::Zero));
    let mut first = 0;
    while first < header.blocks {
        let end = header.blocks.min(first.saturating_add(ENTRIES_AT_ONCE));
        let bytes = if header.allocated > 0 {
            IoBuf::from(encode_entries(first..end, Entry::At))
        } else if end - first == ENTRIES_AT_ONCE {
            absent.clone()
        } else {
            IoBuf::from(encode_entries(first..end, |_| Entry::Zero))
        };
        let offset = HEADER_BYTES.saturating_add(u64::from(first).saturating_mul(ENTRY_BYTES));
        let written = file.write(offset, bytes, WriteFlags::empty()).await;
        written.map_err(|error| error.prefix("Error writing bmap"))?;
        first = end;
    }
    Ok(())
}

/// Encodes the entries of a range, and pads them with zeroes to a multiple of the sector size.
fn encode_entries(range: Range<u32>, entry: impl Fn(u32) -> Entry) -> Vec<u8> {
    let mut bytes: Vec<u8> = range.flat_map(|index| entry(index).number().to_le_bytes()).collect();
    let sector = usize::try_from(SECTOR).unwrap_or(1);
    bytes.resize(bytes.len().next_multiple_of(sector), 0);
    bytes
}
