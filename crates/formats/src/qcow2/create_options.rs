//! The options of `create`, and checking them.
//!
//! A wrong option fails with the message of QEMU's tools. If several options are wrong, the reported error is the same as in
//! QEMU's tools.

use oxblk_core::create::{CreateOption, OptionType};
use oxblk_core::{Error, Options, Preallocation, Result, check_length};

use super::encryption::create::Wanted as Encryption;
use super::layout::{
    Autoclear, Compatible, Compression, Extensions, Geometry, Header, Incompatible,
};
use super::plan::Plan;

/// Virtual sizes are multiples of this many bytes.
const SECTOR: u64 = 512;

/// A creation option without a default.
pub(super) const fn option(
    name: &'static str,
    kind: OptionType,
    help: &'static str,
) -> CreateOption {
    CreateOption { name, kind, help, default: None }
}

const fn default(option: CreateOption, value: &'static str) -> CreateOption {
    CreateOption { default: Some(value), ..option }
}

/// The options of `create`, in the order in which `img create` prints the options that are set.
pub static CREATE_OPTIONS: &[CreateOption] = &[
    option(
        "encryption",
        OptionType::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    option(
        "encrypt.format",
        OptionType::String,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    option(
        "encrypt.key-secret",
        OptionType::String,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    option("encrypt.cipher-alg", OptionType::String, "Name of encryption cipher algorithm"),
    option("encrypt.cipher-mode", OptionType::String, "Name of encryption cipher mode"),
    option("encrypt.ivgen-alg", OptionType::String, "Name of IV generator algorithm"),
    option("encrypt.ivgen-hash-alg", OptionType::String, "Name of IV generator hash algorithm"),
    option("encrypt.hash-alg", OptionType::String, "Name of encryption hash algorithm"),
    option("encrypt.iter-time", OptionType::Number, "Time to spend in PBKDF in milliseconds"),
    default(option("cluster_size", OptionType::Size, "qcow2 cluster size"), "65536"),
    default(option("extended_l2", OptionType::Bool, "Extended L2 tables"), "off"),
    option(
        "preallocation",
        OptionType::String,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    default(
        option(
            "compression_type",
            OptionType::String,
            "Compression method used for image cluster compression",
        ),
        "zlib",
    ),
    option("size", OptionType::Size, "Virtual disk size"),
    option("compat", OptionType::String, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    option("backing_file", OptionType::String, "File name of a base image"),
    option("backing_fmt", OptionType::String, "Image format of the base image"),
    option("data_file", OptionType::String, "File name of an external data file"),
    option(
        "data_file_raw",
        OptionType::Bool,
        "The external data file must stay valid as a raw image",
    ),
    default(option("lazy_refcounts", OptionType::Bool, "Postpone refcount updates"), "off"),
    default(
        option("refcount_bits", OptionType::Number, "Width of a reference count entry in bits"),
        "16",
    ),
];

/// Checked creation options.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Virtual size in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width, and whether the image has extended L2 entries and a data file.
    pub geometry: Geometry,
    /// Lazy refcounts: refcount updates are postponed.
    pub lazy_refcounts: bool,
    /// The preallocation mode. With `data_file_raw`, this is never `Off`.
    pub preallocation: Preallocation,
    /// The compression type.
    pub compression: Compression,
    /// Encryption of guest data.
    pub encryption: Encryption,
    /// Name of the backing file, as the header stores it.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the data file, as the header stores it.
    pub data_file: Option<String>,
    /// The data file must stay valid as a raw image (`data_file_raw`).
    pub data_file_raw: bool,
}

pub(super) fn rejected(parameter: &str, value: &str) -> Error {
    Error::invalid(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

/// The qcow2 version for a value of the option `compat`. The default is 3.
pub(super) fn version(compat: Option<&str>) -> Result<u32> {
    match compat {
        None | Some("1.1" | "v3") => Ok(3),
        Some("0.10" | "v2") => Ok(2),
        Some(other) => Err(rejected("version", other)),
    }
}

impl Wanted {
    /// Reads the options of `create`. `external`: the image gets a data file even if the option `data_file` is not set.
    ///
    /// # Errors
    /// When an option is wrong or contradicts another option. The message is the same as in QEMU's tools, also if several
    /// options are wrong.
    pub fn from_options(mut options: Options, external: bool) -> Result<Self> {
        let version = version(options.take_str("compat")?.as_deref())?;
        let encryption = Encryption::take(&mut options)?;
        let preallocation = match options.take_str("preallocation")? {
            None => Preallocation::Off,
            Some(name) => {
                Preallocation::parse(&name).ok_or_else(|| rejected("preallocation", &name))?
            }
        };
        let refcount_bits = options.take_signed("refcount_bits", "refcount-bits")?;
        let compression = match options.take_str("compression_type")?.as_deref() {
            None | Some("zlib") => Compression::Zlib,
            Some("zstd") => Compression::Zstd,
            Some(other) => return Err(rejected("compression-type", other)),
        };
        let extended_l2 = options.take_bool("extended_l2")?.unwrap_or(false);
        if version < 3 && extended_l2 {
            return Err(Error::invalid(
                "Extended L2 entries are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ));
        }
        let cluster_bits = cluster_bits(options.take_size("cluster_size")?, extended_l2)?;
        let size = options.take_size("size")?.unwrap_or(0);
        let named = options.take_str("data_file")?;
        let data_file = named.is_some() || external;
        let data_file_raw = options.take_bool("data_file_raw")?.unwrap_or(false);
        let mut wanted = Self {
            size: size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX),
            version,
            geometry: Geometry { cluster_bits, refcount_order: 4, extended_l2, data_file },
            lazy_refcounts: options.take_bool("lazy_refcounts")?.unwrap_or(false),
            preallocation,
            compression,
            encryption,
            backing_file: options.take_str("backing_file")?.filter(|name| !name.is_empty()),
            backing_format: options.take_str("backing_fmt")?,
            data_file: named,
            data_file_raw,
        };
        wanted.check_backing()?;
        // QEMU's tools notice the lowest number last, when they open the new image.
        let is_lowest = refcount_bits == Some(i64::MIN);
        if !is_lowest {
            // Other negative numbers count as 0, which is refused.
            let bits = refcount_bits.map(|bits| u64::try_from(bits).unwrap_or(0));
            wanted.geometry.refcount_order = refcount_order(bits)?;
        }
        wanted.check(is_lowest)?;
        if is_lowest {
            let text = "Reference count entry width too large; may not exceed 64 bits";
            return Err(Error::invalid(text));
        }
        if data_file_raw && preallocation == Preallocation::Off {
            // Other programs may write to a raw data file and do not change the L2 tables, so all clusters are mapped from the
            // beginning.
            wanted.preallocation = Preallocation::Metadata;
        }
        check_length(wanted.size).map_err(|error| error.prefix("Could not resize image"))?;
        Ok(wanted)
    }

    /// Refuses a backing format without a backing file, preallocation with a backing file, and lazy refcounts in version 2.
    /// Preallocation with a backing file is accepted if `extended_l2` is on.
    fn check_backing(&self) -> Result<()> {
        let fault = |text: &'static str| Err(Error::invalid(text));
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return fault("Backing format cannot be used without backing file");
        }
        let preallocated = self.preallocation != Preallocation::Off;
        if preallocated && self.backing_file.is_some() && !self.geometry.extended_l2 {
            return fault(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        if self.version < 3 && self.lazy_refcounts {
            return fault(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        Ok(())
    }

    /// Refuses the combinations of options that [`Self::check_backing`] does not check.
    fn check(&self, is_refcount_too_wide: bool) -> Result<()> {
        let fault = |text: &'static str| Err(Error::invalid(text));
        let has_other_width = self.geometry.refcount_order != 4 || is_refcount_too_wide;
        if self.version < 3 && has_other_width {
            return fault(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.data_file_raw && !self.geometry.data_file {
            return fault("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return fault("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.version < 3 && self.geometry.data_file {
            return fault(
                "External data files are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.version < 3 && self.compression != Compression::Zlib {
            return fault(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        Ok(())
    }

    pub(super) fn plan(&self) -> Result<Plan> {
        Plan::new(self.geometry, self.size, self.preallocation, self.encryption.header_len())
    }

    /// The header of an image with the layout `plan`.
    pub(super) fn header(&self, plan: &Plan) -> Header {
        let mut incompatible = Incompatible::empty();
        incompatible.set(Incompatible::COMPRESSION, self.compression != Compression::Zlib);
        incompatible.set(Incompatible::DATA_FILE, self.geometry.data_file);
        incompatible.set(Incompatible::EXTENDED_L2, self.geometry.extended_l2);
        let mut compatible = Compatible::empty();
        compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        let mut autoclear = Autoclear::empty();
        autoclear.set(Autoclear::RAW_DATA_FILE, self.data_file_raw);
        Header {
            version: self.version,
            geometry: self.geometry,
            size: self.size,
            crypt_method: self.encryption.method(),
            l1_offset: if plan.l1_entries == 0 { 0 } else { plan.l1_offset },
            l1_entries: plan.l1_entries,
            refcount_table_offset: self.geometry.cluster_size(),
            refcount_table_clusters: plan.table_clusters,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible,
            compatible,
            autoclear,
            header_length: 0,
            compression: self.compression,
            backing_file: self.backing_file.clone(),
            extensions: Extensions {
                backing_format: self.backing_format.clone(),
                crypto: plan.crypto,
                data_file: self.data_file.clone(),
                ..Extensions::default()
            },
            unknown_fields: Vec::new(),
        }
    }
}

pub(super) fn cluster_bits(size: Option<u64>, extended_l2: bool) -> Result<u32> {
    let size = size.unwrap_or(65_536);
    let bits = size.trailing_zeros();
    let fits = (Geometry::MIN_CLUSTER_BITS..=Geometry::MAX_CLUSTER_BITS).contains(&bits);
    if !size.is_power_of_two() || !fits {
        return Err(Error::invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    if extended_l2 && bits < Geometry::MIN_EXTENDED_CLUSTER_BITS {
        return Err(Error::invalid(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
            1_u32 << Geometry::MIN_EXTENDED_CLUSTER_BITS
        )));
    }
    Ok(bits)
}

pub(super) fn refcount_order(bits: Option<u64>) -> Result<u32> {
    let bits = bits.unwrap_or(16);
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    Ok(bits.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(changes: &[(&str, &str)]) -> Result<Wanted> {
        let mut options = Options::new();
        options.insert("size", 1 << 30);
        for (key, value) in changes {
            options.insert(key, *value);
        }
        Wanted::from_options(options, false)
    }

    #[test]
    fn wrong_options_fail_with_the_messages_of_qemus_tools() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (
                &[("cluster_size", "300")],
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                &[("cluster_size", "4M")],
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (&[("compat", "0.9")], "Parameter 'version' does not accept value '0.9'"),
            (
                &[("refcount_bits", "-9223372036854775808")],
                "Reference count entry width too large; may not exceed 64 bits",
            ),
            (
                &[("refcount_bits", "-1")],
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                &[("refcount_bits", "3")],
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                &[("refcount_bits", "-1")],
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                &[("refcount_bits", "-9223372036854775809")],
                "Parameter 'refcount-bits' expects integer",
            ),
            (
                &[("compression_type", "lzo")],
                "Parameter 'compression-type' does not accept value 'lzo'",
            ),
            (
                &[("preallocation", "some")],
                "Parameter 'preallocation' does not accept value 'some'",
            ),
            (&[("data_file_raw", "on")], "data-file-raw requires data-file"),
            (
                &[("compat", "v2"), ("lazy_refcounts", "on")],
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ),
            (
                &[("encryption", "on"), ("encrypt.format", "luks")],
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
            ),
            (&[("encrypt.key-secret", "s")], "Parameter 'encrypt.format' is missing"),
            (&[("encrypt.format", "x")], "Parameter 'format' does not accept value 'x'"),
            (
                &[("encrypt.format", "aes"), ("encrypt.cipher-alg", "aes-128")],
                "Parameter 'encrypt.cipher-alg' is unexpected",
            ),
            (
                &[("encrypt.format", "luks"), ("encrypt.cipher-mode", "x")],
                "Parameter 'cipher-mode' does not accept value 'x'",
            ),
        ];
        for (options, message) in cases {
            assert_eq!(wanted(options).unwrap_err().to_string(), *message);
        }
    }

    #[test]
    fn several_wrong_options_fail_with_the_error_that_qemu_reports() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (
                &[("backing_fmt", "raw"), ("refcount_bits", "3")],
                "Backing format cannot be used without backing file",
            ),
            (
                &[("data_file_raw", "on"), ("lazy_refcounts", "on"), ("compat", "v2")],
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ),
            (
                &[("data_file_raw", "on"), ("refcount_bits", "8"), ("compat", "v2")],
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            ),
            (
                &[("encrypt.format", "x"), ("preallocation", "x")],
                "Parameter 'format' does not accept value 'x'",
            ),
            (
                &[("refcount_bits", "9223372036854775808"), ("cluster_size", "3")],
                "Parameter 'refcount-bits' expects integer",
            ),
        ];
        for (options, message) in cases {
            assert_eq!(wanted(options).unwrap_err().to_string(), *message);
        }
    }
}
