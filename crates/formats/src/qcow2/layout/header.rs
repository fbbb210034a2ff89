//! The image header ("Header"): parsed with every check that does not need I/O, and encoded.
//!
//! The checks are made in the order in which QEMU makes them, so that an image with several faults gets the same message. Some
//! checks depend on how the image is opened (a corrupt image opened for writing, a missing refcount table). These checks are
//! separate `require_*` methods. The driver calls these methods.

use oxblk_core::{Errno, Error, Result, names};
use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::extension::{Context, text};
use super::head::header_extent;
use super::raw::{MAGIC, RawHeader, V2_LENGTH, V3_LENGTH, V3_MIN_LENGTH};
use super::{Autoclear, Compatible, Extensions, Geometry, Incompatible, features};

/// Maximum length of an L1 table in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Maximum length of the refcount table in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Maximum number of snapshots of an image.
pub const MAX_SNAPSHOTS: u32 = 65_536;

/// Maximum length of the backing file's name, in bytes.
const MAX_BACKING_NAME: u64 = 1023;
/// Bytes of a snapshot table entry without its variable parts.
const SNAPSHOT_ENTRY: u64 = 40;
/// The refcount order of version 2 images. Their refcounts have 16 bits.
const V2_REFCOUNT_ORDER: u32 = 4;

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CryptMethod {
    /// No encryption.
    #[default]
    None,
    /// AES-128 in CBC mode with the password as the key; obsolete.
    Aes,
    /// LUKS, with the LUKS header to which [`Extensions::crypto`] points.
    Luks,
}

impl CryptMethod {
    fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Aes),
            2 => Some(Self::Luks),
            _ => None,
        }
    }

    /// The number of the method in the header.
    pub fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Aes => 1,
            Self::Luks => 2,
        }
    }
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl Compression {
    /// The name in options and in `info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// A header whose values are within the format's limits and consistent with one another, apart from the faults that the
/// `require_*` methods report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width, and whether the image has extended L2 entries and a data file.
    pub geometry: Geometry,
    /// Virtual size in bytes.
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Cluster-aligned byte offset of the active L1 table.
    pub l1_offset: u64,
    /// Entries in the active L1 table, enough for `size` and at most [`MAX_L1_BYTES`].
    pub l1_entries: u32,
    /// Cluster-aligned byte offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters; at most [`MAX_REFCOUNT_TABLE_BYTES`].
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table; see [`Header::require_snapshots`].
    pub snapshot_count: u32,
    /// Byte offset of the snapshot table; see [`Header::require_snapshots`].
    pub snapshots_offset: u64,
    /// Features that must be understood.
    pub incompatible: Incompatible,
    /// Features that may be ignored.
    pub compatible: Compatible,
    /// Autoclear features: a program that writes to the image clears the bits that it does not know.
    pub autoclear: Autoclear,
    /// Length of the header as it was read, in bytes. [`Header::encode`] computes a new length.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, if there is one.
    pub backing_file: Option<String>,
    /// The header extensions.
    pub extensions: Extensions,
    /// Header fields behind the known ones. They are preserved when the header is written.
    pub unknown_fields: Vec<u8>,
}

fn fault<T>(message: impl Into<std::borrow::Cow<'static, str>>) -> Result<T> {
    Err(Error::invalid(message))
}

