//! Header extensions ("Header extensions" and the sections after it).
//!
//! The extensions follow the header in the first cluster. They end at an end marker, at the backing file's name, or at the end
//! of the cluster. The length of each extension is checked against this area, so the parsed data fits in a cluster.

use oxblk_core::{Error, Result, names};
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{Immutable, KnownLayout, Unaligned};

use super::features::NAMES;
use super::{Autoclear, Geometry, MAX_BITMAP_DIRECTORY, MAX_BITMAPS};

pub(super) const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of an entry of the feature name table.
const FEATURE_ENTRY: usize = 48;
/// Bytes of the name in an entry of the feature name table.
const FEATURE_NAME: usize = 46;
/// Up to this cluster size, the feature name table is not written, because it would fill a large part of the cluster.
const NO_NAMES_UP_TO: u64 = 4096;
/// Maximum length of the backing format's name, in bytes.
const MAX_FORMAT_NAME: usize = 15;

/// The header field that contains a feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// A program that does not know the feature must not open the image.
    Incompatible,
    /// A program that does not know the feature may ignore it.
    Compatible,
    /// A program that does not know the feature must clear the bit when it writes.
    Autoclear,
    /// A kind that this implementation does not know.
    Other(u8),
}

impl FeatureKind {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
            Self::Other(byte) => byte,
        }
    }
}

/// An entry of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// The header field that contains the bit.
    pub kind: FeatureKind,
    /// Bit number, 0 to 63.
    pub bit: u8,
    /// Name for messages.
    pub name: String,
}

/// The bitmaps extension ("Bitmaps extension").
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBitmaps {
    count: U32,
    reserved: U32,
    directory_size: U64,
    directory_offset: U64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawBitmaps>() == 24);
    assert!(offset_of!(RawBitmaps, directory_size) == 8);
    assert!(offset_of!(RawBitmaps, directory_offset) == 16);
};

/// The place of the bitmap directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, 1 to 65,535.
    pub count: u32,
    /// Bytes in the directory, at most 64 MiB.
    pub directory_size: u64,
    /// Cluster-aligned byte offset of the directory.
    pub directory_offset: u64,
}

/// The full disk encryption header pointer ("Full disk encryption header pointer").
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCrypto {
    offset: U64,
    length: U64,
}

const _: () = assert!(size_of::<RawCrypto>() == 16);

/// The place of the LUKS header and its key material.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Cluster-aligned byte offset.
    pub offset: u64,
    /// Length in bytes, including the key material.
    pub length: u64,
}

impl BitmapsExtension {
    /// The extension's data.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(24);
        data.extend(self.count.to_be_bytes());
        data.extend(0_u32.to_be_bytes());
        data.extend(self.directory_size.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }
}

/// The header extensions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// The feature name table of the image.
    pub feature_names: Vec<FeatureName>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// The bitmap directory. `None` if the image has no bitmaps extension, if the autoclear bit says that the extension is not
    /// consistent, or if the extension has a fault.
    pub bitmaps: Option<BitmapsExtension>,
    /// The image has a bitmaps extension, but the autoclear bit says that the extension is not consistent.
    pub bitmaps_outdated: bool,
    /// The fault of the bitmaps extension, if it has one. `bitmaps` is then `None`.
    pub bitmaps_fault: Option<String>,
    /// The place of the LUKS header.
    pub crypto: Option<CryptoHeader>,
    /// Unknown extensions: magic number and data.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// Header fields on which the parsing of extensions depends.
pub(super) struct Context {
    pub(super) geometry: Geometry,
    pub(super) autoclear: Autoclear,
    pub(super) luks: bool,
}

impl Extensions {
    /// Parses the extensions in `area`. The area begins behind the header and ends at the backing file's name or at the end of
    /// the cluster.
    pub(super) fn parse(area: &[u8], context: &Context) -> Result<Self> {
        let mut extensions = Self::default();
        extensions.walk(area, |extensions, magic, data| extensions.take(magic, data, context))?;
        Ok(extensions)
    }

    /// Parses only the feature name table, as far as it can be read. The names are used in the error message for an image with
    /// unknown features.
    pub(super) fn names_only(area: &[u8]) -> Vec<FeatureName> {
        let mut extensions = Self::default();
        // Extensions behind a broken extension cannot be found. A feature name table in front of the broken extension is still
        // usable.
        let _ = extensions.walk(area, |extensions, magic, data| {
            if magic == FEATURE_NAMES {
                extensions.feature_names = parse_names(data);
            }
            Ok(())
        });
        extensions.feature_names
    }

