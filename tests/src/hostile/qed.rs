//! Corrupt QED images: header fields, table entries, truncated files.

use super::image::Image;
use super::mutate;
use super::{Case, Expect};
use crate::program::Program;
use crate::random::Random;

/// The size of a cluster of the good image, in bytes.
const CLUSTER: usize = 64 << 10;
/// The offset of its L1 table, in bytes.
const L1: usize = CLUSTER;
/// The offset of its L2 table, in bytes.
const L2: usize = 8 * CLUSTER;

/// Offsets of header fields, in bytes.
mod field {
    pub(super) const CLUSTER_SIZE: usize = 4;
    pub(super) const TABLE_SIZE: usize = 8;
    pub(super) const HEADER_SIZE: usize = 12;
    pub(super) const FEATURES: usize = 16;
    pub(super) const COMPAT: usize = 24;
    pub(super) const AUTOCLEAR: usize = 32;
    pub(super) const L1_OFFSET: usize = 40;
    pub(super) const SIZE: usize = 48;
    pub(super) const NAME_OFFSET: usize = 56;
    pub(super) const NAME_SIZE: usize = 60;
}

use field::*;

/// Returns a good image of 8 MiB. Clusters 0 to 2, 16 and 64 of the disk have data, cluster 32 is a zero cluster.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good() -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    tool("qemu-img", &["create", "-q", "-f", "qed", "good", "8M"]);
    let data = ["-c", "write -P 1 0 192k", "-c", "write -P 2 1M 64k"];
    let more = ["-c", "write -z 2M 64k", "-c", "write -P 3 4M 64k"];
    tool("qemu-io", &[&["-f", "qed"], &data[..], &more[..], &["good"]].concat());
    let image = Image::new(std::fs::read(scratch.path().join("good")).expect("the good image"));
    assert_eq!(image.bytes()[L1..L1 + 8], (L2 as u64).to_le_bytes(), "the place of the L2 table");
    image
}

fn put32(image: &mut Image, offset: usize, value: u32) {
    image.put(offset, &value.to_le_bytes());
}

fn put64(image: &mut Image, offset: usize, value: u64) {
    image.put(offset, &value.to_le_bytes());
}

/// Changes the L1 entry at an index.
fn l1(image: &mut Image, index: usize, value: u64) {
    put64(image, L1 + 8 * index, value);
}

/// Changes the L2 entry of a cluster of the disk.
fn l2(image: &mut Image, cluster: usize, value: u64) {
    put64(image, L2 + 8 * cluster, value);
}

/// The offset of a cluster of the file, in bytes.
const fn at(cluster: usize) -> u64 {
    (cluster * CLUSTER) as u64
}

fn name(image: &mut Image, offset: u32, len: u32) {
    put64(image, FEATURES, 1);
    put32(image, NAME_OFFSET, offset);
    put32(image, NAME_SIZE, len);
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn refused(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Refused(text))
}

fn damaged(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Damaged(text))
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    let mut cases = header_cases();
    cases.extend(table_cases());
    cases
}

fn header_cases() -> Vec<Case> {
    vec![
        refused("magic", |i| put32(i, 0, 0), "Image not in QED format"),
        refused("cluster size 0", |i| put32(i, CLUSTER_SIZE, 0), "QED cluster size is invalid"),
        refused("cluster size 2 KiB", |i| put32(i, CLUSTER_SIZE, 2048), "QED cluster size is"),
        refused("cluster size 5,000", |i| put32(i, CLUSTER_SIZE, 5000), "QED cluster size is"),
        refused("cluster size 128 MiB", |i| put32(i, CLUSTER_SIZE, 1 << 27), "QED cluster size is"),
        case("cluster size 4 KiB", |i| put32(i, CLUSTER_SIZE, 4096), Expect::Survives),
        refused("cluster size 64 MiB", |i| put32(i, CLUSTER_SIZE, 1 << 26), "QED table offset is"),
        refused("table size 0", |i| put32(i, TABLE_SIZE, 0), "QED table size is invalid"),
        refused("table size 3", |i| put32(i, TABLE_SIZE, 3), "QED table size is invalid"),
        refused("table size 2^31", |i| put32(i, TABLE_SIZE, 1 << 31), "QED table size is invalid"),
        refused("table size 16", |i| put32(i, TABLE_SIZE, 16), "QED table offset is invalid"),
        case("header size 0", |i| put32(i, HEADER_SIZE, 0), Expect::Harmless),
        refused("header over the L1 table", |i| put32(i, HEADER_SIZE, 2), "QED table offset is"),
        refused("header of 2^32 - 1 clusters", |i| put32(i, HEADER_SIZE, u32::MAX), "QED table"),
        refused("unknown feature 3", |i| put64(i, FEATURES, 8), "Unsupported QED features: 8"),
        refused("unknown feature 63", |i| put64(i, FEATURES, 1 << 63), "Unsupported QED features"),
        case("unknown compatible features", |i| put64(i, COMPAT, u64::MAX), Expect::Harmless),
        case("unknown autoclear features", |i| put64(i, AUTOCLEAR, u64::MAX), Expect::Harmless),
        case("not closed", |i| put64(i, FEATURES, 2), Expect::Harmless),
        refused("L1 in the header", |i| put64(i, L1_OFFSET, 0), "QED table offset is invalid"),
        refused("L1 unaligned", |i| put64(i, L1_OFFSET, at(1) + 512), "QED table offset is"),
        refused("L1 past the end", |i| put64(i, L1_OFFSET, 1 << 30), "QED table offset is invalid"),
        refused("L1 overflows", |i| put64(i, L1_OFFSET, u64::MAX << 16), "QED table offset is"),
        case("L1 over data", |i| put64(i, L1_OFFSET, at(5)), Expect::Survives),
        refused("size of half a sector", |i| put64(i, SIZE, 256), "QED image size is invalid"),
        refused("size 2^64 - 512", |i| put64(i, SIZE, u64::MAX - 511), "QED image size is invalid"),
        refused("size 65 TiB", |i| put64(i, SIZE, 65 << 40), "QED image size is invalid"),
        case("size 64 TiB", |i| put64(i, SIZE, 64 << 40), Expect::Harmless),
        case("size 0", |i| put64(i, SIZE, 0), Expect::Survives),
        refused("backing name past the header", |i| name(i, 65_530, 16), "QED backing filename"),
        refused("backing name of 4 GiB", |i| name(i, 64, u32::MAX), "QED backing filename"),
        refused("backing name of 5,000 bytes", |i| name(i, 64, 5000), "QED backing filename"),
        case("backing name of no bytes", |i| name(i, 64, 0), Expect::Harmless),
        case("backing name of zeroes", |i| name(i, 64, 10), Expect::Harmless),
        refused("cut off in the header", |i| i.truncate(60), "Image not in QED format"),
        refused("cut off in the L1 table", |i| i.truncate(2 * CLUSTER), "QED table offset is"),
    ]
}

