//! The qcow2 header: whatever the bytes, parsing ends without a panic, and what is accepted keeps the
//! promises of [`Header`] and survives being written and read again.

use oxblk_formats::qcow2::layout::{Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};

/// Takes one input.
///
/// # Panics
/// When the code under test does, or breaks one of its promises.
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

    // It may not fit once the names of all features are added, but then it says so.
    let Ok(bytes) = header.encode() else { return };
    assert!(bytes.len() as u64 <= geometry.cluster_size());
    let mut again = Header::parse(&bytes, bytes.len() as u64).expect("what was written is read");
    again.extensions.feature_names.clone_from(&header.extensions.feature_names);
    again.header_length = header.header_length;
    // Word of bitmaps that another program let become outdated is not written again.
    assert!(!again.extensions.bitmaps_outdated);
    again.extensions.bitmaps_outdated = header.extensions.bitmaps_outdated;
    // Nor is broken word of them: only a check opens such an image, and a repair drops it.
    assert!(again.extensions.bitmaps_fault.is_none());
    again.extensions.bitmaps_fault.clone_from(&header.extensions.bitmaps_fault);
    assert_eq!(again, header);
}
