//! Fuzzes the QED header and the meaning of table entries. Parsing never panics, and an accepted header keeps the invariants of
//! [`Header`].

use oxblk_formats::qed::header::{ENTRY_BYTES, Entry, Header, MAX_NAME, data_entry, table_entry};

/// Runs one input: the size of the file, a table entry, and the first bytes of the file.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Some((size, rest)) = data.split_first_chunk() else { return };
    let Some((entry, head)) = rest.split_first_chunk() else { return };
    let (file_size, entry) = (u64::from_le_bytes(*size), u64::from_le_bytes(*entry));
    let Ok(header) = Header::parse(head, file_size) else { return };
    let geometry = header.geometry;
    assert!((12..=26).contains(&geometry.cluster_bits));
    assert!(matches!(geometry.table_clusters, 1 | 2 | 4 | 8 | 16));
    assert!(header.size.is_multiple_of(512) && i64::try_from(header.size).is_ok());
    assert!(header.size <= geometry.max_size());
    assert!(geometry.l1_entries() * ENTRY_BYTES <= 16 << 20);
    assert!(header.size.div_ceil(geometry.table_reach()) <= geometry.l1_entries());
    assert!(header.first_cluster() <= header.l1_offset && header.l1_end() <= file_size);
    assert!(geometry.is_aligned(header.l1_offset));
    if let Some(name) = &header.backing {
        assert!(usize::try_from(name.len).is_ok_and(|len| len <= MAX_NAME));
        assert!(u64::from(name.offset) + u64::from(name.len) <= header.first_cluster());
    }
    if let Entry::At(host) = data_entry(geometry, header.first_cluster(), entry, file_size) {
        assert!(geometry.is_aligned(host) && host >= header.first_cluster() && host < file_size);
    }
    if let Entry::At(host) = table_entry(geometry, header.first_cluster(), entry, file_size) {
        assert!(geometry.is_aligned(host) && host >= header.first_cluster());
        assert!(host + geometry.table_bytes() <= file_size);
    }
    let parsed = Header::parse(&header.encode(), file_size).expect("an encoded header");
    assert_eq!(parsed, header);
}