    fn walk(
        &mut self,
        area: &[u8],
        mut each: impl FnMut(&mut Self, u32, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut rest = area;
        while let Some((head, after)) = rest.split_at_checked(8) {
            let Ok((magic, _)) = U32::read_from_prefix(head) else { break };
            let Ok((_, len)) = U32::read_from_suffix(head) else { break };
            let len = usize::try_from(len.get()).unwrap_or(usize::MAX);
            let Some(data) = after.get(..len) else {
                return Err(Error::invalid("Header extension too large"));
            };
            if magic.get() == END {
                break;
            }
            each(self, magic.get(), data)?;
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        // The remaining bytes are too few for the type and the length of another extension.
        if (1..8).contains(&rest.len()) {
            return Err(Error::invalid("Header extension too large"));
        }
        Ok(())
    }

    fn take(&mut self, magic: u32, data: &[u8], context: &Context) -> Result<()> {
        match magic {
            BACKING_FORMAT => {
                if data.len() > MAX_FORMAT_NAME {
                    let text = format!(
                        "ERROR: ext_backing_format: len={} too large (>={})",
                        data.len(),
                        MAX_FORMAT_NAME + 1
                    );
                    return Err(Error::invalid(text));
                }
                self.backing_format = Some(text(data));
            }
            FEATURE_NAMES => self.feature_names = parse_names(data),
            DATA_FILE => self.data_file = Some(text(data)),
            BITMAPS => self.take_bitmaps(data, context),
            CRYPTO if context.luks => self.crypto = Some(parse_crypto(data, context.geometry)?),
            CRYPTO => {
                return Err(Error::invalid(
                    "CRYPTO header extension only expected with LUKS encryption method",
                ));
            }
            _ => self.unknown.push((magic, data.to_vec())),
        }
        Ok(())
    }

    /// Parses the bitmaps extension. A fault is only recorded, because a check must be able to open and repair the image.
    /// [`super::Header::require_bitmaps`] reports the fault.
    fn take_bitmaps(&mut self, data: &[u8], context: &Context) {
        match parse_bitmaps(data, context) {
            Ok(bitmaps) => {
                self.bitmaps = bitmaps;
                self.bitmaps_outdated = bitmaps.is_none();
            }
            Err(fault) => self.bitmaps_fault = Some(fault),
        }
    }

    /// Appends the extensions to `out` in the order in which QEMU writes them, the end marker last. Version 3 images with large
    /// enough clusters get the names of all known features. Names that were read from the image are not written.
    pub(super) fn encode(&self, out: &mut Vec<u8>, version: u32, geometry: Geometry) {
        self.encode_parts(out, version >= 3 && geometry.cluster_size() > NO_NAMES_UP_TO);
    }

    /// Like [`Self::encode`], but without the feature name table. This table is not needed to read the image.
    pub(super) fn encode_without_names(&self, out: &mut Vec<u8>) {
        self.encode_parts(out, false);
    }

    fn encode_parts(&self, out: &mut Vec<u8>, names: bool) {
        if let Some(format) = &self.backing_format {
            put(out, BACKING_FORMAT, &names::to_bytes(format));
        }
        if let Some(name) = &self.data_file {
            put(out, DATA_FILE, &names::to_bytes(name));
        }
        if let Some(crypto) = &self.crypto {
            let words = [crypto.offset.to_be_bytes(), crypto.length.to_be_bytes()];
            put(out, CRYPTO, words.as_flattened());
        }
        if names {
            put(out, FEATURE_NAMES, &encode_names());
        }
        if let Some(bitmaps) = &self.bitmaps {
            put(out, BITMAPS, &bitmaps.encode());
        }
        for (magic, data) in &self.unknown {
            put(out, *magic, data);
        }
        put(out, END, &[]);
    }
}

fn put(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend(magic.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
    // Only the length of the data is rounded up. The end of the padding may be unaligned in the file, because a header can have
    // any length.
    let padding = data.len().next_multiple_of(8) - data.len();
    out.resize(out.len() + padding, 0);
}

/// Decodes text in an image. The text ends at the first zero byte, if there is one.
pub(super) fn text(bytes: &[u8]) -> String {
    names::to_text(bytes.split(|&byte| byte == 0).next().unwrap_or_default())
}

fn parse_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks_exact(FEATURE_ENTRY)
        .filter_map(|entry| match entry {
            [kind, bit, name @ ..] => {
                let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
                let name = names::to_text(name);
                Some(FeatureName { kind: FeatureKind::from_byte(*kind), bit: *bit, name })
            }
            _ => None,
        })
        .collect()
}

fn encode_names() -> Vec<u8> {
    let mut data = Vec::with_capacity(NAMES.len() * FEATURE_ENTRY);
    for (kind, bit, name) in NAMES {
        data.extend([kind.byte(), bit]);
        data.extend(name.bytes().chain(std::iter::repeat(0)).take(FEATURE_NAME));
    }
    data
}

fn parse_crypto(data: &[u8], geometry: Geometry) -> Result<CryptoHeader> {
    let Ok(raw) = RawCrypto::read_from_bytes(data) else {
        return Err(Error::invalid(format!(
            "CRYPTO header extension size {}, but expected size 16",
            data.len()
        )));
    };
    let (offset, length) = (raw.offset.get(), raw.length.get());
    if !geometry.is_aligned(offset) {
        let size = geometry.cluster_size();
        return Err(Error::invalid(format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{size}'"
        )));
    }
    Ok(CryptoHeader { offset, length })
}

fn parse_bitmaps(data: &[u8], context: &Context) -> Result<Option<BitmapsExtension>, String> {
    let fault = |text: String| Err(text);
    let Ok(raw) = RawBitmaps::read_from_bytes(data) else {
        return fault("bitmaps_ext: Invalid extension length".into());
    };
    if !context.autoclear.contains(Autoclear::BITMAPS) {
        return Ok(None);
    }
    if raw.reserved.get() != 0 {
        return fault("bitmaps_ext: Reserved field is not zero".into());
    }
    let (count, size) = (raw.count.get(), raw.directory_size.get());
    if count > MAX_BITMAPS {
        return fault(format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of \
             {MAX_BITMAPS}"
        ));
    }
    if count == 0 {
        return fault("found bitmaps extension with zero bitmaps".into());
    }
    let directory_offset = raw.directory_offset.get();
    if !context.geometry.is_aligned(directory_offset) {
        return fault("bitmaps_ext: invalid bitmap directory offset".into());
    }
    if size > MAX_BITMAP_DIRECTORY {
        return fault(format!(
            "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size \
             ({MAX_BITMAP_DIRECTORY})"
        ));
    }
    Ok(Some(BitmapsExtension { count, directory_size: size, directory_offset }))
}
