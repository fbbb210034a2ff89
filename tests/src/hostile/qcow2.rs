//! Corrupt qcow2 headers and header extensions. [`super::qcow2_tables`] has the faults of tables, and [`super::qcow2_extra`]
//! those of snapshots, bitmaps and sizes.

use super::image::Image;
use super::{Case, Expect};
use crate::program::Program;

/// Returns a good version 3 image of 4 MiB with 64 KiB clusters: three data clusters, an unallocated cluster and a compressed
/// cluster.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good() -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "good.qcow2", "4M"]);
    tool("qemu-io", &["-c", "write -P 1 0 192k", "-c", "write -c -P 2 256k 64k", "good.qcow2"]);
    Image::new(std::fs::read(scratch.path().join("good.qcow2")).expect("the good image"))
}

/// Offsets of header fields, in bytes (the qcow2 specification, "Header").
pub(super) mod field {
    pub(in super::super) const VERSION: usize = 4;
    pub(in super::super) const BACKING_OFFSET: usize = 8;
    pub(in super::super) const BACKING_SIZE: usize = 16;
    pub(in super::super) const CLUSTER_BITS: usize = 20;
    pub(in super::super) const SIZE: usize = 24;
    pub(in super::super) const CRYPT_METHOD: usize = 32;
    pub(in super::super) const L1_SIZE: usize = 36;
    pub(in super::super) const L1_OFFSET: usize = 40;
    pub(in super::super) const REFCOUNT_OFFSET: usize = 48;
    pub(in super::super) const REFCOUNT_CLUSTERS: usize = 56;
    pub(in super::super) const SNAPSHOTS: usize = 60;
    pub(in super::super) const SNAPSHOTS_OFFSET: usize = 64;
    pub(in super::super) const INCOMPATIBLE: usize = 72;
    pub(in super::super) const COMPATIBLE: usize = 80;
    pub(in super::super) const AUTOCLEAR: usize = 88;
    pub(in super::super) const REFCOUNT_ORDER: usize = 96;
    pub(in super::super) const HEADER_LENGTH: usize = 100;
    pub(in super::super) const COMPRESSION: usize = 104;
    pub(in super::super) const EXTENSIONS: usize = 112;
}

use field::*;

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn refused(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Refused(text))
}