fn table_cases() -> Vec<Case> {
    vec![
        damaged("L1 entry unaligned", |i| l1(i, 0, at(8) + 512), "L1 entry 0x80200 at 0 is"),
        damaged("L1 entry past the end", |i| l1(i, 0, at(1000)), "L1 entry 0x3e80000 at 0 is"),
        damaged("L1 entry near the end", |i| l1(i, 1, at(13)), "L1 entry 0xd0000 at 1 is invalid"),
        damaged("L1 entry 1", |i| l1(i, 1, 1), "L1 entry 0x1 at 1 is invalid"),
        damaged("L1 entry all set", |i| l1(i, 5, u64::MAX), "L1 entry 0xffffffffffffffff at 5"),
        damaged("L1 entry for the L1 table", |i| l1(i, 1, at(1)), "shares 4 clusters"),
        damaged("L1 entry for another table", |i| l1(i, 1, at(8)), "shares 4 clusters"),
        damaged("L1 entry for data", |i| l1(i, 1, at(4)), "shares 1 clusters"),
        damaged("L1 of one table", |i| (0..1024).for_each(|n| l1(i, n, at(8))), "shares 4"),
        case("L1 entry 0", |i| l1(i, 0, 0), Expect::Leaking),
        damaged("L2 entry unaligned", |i| l2(i, 1, at(6) + 512), "L2 entry 0x60200 of offset"),
        damaged("L2 entry 2", |i| l2(i, 1, 2), "L2 entry 0x2 of offset 0x10000 is invalid"),
        damaged("L2 entry past the end", |i| l2(i, 1, at(1000)), "L2 entry 0x3e80000 of offset"),
        damaged("L2 entry all set", |i| l2(i, 1, u64::MAX), "L2 entry 0xffffffffffffffff of"),
        damaged("L2 entry for the L1 table", |i| l2(i, 1, at(2)), "used more than once"),
        damaged("L2 entry for its table", |i| l2(i, 1, at(8)), "used more than once"),
        damaged("two L2 entries for one cluster", |i| l2(i, 9, at(5)), "used more than once"),
        damaged(
            "all L2 entries for one cluster",
            |i| (0..32768).for_each(|cluster| l2(i, cluster, at(5))),
            "used more than once",
        ),
        damaged(
            "all L2 entries invalid",
            |i| (0..32768).for_each(|cluster| l2(i, cluster, 3)),
            "L2 entry 0x3 of offset 0x0 is invalid, and 32767 more entries",
        ),
        case("L2 entry behind the disk", |i| l2(i, 5000, at(14)), Expect::Survives),
        case("L2 entry 0", |i| l2(i, 1, 0), Expect::Leaking),
        case("space at the end", |i| i.put(17 * CLUSTER, &[1]), Expect::Leaking),
        damaged("cut off in the data", |i| i.truncate(13 * CLUSTER), "L2 entry 0xd0000 of offset"),
    ]
}

/// Damages up to eight header fields or table entries. Most entries become multiples of the cluster size.
pub fn damage(cluster: u64, random: &mut Random, bytes: &mut [u8]) {
    let words = bytes.len() / 8;
    for _ in 0..random.within(1, 8) {
        let place = match random.below(4) {
            0 => 8 * random.below(8),
            1 => cluster + 8 * random.below(8),
            2 => cluster * random.below((bytes.len() as u64 / cluster).max(1)),
            _ => 8 * random.below(words as u64),
        };
        let value = match random.below(4) {
            0 => mutate::interesting(random, bytes.len() as u64),
            1 => random.below(4),
            _ => cluster * random.below(2 * (bytes.len() as u64 / cluster).max(1)),
        };
        let place = usize::try_from(place).expect("an offset in memory");
        if let Some(word) = bytes.get_mut(place..place + 8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}
