//! Fuzzes the parallels header. Parsing never panics, and an accepted header keeps the invariants of [`Header`].

use oxblk_formats::parallels::header::{HEADER_BYTES, Header, MAX_ENTRIES};

/// Runs one input: the size of the file, the index of a cluster, and the first bytes of the file.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Some((size, rest)) = data.split_first_chunk() else { return };
    let Some((index, head)) = rest.split_first_chunk() else { return };
    let (file_size, index) = (u64::from_le_bytes(*size), u32::from_le_bytes(*index));
    let Ok(header) = Header::parse(head, file_size) else { return };
    assert!(header.cluster >= 512 && header.cluster.is_multiple_of(512));
    assert!(header.size.is_multiple_of(512) && i64::try_from(header.size).is_ok());
    assert!(header.entries <= MAX_ENTRIES);
    assert!(header.table_end() >= HEADER_BYTES && header.table_end() <= file_size);
    assert!(header.data_offset >= header.table_end());
    assert!(header.data_offset.is_multiple_of(512));
    let host = header.cluster_offset(index);
    if host < u64::MAX {
        assert_eq!(header.cluster_index(host), Some(index));
        if let Some(entry) = header.entry(index) {
            assert_eq!(header.host(entry), host);
        }
    }
    assert_eq!(header.cluster_index(host.wrapping_add(1)), None);
}