/// Wrong versions, sizes and encryption methods.
fn plain_fields() -> Vec<Case> {
    vec![
        refused("version 0", |i| i.put32(VERSION, 0), "Unsupported qcow2 version 0"),
        refused("version 1", |i| i.put32(VERSION, 1), "Unsupported qcow2 version 1"),
        refused("version 4", |i| i.put32(VERSION, 4), "Unsupported qcow2 version 4"),
        refused(
            "clusters of 256 bytes",
            |i| i.put32(CLUSTER_BITS, 8),
            "Unsupported cluster size: 2^8",
        ),
        refused(
            "clusters of 4 MiB",
            |i| i.put32(CLUSTER_BITS, 22),
            "Unsupported cluster size: 2^22",
        ),
        refused(
            "cluster bits all set",
            |i| i.put32(CLUSTER_BITS, u32::MAX),
            "Unsupported cluster size: 2^4294967295",
        ),
        refused(
            "refcounts of 128 bits",
            |i| i.put32(REFCOUNT_ORDER, 7),
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        refused(
            "refcount order all set",
            |i| i.put32(REFCOUNT_ORDER, u32::MAX),
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        refused(
            "unknown encryption",
            |i| i.put32(CRYPT_METHOD, 3),
            "Unsupported encryption method 3",
        ),
        case("size 2^63", |i| i.put64(SIZE, 1 << 63), Expect::Refused("Image is too big")),
        case("size 2^64 - 1", |i| i.put64(SIZE, u64::MAX), Expect::Refused("")),
        case("size 2^60", |i| i.put64(SIZE, 1 << 60), Expect::Refused("Image is too big")),
        case("size one byte more", |i| i.put64(SIZE, (4 << 20) + 1), Expect::Survives),
        case("size 0", |i| i.put64(SIZE, 0), Expect::Survives),
    ]
}

/// Header length, extensions, and the name of the backing file.
fn lengths() -> Vec<Case> {
    vec![
        refused("header of 71 bytes", |i| i.put32(HEADER_LENGTH, 71), "qcow2 header too short"),
        refused("header of 103 bytes", |i| i.put32(HEADER_LENGTH, 103), "qcow2 header too short"),
        refused(
            "header longer than a cluster",
            |i| i.put32(HEADER_LENGTH, 65_537),
            "qcow2 header exceeds cluster size",
        ),
        refused(
            "header length all set",
            |i| i.put32(HEADER_LENGTH, u32::MAX),
            "qcow2 header exceeds cluster size",
        ),
        refused(
            "extension longer than the cluster",
            |i| {
                i.put32(EXTENSIONS, 0x1234_5678);
                i.put32(EXTENSIONS + 4, 0xfff0);
            },
            "Header extension too large",
        ),
        refused(
            "extension length all set",
            |i| {
                i.put32(EXTENSIONS, 0x6803_f857);
                i.put32(EXTENSIONS + 4, u32::MAX);
            },
            "Header extension too large",
        ),
        refused(
            "backing format of 16 bytes",
            |i| {
                i.put32(EXTENSIONS, 0xe279_2aca);
                i.put32(EXTENSIONS + 4, 16);
            },
            "ERROR: ext_backing_format: len=16 too large (>=16)",
        ),
        refused(
            "backing name after the first cluster",
            |i| {
                i.put64(BACKING_OFFSET, 65_537);
                i.put32(BACKING_SIZE, 10);
            },
            "Invalid backing file offset",
        ),
        refused(
            "backing name at the end of the address space",
            |i| {
                i.put64(BACKING_OFFSET, u64::MAX - 255);
                i.put32(BACKING_SIZE, 10);
            },
            "Invalid backing file offset",
        ),
        refused(
            "backing name of 1024 bytes",
            |i| {
                i.put64(BACKING_OFFSET, 0x400);
                i.put32(BACKING_SIZE, 1024);
            },
            "Backing file name too long",
        ),
    ]
}

/// Offsets and sizes of the tables.
fn table_places() -> Vec<Case> {
    const NOT_ALIGNED: u64 = 0x1_0001;
    vec![
        refused(
            "refcount table unaligned",
            |i| i.put64(REFCOUNT_OFFSET, NOT_ALIGNED),
            "Reference count table offset invalid",
        ),
        refused(
            "refcount table offset overflows",
            |i| i.put64(REFCOUNT_OFFSET, u64::MAX - 0xffff),
            "Reference count table offset invalid",
        ),
        case(
            "refcount table past the end",
            |i| i.put64(REFCOUNT_OFFSET, 1 << 40),
            Expect::NotWritable(""),
        ),
        case(
            "refcount table over the header",
            |i| i.put64(REFCOUNT_OFFSET, 0),
            Expect::NotWritable(""),
        ),
        case("refcount table of no clusters", |i| i.put32(REFCOUNT_CLUSTERS, 0), Expect::Survives),
        refused(
            "refcount table of 2^32 clusters",
            |i| i.put32(REFCOUNT_CLUSTERS, u32::MAX),
            "Reference count table too large",
        ),
        refused(
            "refcount table of 8 MiB and a cluster",
            |i| i.put32(REFCOUNT_CLUSTERS, 129),
            "Reference count table too large",
        ),
        refused("L1 of 2^32 entries", |i| i.put32(L1_SIZE, u32::MAX), "Active L1 table too large"),
        refused("L1 too small for the size", |i| i.put32(L1_SIZE, 0), "L1 table is too small"),
        refused("L1 unaligned", |i| i.put64(L1_OFFSET, 0x3_0001), "Active L1 table offset invalid"),
        refused(
            "L1 offset overflows",
            |i| i.put64(L1_OFFSET, u64::MAX - 0xffff),
            "Active L1 table offset invalid",
        ),
        case("L1 past the end", |i| i.put64(L1_OFFSET, 1 << 40), Expect::Survives),
        case("L1 over the header", |i| i.put64(L1_OFFSET, 0), Expect::NotWritable("")),
        case(
            "L1 over the refcount table",
            |i| i.put64(L1_OFFSET, 0x1_0000),
            Expect::NotWritable(""),
        ),
        case("refcount table over L1", |i| i.put64(REFCOUNT_OFFSET, 0x3_0000), Expect::Survives),
        case("more snapshots than allowed", |i| i.put32(SNAPSHOTS, 65_537), Expect::Survives),
        case(
            "snapshot table unaligned",
            |i| {
                i.put32(SNAPSHOTS, 1);
                i.put64(SNAPSHOTS_OFFSET, NOT_ALIGNED);
            },
            Expect::Survives,
        ),
        case(
            "snapshot table past the end",
            |i| {
                i.put32(SNAPSHOTS, 1);
                i.put64(SNAPSHOTS_OFFSET, 1 << 40);
            },
            Expect::Survives,
        ),
        case(
            "snapshot table on data",
            |i| {
                i.put32(SNAPSHOTS, 3);
                i.put64(SNAPSHOTS_OFFSET, 0x5_0000);
            },
            Expect::Survives,
        ),
    ]
}

/// Feature bits and the compression type.
fn features() -> Vec<Case> {
    vec![
        refused(
            "unknown incompatible bit 63",
            |i| i.put64(INCOMPATIBLE, 1 << 63),
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000",
        ),
        refused(
            "unknown incompatible bit 5",
            |i| i.put64(INCOMPATIBLE, 0x20),
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 20",
        ),
        case("unknown compatible bit", |i| i.put64(COMPATIBLE, 1 << 63), Expect::Harmless),
        case("unknown autoclear bit", |i| i.put64(AUTOCLEAR, 1 << 63), Expect::Harmless),
        case("dirty", |i| i.put64(INCOMPATIBLE, 1), Expect::Harmless),
        case(
            "marked corrupt",
            |i| i.put64(INCOMPATIBLE, 2),
            Expect::ReadOnly("qcow2: Image is corrupt; cannot be opened read/write"),
        ),
        case("external data file without one", |i| i.put64(INCOMPATIBLE, 4), Expect::Survives),
        case(
            "extended L2 entries on plain tables",
            |i| i.put64(INCOMPATIBLE, 0x10),
            Expect::Survives,
        ),
        refused(
            "compression bit with zlib",
            |i| i.put64(INCOMPATIBLE, 8),
            "qcow2: Compression type incompatible feature bit must not be set",
        ),
        refused(
            "zstd without its bit",
            |i| i.put(COMPRESSION, &[1]),
            "qcow2: Compression type incompatible feature bit must be set",
        ),
        refused(
            "unknown compression",
            |i| {
                i.put64(INCOMPATIBLE, 8);
                i.put(COMPRESSION, &[7]);
            },
            "qcow2: unknown compression type: 7",
        ),
    ]
}

/// The file is shorter than the header requires.
fn cut_off() -> Vec<Case> {
    vec![
        refused("an empty file", |i| i.truncate(0), "Image is not in qcow2 format"),
        refused("3 bytes", |i| i.truncate(3), "Image is not in qcow2 format"),
        refused("the magic alone", |i| i.truncate(4), "Unsupported qcow2 version 0"),
        refused("71 bytes", |i| i.truncate(71), "qcow2 header too short"),
        refused("103 bytes", |i| i.truncate(103), "qcow2 header too short"),
        case("the header alone", |i| i.truncate(104), Expect::Survives),
        case("one cluster", |i| i.truncate(0x1_0000), Expect::Survives),
        case("up to the L1 table", |i| i.truncate(0x3_0000), Expect::Survives),
        case("up to the L2 table", |i| i.truncate(0x4_0000), Expect::Survives),
        case("inside the data", |i| i.truncate(0x6_1234), Expect::Survives),
    ]
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    let tables = [super::qcow2_tables::cases(), super::qcow2_extra::cases()].concat();
    [plain_fields(), lengths(), table_places(), features(), cut_off(), tables].concat()
}