impl Header {
    /// Reads the header at the start of an image of `file_size` bytes. `head` has as many bytes as [`header_extent`] returns,
    /// or all bytes of a shorter file. The missing bytes of a shorter file count as zeroes.
    ///
    /// # Errors
    /// When the image is not qcow2, violates the format, or uses an unsupported feature; when `head` is too short. The text is
    /// the same as in QEMU's tools.
    pub fn parse(head: &[u8], file_size: u64) -> Result<Self> {
        let raw = RawHeader::from_head(head);
        let geometry = check_identity(&raw)?;
        if (head.len() as u64) < file_size.min(header_extent(head)) {
            return Err(Error::from_errno(Errno::IO).prefix("Could not read qcow2 header"));
        }
        let raw = normalise(raw, geometry)?;
        let first_cluster = Cluster { head, size: geometry.cluster_size() };
        let backing_offset = raw.backing_file_offset.get();
        if backing_offset > geometry.cluster_size() {
            return fault("Invalid backing file offset");
        }
        let length = raw.header_length.get();
        let unknown_fields =
            first_cluster.part(V3_LENGTH.into(), length.saturating_sub(V3_LENGTH).into());
        let compression = check_compression(&raw)?;

        let extension_end =
            if backing_offset == 0 { geometry.cluster_size() } else { backing_offset };
        let extension_area =
            first_cluster.part(length.into(), extension_end.saturating_sub(length.into()));
        check_features(&raw, &extension_area)?;

        let features = Incompatible::from_bits_retain(raw.incompatible_features.get());
        let extended_l2 = features.contains(Incompatible::EXTENDED_L2);
        let geometry = Geometry {
            refcount_order: raw.refcount_order.get(),
            extended_l2,
            data_file: features.contains(Incompatible::DATA_FILE),
            ..geometry
        };
        if extended_l2 && geometry.cluster_bits < Geometry::MIN_EXTENDED_CLUSTER_BITS {
            let size = geometry.subcluster_size();
            return fault(format!("Unsupported subcluster size: {size}"));
        }
        if geometry.refcount_order > Geometry::MAX_REFCOUNT_ORDER {
            return fault("Reference count entry width too large; may not exceed 64 bits");
        }
        check_tables(&raw, geometry)?;
        check_l1(&raw, geometry)?;

        let crypt_method = raw.crypt_method.get();
        let Some(crypt_method) = CryptMethod::from_number(crypt_method) else {
            return fault(format!("Unsupported encryption method {crypt_method}"));
        };
        let autoclear = Autoclear::from_bits_retain(raw.autoclear_features.get());
        let context = Context { geometry, autoclear, luks: crypt_method == CryptMethod::Luks };
        let extensions = Extensions::parse(&extension_area, &context)?;
        if context.luks && extensions.crypto.is_none() {
            return fault("Missing CRYPTO header for crypt method 2");
        }
        let backing_file = read_backing_name(&raw, &first_cluster)?;
        let header = Self {
            version: raw.version.get(),
            geometry,
            size: raw.size.get(),
            crypt_method,
            l1_offset: raw.l1_table_offset.get(),
            l1_entries: raw.l1_size.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshot_count: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible: Incompatible::from_bits_retain(raw.incompatible_features.get()),
            compatible: Compatible::from_bits_retain(raw.compatible_features.get()),
            autoclear,
            header_length: length,
            compression,
            backing_file,
            extensions,
            unknown_fields,
        };
        Ok(header)
    }

    /// Refuses an image without a refcount table. Only `check` may open such an image.
    ///
    /// # Errors
    /// When the image has no refcount table. The text is the same as in QEMU's tools.
    pub fn require_refcounts(&self) -> Result<()> {
        if self.refcount_table_clusters == 0 {
            return fault("Image does not contain a reference count table");
        }
        Ok(())
    }

    /// Refuses an image with a broken bitmaps extension. Only `check` may open such an image.
    ///
    /// # Errors
    /// When the bitmaps extension is broken. The text is the same as in QEMU's tools.
    pub fn require_bitmaps(&self) -> Result<()> {
        match &self.extensions.bitmaps_fault {
            Some(text) => fault(text.clone()),
            None => Ok(()),
        }
    }

    /// Refuses an image whose snapshot table has an invalid offset or size. Such an image can be opened for a check, and
    /// read-only without its snapshots.
    ///
    /// # Errors
    /// When the offset or the size of the snapshot table is invalid. The text is the same as in QEMU's tools.
    pub fn require_snapshots(&self) -> Result<()> {
        check_table(
            self.geometry,
            self.snapshots_offset,
            self.snapshot_count.into(),
            SNAPSHOT_ENTRY,
            SNAPSHOT_ENTRY * u64::from(MAX_SNAPSHOTS),
            "Snapshot table",
        )
    }

    /// Refuses to write to an image that is marked corrupt.
    ///
    /// # Errors
    /// When the image is marked corrupt. The text is the same as in QEMU's tools.
    pub fn require_writable(&self) -> Result<()> {
        if self.incompatible.contains(Incompatible::CORRUPT) {
            return Err(Error::new(
                oxblk_core::ErrorKind::Denied,
                "qcow2: Image is corrupt; cannot be opened read/write",
            )
            .errno(Errno::ACCES));
        }
        Ok(())
    }

