//! Corrupt images with subclusters: extended L2 entries that contradict themselves or one another.

use super::image::Image;
use super::qcow2::field::{CLUSTER_BITS, INCOMPATIBLE};
use super::{Case, Expect};
use crate::program::Program;

const L1: u64 = 0x3_0000;
const L2: usize = 0x4_0000;
const COPIED: u64 = 1 << 63;
/// The L2 entry of the compressed cluster.
const COMPRESSED_ENTRY: usize = L2 + 3 * 16;

/// Returns a good image of 4 MiB with 64 KiB clusters: one cluster has data in all subclusters, one has data and zeroes in some
/// subclusters, one has only zeroes, and one is compressed.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good() -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "good.qcow2", "4M"]);
    for line in [
        "write -P 1 0 64k",
        "write -P 2 64k 10k",
        "write -z 80k 4k",
        "write -z 128k 64k",
        "write -c -P 3 192k 64k",
    ] {
        tool("qemu-io", &["-c", line, "good.qcow2"]);
    }
    Image::new(std::fs::read(scratch.path().join("good.qcow2")).expect("the good image"))
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    const CONTRADICTS: &str = "corrupted subcluster allocation bitmap";
    const NO_CLUSTER: &str = "non-zero subcluster allocation map";
    vec![
        case(
            "subclusters of 256 bytes",
            |i| i.put32(CLUSTER_BITS, 13),
            Expect::Refused("Unsupported subcluster size: 256"),
        ),
        case("plain L2 entries on extended tables", |i| i.put64(INCOMPATIBLE, 0), Expect::Survives),
        case(
            "subcluster allocated and zero",
            |i| i.put64(L2 + 8, 0x8000_0000_ffff_ffff),
            Expect::NotWritable(CONTRADICTS),
        ),
        case("bitmap all set", |i| i.put64(L2 + 8, u64::MAX), Expect::NotWritable(CONTRADICTS)),
        case(
            "subclusters allocated in no cluster",
            |i| i.put64(L2, 0),
            Expect::NotWritable(NO_CLUSTER),
        ),
        case(
            "subclusters allocated in no cluster, beside zeroes",
            |i| i.put64(L2 + 40, u64::MAX),
            Expect::Damaged(NO_CLUSTER),
        ),
        case("entry and bitmap all set", |i| i.put(L2, &[0xff; 16]), Expect::Damaged("")),
        case("bit 0 of an entry", |i| i.put64(L2, i.get64(L2) | 1), Expect::Harmless),
        case("a bitmap of nothing on a cluster", |i| i.put64(L2 + 8, 0), Expect::Harmless),
        case(
            "compressed cluster with a bitmap",
            |i| i.put64(COMPRESSED_ENTRY + 8, u64::MAX),
            Expect::Damaged("non-zero subcluster allocation bitmap"),
        ),
        case(
            "extended entry unaligned",
            |i| i.put64(L2, COPIED | 0x5_0200),
            Expect::NotWritable("not properly aligned"),
        ),
        case("extended entry to the L1 table", |i| i.put64(L2, COPIED | L1), Expect::Damaged("")),
        case(
            "cluster without data at the L2 table",
            |i| {
                i.put64(L2, COPIED | L2 as u64);
                i.put64(L2 + 8, 0);
            },
            Expect::NotWritable(""),
        ),
        case(
            "two extended entries to one cluster",
            |i| i.put64(L2 + 16, i.get64(L2)),
            Expect::Damaged(""),
        ),
    ]
}
