//! Fuzzes the qcow2 header. Parsing never panics. An accepted header keeps the invariants of [`Header`], and stays the same
//! when it is written and read again.

use oxblk_formats::qcow2::layout::{Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Ok(header) = Header::parse(data, data.len() as u64) else { return };
    let geometry = header.geometry;
    assert!((9..=21).contains(&geometry.cluster_bits) && geometry.refcount_order <= 6);
    assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
    let table = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    assert!(table <= MAX_REFCOUNT_TABLE_BYTES);
    assert!(geometry.is_aligned(header.l1_offset));
    assert!(geometry.is_aligned(header.refcount_table_offset));
    assert!(geometry.l1_entries_for(header.size).is_some_and(|n| n <= header.l1_entries.into()));

    // `encode` adds the names of all features. If the header then exceeds a cluster, `encode` returns an error.
    let Ok(bytes) = header.encode() else { return };
    assert!(bytes.len() as u64 <= geometry.cluster_size());
    let mut again = Header::parse(&bytes, bytes.len() as u64).expect("what was written is read");
    again.extensions.feature_names.clone_from(&header.extensions.feature_names);
    again.header_length = header.header_length;
    // `encode` does not write the mark of outdated bitmaps. Parsing sets the mark if another program has changed the image.
    assert!(!again.extensions.bitmaps_outdated);
    again.extensions.bitmaps_outdated = header.extensions.bitmaps_outdated;
    // `encode` does not write a broken bitmaps extension either: only a check opens such an image, and a repair removes the
    // extension.
    assert!(again.extensions.bitmaps_fault.is_none());
    again.extensions.bitmaps_fault.clone_from(&header.extensions.bitmaps_fault);
    assert_eq!(again, header);
}
