//! Creating images. If a creation is interrupted, the file is either not recognised as parallels or contains the complete
//! image: an old header in the file is erased first, and the new header is written after everything else has been flushed.

use oxblk_core::Errno;
use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, OptionType};
use oxblk_core::{Edge, Error, Options, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_ring::IoBuf;

use super::header::{HEADER_BYTES, Header, MAX_ENTRIES, SECTOR};

/// Default length of a cluster in bytes.
const CLUSTER: u64 = 1 << 20;
/// A cluster must be smaller than this number of bytes.
const CLUSTER_LIMIT: u64 = 1 << 31;

/// The options of the format itself. `preallocation` is an option of the protocol, because it preallocates the file.
pub(super) static OPTIONS: &[CreateOption] = &[
    CreateOption { name: "size", kind: OptionType::Size, help: "Virtual disk size", default: None },
    CreateOption {
        name: "cluster_size",
        kind: OptionType::Size,
        help: "Parallels image cluster size",
        default: Some("1048576"),
    },
];

/// Creation options that have been checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) size: u64,
    cluster: u64,
    entries: u32,
}

impl Wanted {
    /// Reads the options.
    ///
    /// # Errors
    /// Fails if a value is invalid or not supported. The messages are the same as in QEMU's tools.
    pub(super) fn from_options(mut options: Options) -> Result<Self> {
        let size = options.take_size("size")?.unwrap_or(0);
        // The protocol uses the option when it creates the file. Here the value is only checked.
        if let Some(name) = options.take_str("preallocation")? {
            match Preallocation::parse(&name) {
                Some(Preallocation::Metadata) => {
                    return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
                }
                Some(_) => {}
                None => return Err(Error::invalid(format!("invalid parameter value: {name}"))),
            }
        }
        let cluster = options.take_size("cluster_size")?.unwrap_or(CLUSTER);
        let cluster = cluster.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        let too_big = |text: &'static str| Err(Error::invalid(text).errno(Errno::TOOBIG));
        if cluster >= CLUSTER_LIMIT {
            return too_big("Cluster size is too large");
        }
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        let entries = size.checked_add(cluster).map(|end| (end - 1).checked_div(cluster));
        match entries.flatten().and_then(|entries| u32::try_from(entries).ok()) {
            Some(entries) if entries <= MAX_ENTRIES => Ok(Self { size, cluster, entries }),
            _ => too_big("Image size is too large for this cluster size"),
        }
    }
}

/// Creates an image.
///
/// # Errors
/// Fails if an option is invalid or not supported, or if the target is not a file. Also returns the errors of requests to the
/// image file.
pub(super) async fn create(request: CreateRequest) -> Result<()> {
    let wanted = Wanted::from_options(request.options)?;
    let CreateTarget::File(file) = request.target else {
        return Err(Error::invalid("A parallels image is created in a file"));
    };
    let header = Header::new(wanted.size, wanted.cluster, wanted.entries);
    let written = write_image(&file, &header).await;
    written.map_err(|error| error.prefix("Failed to create Parallels image"))
}

async fn write_image(file: &Edge, header: &Header) -> Result<()> {
    reserve_table(file, header).await?;
    file.flush().await?;
    file.write(0, IoBuf::from(header.encode()), WriteFlags::empty()).await?;
    file.flush().await
}

/// Makes the file end at the offset of the first cluster (a device can be longer), and fills it with zeroes up to this
/// offset. The zeroes are an empty BAT.
async fn reserve_table(file: &Edge, header: &Header) -> Result<()> {
    let limits = file.node().limits();
    let is_zero = limits.has_zero_init && limits.grows && file.size() == 0;
    if file.size() > 0 {
        let len = HEADER_BYTES.min(file.size());
        file.write_zeroes(0, len, ZeroFlags::empty()).await?;
        file.flush().await?;
    }
    if file.size() < header.data_offset || limits.grows {
        file.resize(header.data_offset, Preallocation::Off).await?;
    }
    if is_zero {
        return Ok(());
    }
    file.write_zeroes(0, header.data_offset, ZeroFlags::MAY_UNMAP).await
}