    /// Encodes the header, its extensions and the backing file's name, as they are written at offset 0. The result is not
    /// longer than a cluster.
    ///
    /// # Errors
    /// [`oxblk_core::ErrorKind::NoSpace`] when the result does not fit into a cluster,
    /// [`oxblk_core::ErrorKind::Invalid`] when the backing file's name is longer than 1023 bytes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = self.fixed_part(0);
        self.extensions.encode(&mut out, self.version, self.geometry);
        if let Some(name) = &self.backing_file {
            let name = names::to_bytes(name);
            if name.len() as u64 > MAX_BACKING_NAME {
                return fault("Backing file name too long");
            }
            let fixed = self.fixed_part(out.len() as u64);
            out.extend(name.iter());
            if let Some(start) = out.get_mut(..fixed.len()) {
                start.copy_from_slice(&fixed);
            }
        }
        if out.len() as u64 > self.geometry.cluster_size() {
            return Err(Error::from_errno(Errno::NOSPC));
        }
        Ok(out)
    }

    /// Encodes the header in its shortest form: with all extensions apart from the feature name table. The backing file's name
    /// is not included; the header refers to the name at `name_offset`.
    pub fn encode_short(&self, name_offset: u64) -> Vec<u8> {
        let mut out = self.fixed_part(name_offset);
        self.extensions.encode_without_names(&mut out);
        out
    }

    /// Encodes the header's known and unknown fields. `name_offset` is the offset of the backing file's name, or 0 for a header
    /// that refers to no name.
    fn fixed_part(&self, name_offset: u64) -> Vec<u8> {
        let name = self.backing_file.as_ref().filter(|_| name_offset > 0);
        let len =
            name.map_or(0, |name| u32::try_from(names::to_bytes(name).len()).unwrap_or(u32::MAX));
        let raw = self.raw(if name.is_some() { name_offset } else { 0 }, len);
        let mut out = raw.as_bytes().to_vec();
        if self.version >= 3 {
            out.extend(&self.unknown_fields);
        } else {
            out.truncate(V2_LENGTH as usize);
        }
        out
    }

    fn raw(&self, backing_offset: u64, backing_len: u32) -> RawHeader {
        let unknown = u32::try_from(self.unknown_fields.len()).unwrap_or(u32::MAX);
        RawHeader {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: backing_offset.into(),
            backing_file_size: backing_len.into(),
            cluster_bits: self.geometry.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.number().into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible.bits().into(),
            compatible_features: self.compatible.bits().into(),
            autoclear_features: self.autoclear.bits().into(),
            refcount_order: self.geometry.refcount_order.into(),
            header_length: V3_LENGTH.saturating_add(unknown).into(),
            compression_type: match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            },
            padding: [0; 7],
        }
    }
}

/// The first cluster. If the file is shorter, the missing bytes count as zeroes.
struct Cluster<'a> {
    head: &'a [u8],
    size: u64,
}

impl Cluster<'_> {
    /// The bytes `offset..offset + len`, or fewer if the cluster ends before.
    fn part(&self, offset: u64, len: u64) -> Vec<u8> {
        let start = offset.min(self.size);
        let len = len.min(self.size - start);
        let to_usize = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let (start, len) = (to_usize(start), to_usize(len));
        let there = self.head.get(start..).unwrap_or_default();
        let mut part = there.get(..len).unwrap_or(there).to_vec();
        part.resize(len, 0);
        part
    }
}

/// Checks the magic number, the version and the cluster size.
fn check_identity(raw: &RawHeader) -> Result<Geometry> {
    if raw.magic.get() != MAGIC {
        return fault("Image is not in qcow2 format");
    }
    let version = raw.version.get();
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported(format!("Unsupported qcow2 version {version}")));
    }
    let cluster_bits = raw.cluster_bits.get();
    if !(Geometry::MIN_CLUSTER_BITS..=Geometry::MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return fault(format!("Unsupported cluster size: 2^{cluster_bits}"));
    }
    Ok(Geometry {
        cluster_bits,
        refcount_order: V2_REFCOUNT_ORDER,
        extended_l2: false,
        data_file: false,
    })
}

