//! Fuzzes qcow2 bitmap directories, bitmap tables, and changes of the header extension with the offset of the directory.
//! Parsing never panics. A parsed structure stays the same when it is written and read again, and a header can still be read
//! after the extension was changed.

use oxblk_formats::qcow2::layout::{
    BitmapData, BitmapEntry, BitmapTableEntry, BitmapsExtension, Geometry, Header, HeaderWrite,
    change_bitmaps_extension, encode_bitmap_directory, parse_bitmap_directory,
};

fn directory(geometry: Geometry, count: u32, bytes: &[u8]) {
    let Ok(entries) = parse_bitmap_directory(bytes, count) else { return };
    assert_eq!(entries.iter().map(BitmapEntry::encoded_len).sum::<u64>(), bytes.len() as u64);
    for entry in &entries {
        if entry.fault(geometry).is_none() {
            assert!(geometry.is_aligned(entry.table_offset) && entry.table_offset != 0);
            assert!(entry.table_bytes() <= 8 << 20 && entry.granularity().is_some());
            assert!(!entry.name().contains('\0'));
        }
    }
    let again = encode_bitmap_directory(entries.iter());
    assert_eq!(parse_bitmap_directory(&again, count).expect("what was written is read"), entries);
}

fn header(bytes: &[u8]) {
    let Ok(before) = Header::parse(bytes, bytes.len() as u64) else { return };
    if before.version < 3 || before.require_bitmaps().is_err() {
        return;
    }
    let mut head = bytes.to_vec();
    head.resize(usize::try_from(before.geometry.cluster_size()).unwrap(), 0);
    let directory_offset = before.geometry.cluster_size() * 7;
    let new = BitmapsExtension { count: 1, directory_size: 32, directory_offset };
    for new in [Some(new), None] {
        let Ok(writes) = change_bitmaps_extension(&head, new.as_ref()) else { return };
        for HeaderWrite { offset, bytes } in writes {
            let at = usize::try_from(offset).unwrap();
            head[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        let after = Header::parse(&head, head.len() as u64).expect("a header that was changed");
        assert_eq!(after.extensions.bitmaps, new);
        assert_eq!(after.backing_file, before.backing_file);
        assert_eq!(after.extensions.unknown, before.extensions.unknown);
        assert_eq!((after.size, after.l1_offset), (before.size, before.l1_offset));
    }
}

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let [bits, count, rest @ ..] = data else { return };
    let cluster_bits = 9 + u32::from(bits % 13);
    let geometry =
        Geometry { cluster_bits, refcount_order: 4, extended_l2: false, data_file: false };
    directory(geometry, u32::from(*count), rest);
    for word in rest.chunks_exact(8) {
        let word = BitmapTableEntry(u64::from_be_bytes(word.try_into().unwrap()));
        if let Ok(BitmapData::At(offset)) = word.data(geometry) {
            assert!(geometry.is_aligned(offset) && offset != 0 && offset < 1 << 56);
        }
    }
    header(rest);
}
