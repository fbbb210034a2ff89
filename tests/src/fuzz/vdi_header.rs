//! Fuzzes the VDI header and entries of the block map. Parsing never panics, and an accepted header keeps the invariants of
//! [`Header`].

use oxblk_formats::vdi::Entry;
use oxblk_formats::vdi::header::{HEADER_BYTES, Header, MAX_BLOCKS, MAX_SIZE};

/// Runs one input: the size of the file, and its first bytes.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let Some((size, head)) = data.split_first_chunk() else { return };
    let file_size = u64::from_le_bytes(*size);
    for word in head.chunks_exact(4) {
        let number = u32::from_le_bytes(word.try_into().unwrap());
        match Entry::from_number(number) {
            Entry::At(block) => assert_eq!(block, number),
            Entry::Zero => assert!(number >= u32::MAX - 1),
        }
    }
    let Ok(header) = Header::parse(head, file_size) else { return };
    assert!(header.size <= MAX_SIZE && header.size.is_multiple_of(512));
    assert!(header.blocks <= MAX_BLOCKS);
    assert!(header.size.div_ceil(1 << 20) <= header.blocks.into());
    assert!(header.map_offset >= HEADER_BYTES && header.map_offset.is_multiple_of(512));
    assert!(header.map_end() <= file_size && header.map_end() <= header.data_offset);
    assert!(header.data_offset.is_multiple_of(512));
    assert!(header.block_offset(u32::MAX) < 1 << 53);

    let again = Header::parse(&header.encode(), file_size).expect("what was written is read");
    assert_eq!(again, header);
}
