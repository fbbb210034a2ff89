//! Corrupt L1, L2 and refcount tables. The cases corrupt the image of [`super::qcow2::good`], whose tables have known offsets.

use super::image::Image;
use super::{Case, Expect};

const REFCOUNT_TABLE: usize = 0x1_0000;
const REFCOUNT_BLOCK: usize = 0x2_0000;
const L1: usize = 0x3_0000;
const L2: usize = 0x4_0000;
/// The L2 entry of the compressed cluster.
const COMPRESSED_ENTRY: usize = L2 + 4 * 8;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const PAST_THE_END: u64 = 1 << 40;

fn to(offset: usize) -> u64 {
    offset as u64 | COPIED
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn l2_entries() -> Vec<Case> {
    vec![
        case(
            "L2 entry with a reserved low bit",
            |i| i.put64(L2, i.get64(L2) | 2),
            Expect::Damaged("reserved bits set"),
        ),
        case(
            "L2 entry with a reserved high bit",
            |i| i.put64(L2, i.get64(L2) | 1 << 57),
            Expect::Damaged("reserved bits set"),
        ),
        case(
            "L2 entry unaligned",
            |i| i.put64(L2, to(0x5_0200)),
            Expect::NotWritable("not properly aligned"),
        ),
        case("L2 entry past the end", |i| i.put64(L2, PAST_THE_END | COPIED), Expect::Damaged("")),
        case("L2 entry to the L1 table", |i| i.put64(L2, to(L1)), Expect::Damaged("")),
        case("L2 entry to its own table", |i| i.put64(L2, to(L2)), Expect::Damaged("")),
        case(
            "L2 entry to a refcount block",
            |i| i.put64(L2, to(REFCOUNT_BLOCK)),
            Expect::Damaged(""),
        ),
        case("L2 entry to the header", |i| i.put64(L2, COPIED), Expect::Survives),
        case(
            "two L2 entries to one cluster",
            |i| i.put64(L2 + 8, i.get64(L2)),
            Expect::Damaged(""),
        ),
        case("L2 entry all set", |i| i.put64(L2, u64::MAX), Expect::Damaged("")),
        case(
            "copied bit missing",
            |i| i.put64(L2, i.get64(L2) & !COPIED),
            Expect::Damaged("OFLAG_COPIED data cluster"),
        ),
        case(
            "zero bit on an allocated cluster",
            |i| i.put64(L2, i.get64(L2) | 1),
            Expect::Harmless,
        ),
    ]
}

fn compressed_entries() -> Vec<Case> {
    vec![
        case(
            "compressed data past the end",
            |i| i.put64(COMPRESSED_ENTRY, COMPRESSED | PAST_THE_END),
            Expect::Damaged(""),
        ),
        case(
            "compressed descriptor all set",
            |i| i.put64(COMPRESSED_ENTRY, COMPRESSED | (COMPRESSED - 1)),
            Expect::Damaged(""),
        ),
        case(
            "compressed cluster with the copied bit",
            |i| i.put64(COMPRESSED_ENTRY, i.get64(COMPRESSED_ENTRY) | COPIED),
            Expect::Damaged("copied flag must never be set for compressed clusters"),
        ),
        case(
            "compressed data that is no deflate stream",
            |i| i.put64(COMPRESSED_ENTRY, COMPRESSED | 0x5_0000),
            Expect::Damaged(""),
        ),
        case(
            "compressed data in the L1 table",
            |i| i.put64(COMPRESSED_ENTRY, COMPRESSED | L1 as u64),
            Expect::Damaged(""),
        ),
        case("compressed data torn up", |i| i.put(0x8_0000, &[0xff; 64]), Expect::Survives),
        case(
            // A stored deflate block whose length is 65,535 bytes, without any data.
            "compressed data that claims more than it has",
            |i| i.put(0x8_0000, &[0x01, 0xff, 0xff, 0x00, 0x00]),
            Expect::Survives,
        ),
    ]
}

fn l1_entries() -> Vec<Case> {
    vec![
        case(
            "L1 entry with a reserved bit",
            |i| i.put64(L1, i.get64(L1) | 4),
            Expect::Damaged("found L1 entry with reserved bits set"),
        ),
        case("L1 entry unaligned", |i| i.put64(L1, to(0x4_0200)), Expect::NotWritable("")),
        case("L1 entry past the end", |i| i.put64(L1, PAST_THE_END | COPIED), Expect::Damaged("")),
        case("L1 entry to the L1 table", |i| i.put64(L1, to(L1)), Expect::NotWritable("")),
        case("L1 entry to the header", |i| i.put64(L1, COPIED), Expect::Survives),
        case(
            "L1 entry to the refcount table",
            |i| i.put64(L1, to(REFCOUNT_TABLE)),
            Expect::NotWritable(""),
        ),
        case("L1 entry to data", |i| i.put64(L1, to(0x5_0000)), Expect::Damaged("")),
    ]
}

fn refcounts() -> Vec<Case> {
    vec![
        case(
            "refcount table entry with a reserved bit",
            |i| i.put64(REFCOUNT_TABLE, REFCOUNT_BLOCK as u64 | 1),
            Expect::Damaged("reserved bits"),
        ),
        case("refcount block unaligned", |i| i.put64(REFCOUNT_TABLE, 0x2_0200), Expect::Survives),
        case(
            "refcount block past the end",
            |i| i.put64(REFCOUNT_TABLE, PAST_THE_END),
            Expect::NotWritable(""),
        ),
        case("no refcount blocks", |i| i.put64(REFCOUNT_TABLE, 0), Expect::NotWritable("")),
        case(
            "refcount block in the refcount table",
            |i| i.put64(REFCOUNT_TABLE, REFCOUNT_TABLE as u64),
            Expect::NotWritable(""),
        ),
        case(
            "refcount block in the L1 table",
            |i| i.put64(REFCOUNT_TABLE, L1 as u64),
            Expect::NotWritable(""),
        ),
        case("all refcounts 0", |i| i.put(REFCOUNT_BLOCK, &[0; 64]), Expect::NotWritable("")),
        case(
            "all refcounts at their most",
            |i| i.put(REFCOUNT_BLOCK, &[0xff; 64]),
            Expect::Damaged(""),
        ),
        case(
            "refcount 0 of a data cluster",
            |i| i.put(REFCOUNT_BLOCK + 10, &[0, 0]),
            Expect::Damaged(""),
        ),
        case(
            "refcount 2 of a data cluster",
            |i| i.put(REFCOUNT_BLOCK + 10, &[0, 2]),
            Expect::Damaged(""),
        ),
        case(
            "a cluster that nothing uses",
            |i| {
                i.put(REFCOUNT_BLOCK + 18, &[0, 1]);
                i.put(0x9_0000, &[7; 0x1_0000]);
            },
            Expect::Leaking,
        ),
    ]
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    [l2_entries(), compressed_entries(), l1_entries(), refcounts()].concat()
}
