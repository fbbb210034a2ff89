//! Creating images. If a creation is interrupted, the file is either not recognised as QED or contains the complete image:
//! an old header in the file is erased first, and the new header is written after everything else has been flushed.

use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, OptionType};
use oxblk_core::{Edge, Error, Options, Preallocation, Result, WriteFlags, ZeroFlags};
use oxblk_ring::IoBuf;

use super::header::{BackingName, BadGeometry, Geometry, HEADER_BYTES, Header, SECTOR, check_name};

/// Default size of a cluster in bytes.
const CLUSTER: u64 = 64 << 10;
/// Default size of a table in clusters.
const TABLE_CLUSTERS: u64 = 4;

const fn option(
    name: &'static str,
    kind: OptionType,
    help: &'static str,
    default: Option<&'static str>,
) -> CreateOption {
    CreateOption { name, kind, help, default }
}

/// The options of the format itself. `preallocation` is an option of the protocol, because it preallocates the file.
pub(super) static OPTIONS: &[CreateOption] = &[
    option("size", OptionType::Size, "Virtual disk size", None),
    option("backing_file", OptionType::String, "File name of a base image", None),
    option("backing_fmt", OptionType::String, "Image format of the base image", None),
    option("cluster_size", OptionType::Size, "Cluster size (in bytes)", Some("65536")),
    option("table_size", OptionType::Size, "L1/L2 table size (in clusters)", None),
];

/// Creation options that have been checked.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) size: u64,
    pub(super) geometry: Geometry,
    backing_file: Option<String>,
    backing_is_raw: bool,
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
        let table = options.take_size("table_size")?.unwrap_or(TABLE_CLUSTERS);
        let backing_file = options.take_str("backing_file")?.filter(|name| !name.is_empty());
        let backing_is_raw = options.take_str("backing_fmt")?.is_some_and(|name| name == "raw");
        let geometry = Geometry::new(cluster, table).map_err(|bad| {
            Error::invalid(match bad {
                BadGeometry::Cluster => {
                    "QED cluster size must be within range [4096, 67108864] and power of 2"
                }
                BadGeometry::Table => "QED table size must be within range [1, 16] and power of 2",
            })
        })?;
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        if size > geometry.max_size() {
            return Err(Error::invalid(format!(
                "QED image size must be a non-zero multiple of cluster size and less than {} bytes",
                geometry.max_size()
            )));
        }
        if let Some(name) = &backing_file {
            check_name(name)?;
        }
        Ok(Self { size, geometry, backing_file, backing_is_raw })
    }

    /// The header of the image, and the name of the backing file. The name is stored after the fixed part of the header.
    ///
    /// # Errors
    /// Fails if the name of the backing file does not fit into the header cluster.
    fn header(&self) -> Result<(Header, Vec<u8>)> {
        let mut header = Header {
            geometry: self.geometry,
            header_clusters: 1,
            need_check: false,
            compat_features: 0,
            autoclear_features: 0,
            l1_offset: self.geometry.cluster(),
            size: self.size,
            backing: None,
        };
        let Some(name) = &self.backing_file else { return Ok((header, Vec::new())) };
        let name = oxblk_core::names::to_bytes(name).into_owned();
        let offset = u32::try_from(HEADER_BYTES).unwrap_or(0);
        let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
        if u64::from(offset).saturating_add(len.into()) > header.first_cluster() {
            return Err(Error::invalid("Backing file name too long"));
        }
        header.backing = Some(BackingName { offset, len, is_raw: self.backing_is_raw });
        Ok((header, name))
    }
}

/// Bytes of a new image without data.
pub(super) fn empty_bytes(geometry: Geometry) -> u64 {
    geometry.cluster().saturating_add(geometry.table_bytes())
}

/// Checks the options of [`create`].
///
/// # Errors
/// Fails if an option is invalid or not supported.
pub(super) fn check(options: Options) -> Result<()> {
    Wanted::from_options(options)?.header().map(drop)
}

/// Creates an image.
///
/// # Errors
/// Fails if an option is invalid or not supported, or if the target is not a file. Also returns the errors of requests to the
/// image file.
pub(super) async fn create(request: CreateRequest) -> Result<()> {
    let wanted = Wanted::from_options(request.options)?;
    let CreateTarget::File(file) = request.target else {
        return Err(Error::invalid("A QED image is created in a file"));
    };
    let (header, name) = wanted.header()?;
    reserve_tables(&file, empty_bytes(wanted.geometry)).await?;
    if !name.is_empty() {
        file.write(HEADER_BYTES, IoBuf::from(name), WriteFlags::empty()).await?;
    }
    file.flush().await?;
    file.write(0, IoBuf::from(header.encode()), WriteFlags::empty()).await?;
    file.flush().await
}

/// Makes the file `len` bytes long (a device can be longer), and fills these bytes with zeroes.
async fn reserve_tables(file: &Edge, len: u64) -> Result<()> {
    let limits = file.node().limits();
    let is_zero = limits.has_zero_init && limits.grows && file.size() == 0;
    if file.size() > 0 {
        file.write_zeroes(0, HEADER_BYTES.min(file.size()), ZeroFlags::empty()).await?;
        file.flush().await?;
    }
    if file.size() < len || limits.grows {
        file.resize(len, Preallocation::Off).await?;
    }
    if is_zero {
        return Ok(());
    }
    file.write_zeroes(0, len, ZeroFlags::MAY_UNMAP).await
}
