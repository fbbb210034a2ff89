//! Header extensions ("Header extensions" and the sections after it).
//!
//! They follow the header in the first cluster, up to the backing file's name or the cluster's end. All
//! lengths are checked against that area, so what is kept is never more than a cluster.

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
/// Bytes of the name in it.
const FEATURE_NAME: usize = 46;
/// Smallest cluster with which the feature name table is left out, being most of the cluster.
const NO_NAMES_UP_TO: u64 = 4096;
/// Longest backing format name, in bytes.
const MAX_FORMAT_NAME: usize = 15;

/// Which field a feature bit is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// Must be understood.
    Incompatible,
    /// May be ignored.
    Compatible,
    /// Must be cleared by a writer that does not know it.
    Autoclear,
    /// A kind that this version does not know.
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
    /// The field that the bit is in.
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

/// Where the bitmap directory is.
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

/// Where the LUKS header and its key material are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Cluster-aligned byte offset.
    pub offset: u64,
    /// Bytes; nothing in the header lies behind them.
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

/// What follows the header in the first cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Names that the image gives to feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// The bitmap directory; absent when the image says that it is not consistent.
    pub bitmaps: Option<BitmapsExtension>,
    /// The image says that of a directory which it names.
    pub bitmaps_outdated: bool,
    /// What is wrong with the bitmaps extension; there is no directory then.
    pub bitmaps_fault: Option<String>,
    /// Where the LUKS header is.
    pub crypto: Option<CryptoHeader>,
    /// Extensions that are not known: magic number and data.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// What the reading of one extension depends on.
pub(super) struct Context {
    pub(super) geometry: Geometry,
    pub(super) autoclear: Autoclear,
    pub(super) luks: bool,
}

impl Extensions {
    /// Reads the extensions in `area`, which begins behind the header and ends at the end of the area
    /// that belongs to extensions. In an area of fewer bytes than it should have, the rest are zeroes.
    pub(super) fn parse(area: &[u8], context: &Context) -> Result<Self> {
        let mut extensions = Self::default();
        extensions.walk(area, |extensions, magic, data| extensions.take(magic, data, context))?;
        Ok(extensions)
    }

    /// The feature name table alone, as far as it can be read: for the message about an image that
    /// cannot be opened anyway.
    pub(super) fn names_only(area: &[u8]) -> Vec<FeatureName> {
        let mut extensions = Self::default();
        // What comes after a fault cannot be found; the names before it still serve.
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
        // Too little room for the type and the length of another one.
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

    /// A fault here is told when the bitmaps matter: to check and repair such an image, it must be read.
    fn take_bitmaps(&mut self, data: &[u8], context: &Context) {
        match parse_bitmaps(data, context) {
            Ok(bitmaps) => {
                self.bitmaps = bitmaps;
                self.bitmaps_outdated = bitmaps.is_none();
            }
            Err(fault) => self.bitmaps_fault = Some(fault),
        }
    }

    /// Appends the extensions to `out` in the order in which QEMU writes them, the end marker last.
    /// Version 3 images with large enough clusters get the names of all known features, whatever
    /// names they had.
    pub(super) fn encode(&self, out: &mut Vec<u8>, version: u32, geometry: Geometry) {
        self.encode_parts(out, version >= 3 && geometry.cluster_size() > NO_NAMES_UP_TO);
    }

    /// The same without the names of features, which nobody needs to read the image.
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
    // The data's length is rounded up, not its end: headers need not end at a multiple of 8.
    let padding = data.len().next_multiple_of(8) - data.len();
    out.resize(out.len() + padding, 0);
}

/// Text in an image: up to the first zero byte, if there is one.
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
