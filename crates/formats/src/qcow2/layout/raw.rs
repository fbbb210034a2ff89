//! The header as a struct of raw fields: big-endian, unaligned, unchecked.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `"QFI\xfb"`.
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// Header length of version 2 images, in bytes.
pub(super) const V2_LENGTH: u32 = 72;
/// Smallest header length of version 3 images, in bytes.
pub(super) const V3_MIN_LENGTH: u32 = 104;
/// Length in bytes of the version 3 header fields that this implementation knows and writes.
pub(super) const V3_LENGTH: u32 = 112;

/// The image header ("Header" and "Additional fields").
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// [`MAGIC`].
    pub(super) magic: U32,
    /// 2 or 3.
    pub(super) version: U32,
    /// Byte offset of the backing file's name, or 0.
    pub(super) backing_file_offset: U64,
    /// Bytes in the backing file's name.
    pub(super) backing_file_size: U32,
    /// Binary logarithm of the cluster size.
    pub(super) cluster_bits: U32,
    /// Virtual size in bytes.
    pub(super) size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    pub(super) crypt_method: U32,
    /// Entries in the active L1 table.
    pub(super) l1_size: U32,
    /// Byte offset of the active L1 table.
    pub(super) l1_table_offset: U64,
    /// Byte offset of the refcount table.
    pub(super) refcount_table_offset: U64,
    /// Length of the refcount table in clusters.
    pub(super) refcount_table_clusters: U32,
    /// Entries of the snapshot table.
    pub(super) nb_snapshots: U32,
    /// Byte offset of the snapshot table.
    pub(super) snapshots_offset: U64,
    /// Version 3: features that must be understood.
    pub(super) incompatible_features: U64,
    /// Version 3: features that may be ignored.
    pub(super) compatible_features: U64,
    /// Version 3: autoclear bits. A program that writes to the image clears the bits that it does not know.
    pub(super) autoclear_features: U64,
    /// Version 3: binary logarithm of the refcount width in bits.
    pub(super) refcount_order: U32,
    /// Version 3: bytes in this header.
    pub(super) header_length: U32,
    /// 0 zlib, 1 zstd; absent when `header_length` is 104.
    pub(super) compression_type: u8,
    /// Zeroes up to a multiple of 8.
    pub(super) padding: [u8; 7],
}

impl RawHeader {
    /// The header at the start of an image. If `head` is shorter than a header, the missing bytes count as zeroes.
    pub(super) fn from_head(head: &[u8]) -> Self {
        let mut bytes = [0; size_of::<Self>()];
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = *from;
        }
        zerocopy::transmute!(bytes)
    }
}

/// Byte offsets of the header's fields, for updates in place.
pub mod field_offsets {
    /// Virtual size (8 bytes).
    pub const SIZE: u64 = 24;
    /// Entries of the active L1 table (4 bytes); the table's offset follows it.
    pub const L1_SIZE: u64 = 36;
    /// Offset of the active L1 table (8 bytes).
    pub const L1_TABLE_OFFSET: u64 = 40;
    /// Offset of the refcount table (8 bytes); its length in clusters follows it.
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    /// Length of the refcount table in clusters (4 bytes).
    pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    /// Number of snapshots (4 bytes); the table's offset follows it.
    pub const SNAPSHOT_COUNT: u64 = 60;
    /// Offset of the snapshot table (8 bytes).
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    /// Incompatible features (8 bytes, version 3).
    pub const INCOMPATIBLE: u64 = 72;
    /// Compatible features (8 bytes, version 3).
    pub const COMPATIBLE: u64 = 80;
    /// Autoclear features (8 bytes, version 3).
    pub const AUTOCLEAR: u64 = 88;
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<RawHeader>() == V3_LENGTH as usize);
    assert!(offset_of!(RawHeader, version) == 4);
    assert!(offset_of!(RawHeader, backing_file_offset) == 8);
    assert!(offset_of!(RawHeader, backing_file_size) == 16);
    assert!(offset_of!(RawHeader, cluster_bits) == 20);
    assert!(offset_of!(RawHeader, size) as u64 == field_offsets::SIZE);
    assert!(offset_of!(RawHeader, crypt_method) == 32);
    assert!(offset_of!(RawHeader, l1_size) as u64 == field_offsets::L1_SIZE);
    assert!(offset_of!(RawHeader, l1_table_offset) as u64 == field_offsets::L1_TABLE_OFFSET);
    assert!(
        offset_of!(RawHeader, refcount_table_offset) as u64 == field_offsets::REFCOUNT_TABLE_OFFSET
    );
    assert!(
        offset_of!(RawHeader, refcount_table_clusters) as u64
            == field_offsets::REFCOUNT_TABLE_CLUSTERS
    );
    assert!(offset_of!(RawHeader, nb_snapshots) as u64 == field_offsets::SNAPSHOT_COUNT);
    assert!(offset_of!(RawHeader, snapshots_offset) as u64 == field_offsets::SNAPSHOTS_OFFSET);
    assert!(offset_of!(RawHeader, incompatible_features) as u64 == field_offsets::INCOMPATIBLE);
    assert!(offset_of!(RawHeader, compatible_features) as u64 == field_offsets::COMPATIBLE);
    assert!(offset_of!(RawHeader, autoclear_features) as u64 == field_offsets::AUTOCLEAR);
    assert!(offset_of!(RawHeader, refcount_order) == 96);
    assert!(offset_of!(RawHeader, header_length) == 100);
    assert!(offset_of!(RawHeader, compression_type) == 104);
};
