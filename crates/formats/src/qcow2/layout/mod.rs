//! On-disk structures of qcow2: parsing bytes to validated values, and encoding values to bytes. No I/O happens here.
//!
//! All metadata of an image apart from the LUKS header passes through this module, so this module rejects hostile bytes.
//! [`Header::parse`] accepts only consistent values, apart from faults that a check can repair (see the `require_*` methods).
//! [`Header::encode`] fails if the header does not fit in its cluster. The checked accessors of table entries return the offset
//! of a cluster only if this offset is aligned. These accessors ignore reserved bits of L1 and standard L2 entries, as QEMU
//! does. Before a length from an image is used, it is compared with a bound that does not come from the image.
//!
//! The section names in the comments come from the qcow2 specification (docs/interop/qcow2). Messages have the same text as in
//! QEMU's tools for the same fault, because scripts compare the text.

mod bitmap;
mod entry;
mod extension;
mod extension_change;
mod features;
mod geometry;
mod head;
mod header;
mod raw;
mod refcount;
mod snapshot;
mod subclusters;

pub use bitmap::{
    BitmapData, BitmapEntry, BitmapFlags, BitmapTableEntry, MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY,
    MAX_BITMAPS, bitmap_bytes, encode_bitmap_directory, parse_bitmap_directory,
};
pub use entry::{BadEntry, L1Entry, L2Entry, L2Kind, RefcountTableEntry};
pub use extension::{BitmapsExtension, CryptoHeader, Extensions, FeatureKind, FeatureName};
pub use extension_change::{HeaderWrite, change_bitmaps_extension};
pub use features::{Autoclear, Compatible, Incompatible};
pub use geometry::Geometry;
pub use head::header_extent;
pub use header::{
    Compression, CryptMethod, Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
    looks_like_qcow2,
};
pub use raw::field_offsets;
pub use refcount::{RefcountError, refcount_get, refcount_max, refcount_set};
pub use snapshot::{
    Excess, MAX_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, SNAPSHOT_HEAD, Snapshot, encode_snapshot,
    parse_snapshot,
};
pub use subclusters::{ExtendedEntry, SUBCLUSTERS, Subcluster, Subclusters, l2_table};
