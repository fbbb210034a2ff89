//! Corrupt snapshot tables and bitmap directories, and sizes larger than the file allows. The cases corrupt the image of
//! [`super::qcow2::good`].

use super::image::Image;
use super::qcow2::field::{
    AUTOCLEAR, EXTENSIONS, INCOMPATIBLE, L1_SIZE, REFCOUNT_CLUSTERS, SIZE, SNAPSHOTS,
    SNAPSHOTS_OFFSET,
};
use super::{Case, Expect};

const L1: u64 = 0x3_0000;
const L2: usize = 0x4_0000;
/// The L2 entry of the compressed cluster.
const COMPRESSED_ENTRY: usize = L2 + 4 * 8;
/// The end of the good image, in bytes.
const NEW: usize = 0x9_0000;
const PAST_THE_END: u64 = 1 << 40;

/// Adds the name of a data file to the image. The name has 11 bytes.
fn data_file(image: &mut Image, name: &[u8; 11]) {
    image.put64(INCOMPATIBLE, 4);
    image.put32(EXTENSIONS, 0x4441_5441);
    image.put32(EXTENSIONS + 4, 11);
    image.put(EXTENSIONS + 8, name);
    image.put(EXTENSIONS + 19, &[0; 13]);
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

/// Adds a snapshot table with one entry (the qcow2 specification, "Snapshots"): the offset and the number of entries of its L1
/// table, and the lengths of its name and of its extra data.
fn snapshot(image: &mut Image, l1: u64, entries: u32, name: u16, extra: u32) {
    image.put32(SNAPSHOTS, 1);
    image.put64(SNAPSHOTS_OFFSET, NEW as u64);
    image.put64(NEW, l1);
    image.put32(NEW + 8, entries);
    image.put(NEW + 12, &1_u16.to_be_bytes());
    image.put(NEW + 14, &name.to_be_bytes());
    image.put32(NEW + 36, extra);
    image.put(NEW + 40, &[0; 16]);
    image.put(NEW + 56, b"1snapshot");
}

fn snapshots() -> Vec<Case> {
    vec![
        case(
            "snapshot with 4 GiB of extra data",
            |i| snapshot(i, L1, 1, 8, u32::MAX),
            Expect::WithoutSnapshots("Too much extra metadata in snapshot table entry 0"),
        ),
        case(
            "snapshot with a name past the end of the file",
            |i| snapshot(i, L1, 1, u16::MAX, 16),
            Expect::NotWritable(""),
        ),
        case(
            "snapshot L1 of 2^32 entries",
            |i| snapshot(i, L1, u32::MAX, 8, 16),
            Expect::NotWritable(""),
        ),
        case("snapshot L1 unaligned", |i| snapshot(i, L1 + 8, 1, 8, 16), Expect::NotWritable("")),
        case(
            "snapshot L1 past the end",
            |i| snapshot(i, PAST_THE_END, 1, 8, 16),
            Expect::NotWritable(""),
        ),
        case(
            "snapshot L1 at the end of the address space",
            |i| snapshot(i, u64::MAX - 0xffff, 1, 8, 16),
            Expect::NotWritable(""),
        ),
        case(
            "snapshot L1 larger than the active one",
            |i| snapshot(i, L1, 4096, 8, 16),
            Expect::NotWritable(""),
        ),
        case(
            "two snapshots with one L1 table, together longer than the file",
            |i| {
                snapshot(i, L1, 49_152, 8, 16);
                let entry = i.bytes()[NEW..].to_vec();
                i.put(NEW + 72, &entry);
                i.put32(SNAPSHOTS, 2);
            },
            Expect::NotWritable(""),
        ),
        case(
            "65,536 snapshots of nothing",
            |i| {
                i.put32(SNAPSHOTS, 65_536);
                i.put64(SNAPSHOTS_OFFSET, NEW as u64);
            },
            Expect::NotWritable(""),
        ),
    ]
}

/// The fields of an entry of a bitmap directory (the qcow2 specification, "Bitmaps extension").
struct Bitmap {
    table: u64,
    entries: u32,
    flags: u32,
    granularity: u8,
    name_len: u16,
}

const BITMAP: Bitmap =
    Bitmap { table: NEW as u64 + 0x1_0000, entries: 1, flags: 0, granularity: 16, name_len: 4 };

/// Adds a bitmaps extension with the number of bitmaps and the size and offset of the directory. The entries are written at
/// `NEW`.
fn bitmaps(image: &mut Image, count: u32, size: u64, offset: u64, entries: &[Bitmap]) {
    image.put64(AUTOCLEAR, 1);
    image.put32(EXTENSIONS, 0x2385_2875);
    image.put32(EXTENSIONS + 4, 24);
    image.put32(EXTENSIONS + 8, count);
    image.put32(EXTENSIONS + 12, 0);
    image.put64(EXTENSIONS + 16, size);
    image.put64(EXTENSIONS + 24, offset);
    image.put64(EXTENSIONS + 32, 0);
    for (index, entry) in entries.iter().enumerate() {
        let at = NEW + index * 32;
        image.put64(at, entry.table);
        image.put32(at + 8, entry.entries);
        image.put32(at + 12, entry.flags);
        image.put(at + 16, &[1, entry.granularity]);
        image.put(at + 18, &entry.name_len.to_be_bytes());
        image.put32(at + 20, 0);
        image.put(at + 24, b"name\0\0\0\0");
    }
    image.put(NEW + 0x1_ffff, &[0]);
}

/// Adds a bitmaps extension with one entry at `NEW`.
fn bitmap(image: &mut Image, entry: Bitmap) {
    bitmaps(image, 1, 32, NEW as u64, &[entry]);
}

fn bitmap_directories() -> Vec<Case> {
    vec![
        case(
            "bitmap directory past the end",
            |i| bitmaps(i, 1, 32, PAST_THE_END, &[]),
            Expect::Survives,
        ),
        case(
            "bitmap directory unaligned",
            |i| bitmaps(i, 1, 32, NEW as u64 + 8, &[BITMAP]),
            Expect::Survives,
        ),
        case(
            "bitmap directory of 2^64 - 1 bytes",
            |i| bitmaps(i, 1, u64::MAX, NEW as u64, &[BITMAP]),
            Expect::Survives,
        ),
        case(
            "bitmap directory at the end of the address space",
            |i| bitmaps(i, 1, 1 << 16, u64::MAX - 0xffff, &[]),
            Expect::Survives,
        ),
        case(
            "2^32 - 1 bitmaps",
            |i| bitmaps(i, u32::MAX, 32, NEW as u64, &[BITMAP]),
            Expect::Survives,
        ),
        case(
            "bitmap table of 2^32 - 1 entries",
            |i| bitmap(i, Bitmap { entries: u32::MAX, ..BITMAP }),
            Expect::Survives,
        ),
        case(
            "bitmap table past the end",
            |i| bitmap(i, Bitmap { table: PAST_THE_END, ..BITMAP }),
            Expect::Survives,
        ),
        case(
            "bitmap table over the header",
            |i| bitmap(i, Bitmap { table: 0, ..BITMAP }),
            Expect::Survives,
        ),
        case(
            "bitmap name longer than the directory",
            |i| bitmap(i, Bitmap { name_len: u16::MAX, ..BITMAP }),
            Expect::Survives,
        ),
        case(
            "bitmap of 2^255 bytes a bit",
            |i| bitmap(i, Bitmap { granularity: 255, ..BITMAP }),
            Expect::Survives,
        ),
        case("bitmap in use", |i| bitmap(i, Bitmap { flags: 1, ..BITMAP }), Expect::Survives),
        case(
            "two bitmaps of one name",
            |i| bitmaps(i, 2, 64, NEW as u64, &[BITMAP, BITMAP]),
            Expect::Survives,
        ),
    ]
}

fn sizes() -> Vec<Case> {
    vec![
        case(
            "size 12,802 TiB in clusters of 64 KiB",
            |i| i.put64(SIZE, 12_802 << 40),
            Expect::Refused("L1 table is too small"),
        ),
        case("L1 of 32 MiB in a file of 600 KiB", |i| i.put32(L1_SIZE, 4 << 20), Expect::Survives),
        case(
            "refcount table of 8 MiB in a file of 600 KiB",
            |i| i.put32(REFCOUNT_CLUSTERS, 128),
            Expect::Survives,
        ),
        case(
            "a bomb: one compressed stream for 8,192 clusters",
            |i| {
                i.put64(SIZE, 512 << 20);
                let stream = i.get64(COMPRESSED_ENTRY);
                for index in 0..8192 {
                    i.put64(L2 + index * 8, stream);
                }
            },
            Expect::Damaged(""),
        ),
        case(
            "L2 entry beyond all that the refcount table could count",
            |i| i.put64(L2, 1 << 63 | 1 << 50),
            Expect::Damaged(""),
        ),
        case("data file that is not there", |i| data_file(i, b"./not-there"), Expect::Survives),
        case("data file that is the image", |i| data_file(i, b"./././image"), Expect::Survives),
        case("data file that is a directory", |i| data_file(i, b"./././././."), Expect::Survives),
    ]
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    [snapshots(), bitmap_directories(), sizes()].concat()
}