/// Checks the header's length, and sets the fields that the header does not have to their default values.
fn normalise(mut raw: RawHeader, geometry: Geometry) -> Result<RawHeader> {
    if raw.version.get() == 2 {
        raw.incompatible_features = 0.into();
        raw.compatible_features = 0.into();
        raw.autoclear_features = 0.into();
        raw.refcount_order = V2_REFCOUNT_ORDER.into();
        raw.header_length = V2_LENGTH.into();
    } else if raw.header_length.get() < V3_MIN_LENGTH {
        return fault("qcow2 header too short");
    }
    if u64::from(raw.header_length.get()) > geometry.cluster_size() {
        return fault("qcow2 header exceeds cluster size");
    }
    if raw.header_length.get() <= V3_MIN_LENGTH {
        raw.compression_type = 0;
    }
    Ok(raw)
}

fn check_compression(raw: &RawHeader) -> Result<Compression> {
    let flagged = Incompatible::from_bits_retain(raw.incompatible_features.get())
        .contains(Incompatible::COMPRESSION);
    match (raw.compression_type, flagged) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => fault("qcow2: Compression type incompatible feature bit must not be set"),
        (1, false) => fault("qcow2: Compression type incompatible feature bit must be set"),
        (other, _) => Err(Error::unsupported(format!("qcow2: unknown compression type: {other}"))),
    }
}

fn check_features(raw: &RawHeader, extension_area: &[u8]) -> Result<()> {
    let unknown = Incompatible::from_bits_retain(raw.incompatible_features.get()).unknown();
    if unknown.is_empty() {
        return Ok(());
    }
    let names = Extensions::names_only(extension_area);
    let features = features::describe_unknown(unknown, &names);
    Err(Error::unsupported(format!("Unsupported qcow2 feature(s): {features}")))
}

/// Checks a table of `entries` entries at `offset`. The table must be at most `max_bytes` long and aligned, and must end below
/// 2^63.
fn check_table(
    geometry: Geometry,
    offset: u64,
    entries: u64,
    entry_bytes: u64,
    max_bytes: u64,
    name: &str,
) -> Result<()> {
    let bytes = entries.saturating_mul(entry_bytes);
    if bytes > max_bytes {
        return Err(Error::invalid(format!("{name} too large")).errno(Errno::FBIG));
    }
    let highest = i64::MAX.unsigned_abs() - bytes;
    if offset > highest || !geometry.is_aligned(offset) {
        return fault(format!("{name} offset invalid"));
    }
    Ok(())
}

fn check_tables(raw: &RawHeader, geometry: Geometry) -> Result<()> {
    check_table(
        geometry,
        raw.refcount_table_offset.get(),
        raw.refcount_table_clusters.get().into(),
        geometry.cluster_size(),
        MAX_REFCOUNT_TABLE_BYTES,
        "Reference count table",
    )?;
    check_table(
        geometry,
        raw.l1_table_offset.get(),
        raw.l1_size.get().into(),
        8,
        MAX_L1_BYTES,
        "Active L1 table",
    )
}

/// Checks that the L1 table maps the complete virtual disk.
fn check_l1(raw: &RawHeader, geometry: Geometry) -> Result<()> {
    let Some(needed) = geometry.l1_entries_for(raw.size.get()) else {
        return Err(Error::invalid("Image is too big").errno(Errno::FBIG));
    };
    if u64::from(raw.l1_size.get()) < needed {
        return fault("L1 table is too small");
    }
    Ok(())
}

fn read_backing_name(raw: &RawHeader, first_cluster: &Cluster<'_>) -> Result<Option<String>> {
    let offset = raw.backing_file_offset.get();
    if offset == 0 {
        return Ok(None);
    }
    let len = u64::from(raw.backing_file_size.get());
    if len > MAX_BACKING_NAME.min(first_cluster.size.saturating_sub(offset)) {
        return fault("Backing file name too long");
    }
    let name = text(&first_cluster.part(offset, len));
    Ok((!name.is_empty()).then_some(name))
}

/// Whether `head`, the start of an image, has the magic number of qcow2 and a version of at least 2.
pub fn looks_like_qcow2(head: &[u8]) -> bool {
    let field = |offset: usize| {
        let bytes = head.get(offset..)?;
        U32::read_from_prefix(bytes).ok().map(|(value, _)| value.get())
    };
    field(0) == Some(MAGIC) && field(4).is_some_and(|version| version >= 2)
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
