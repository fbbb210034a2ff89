//! Feature bits ("incompatible_features" and the fields after it), and the names that are written for them.

use super::extension::{FeatureKind, FeatureName};

bitflags::bitflags! {
    /// Features that a program must support to open the image. Unknown bits are kept in the parsed value, for the error
    /// message.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be inconsistent: the image was not closed.
        const DIRTY = 1;
        /// Structures may be corrupt: the image must not be written to.
        const CORRUPT = 2;
        /// Guest clusters lie in an external data file.
        const DATA_FILE = 4;
        /// Compressed clusters use another method than zlib.
        const COMPRESSION = 8;
        /// L2 entries are 128 bits wide and describe subclusters.
        const EXTENDED_L2 = 16;
        /// All other bits.
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// Features that may be ignored. Unknown bits are preserved.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Compatible: u64 {
        /// Refcount updates may be postponed while the image is marked dirty.
        const LAZY_REFCOUNTS = 1;
        /// All other bits.
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// Autoclear bits: a program that writes to the image must clear each bit that it does not know. The parsed value contains
    /// unknown bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1;
        /// The external data file is a consistent raw image by itself.
        const RAW_DATA_FILE = 2;
        /// All other bits.
        const _ = !0;
    }
}

impl Incompatible {
    /// The bits that the qcow2 specification defines.
    pub const KNOWN: Self = Self::from_bits_retain(0x1f);

    /// The bits that the qcow2 specification does not define.
    pub fn unknown(self) -> Self {
        self.difference(Self::KNOWN)
    }
}

impl Autoclear {
    /// The bits that the qcow2 specification defines.
    pub const KNOWN: Self = Self::from_bits_retain(3);
}

/// The names of all known features, in the order in which they are written ("Feature name table").
pub(super) const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// Describes the incompatible features in `unknown` as QEMU does: a feature with a name in `table` by this name, all other
/// features together as one number.
pub(super) fn describe_unknown(unknown: Incompatible, table: &[FeatureName]) -> String {
    let mut left = unknown.bits();
    let mut names: Vec<String> = Vec::new();
    for feature in table.iter().filter(|feature| feature.kind == FeatureKind::Incompatible) {
        let bit = 1u64.checked_shl(feature.bit.into()).unwrap_or(0);
        if left & bit != 0 {
            left &= !bit;
            names.push(feature.name.clone());
        }
    }
    if left != 0 {
        names.push(format!("Unknown incompatible feature: {left:x}"));
    }
    names.join(", ")
}
