//! Corrupt VDI images: header fields, entries of the block map, truncated files.

use super::image::Image;
use super::mutate;
use super::{Case, Expect};
use crate::program::Program;
use crate::random::Random;

/// The offset of the block map in these images, in bytes.
const MAP: usize = 0x200;
/// The size of a block, in bytes.
const BLOCK: usize = 1 << 20;

/// Offsets of header fields, in bytes.
mod field {
    pub(super) const SIGNATURE: usize = 0x40;
    pub(super) const VERSION: usize = 0x44;
    pub(super) const TYPE: usize = 0x4c;
    pub(super) const MAP_OFFSET: usize = 0x154;
    pub(super) const DATA_OFFSET: usize = 0x158;
    pub(super) const SECTOR_SIZE: usize = 0x168;
    pub(super) const DISK_SIZE: usize = 0x170;
    pub(super) const BLOCK_SIZE: usize = 0x178;
    pub(super) const BLOCKS: usize = 0x180;
    pub(super) const ALLOCATED: usize = 0x184;
    pub(super) const LINK: usize = 0x1a8;
    pub(super) const PARENT: usize = 0x1b8;
}

use field::*;

/// Returns a good image of 8 MiB. Blocks 0, 1, 3 and 6 of the disk have data.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good() -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    tool("qemu-img", &["create", "-q", "-f", "vdi", "good.vdi", "8M"]);
    let writes = ["-c", "write -P 1 0 2M", "-c", "write -P 2 3M 64k", "-c", "write -P 3 6M 1M"];
    tool("qemu-io", &[&["-f", "vdi"], &writes[..], &["good.vdi"]].concat());
    Image::new(std::fs::read(scratch.path().join("good.vdi")).expect("the good image"))
}

fn put(image: &mut Image, offset: usize, value: u32) {
    image.put(offset, &value.to_le_bytes());
}

fn entry(image: &mut Image, block: usize, value: u32) {
    put(image, MAP + 4 * block, value);
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn refused(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Refused(text))
}

fn header() -> Vec<Case> {
    vec![
        refused("signature", |i| put(i, SIGNATURE, 0), "bad signature 00000000"),
        refused("version 1.2", |i| put(i, VERSION, 0x1_0002), "version 1.2"),
        refused("version 0.1", |i| put(i, VERSION, 1), "version 0.1"),
        refused("sector size 0", |i| put(i, SECTOR_SIZE, 0), "sector size 0 is not 512"),
        refused("block size 0", |i| put(i, BLOCK_SIZE, 0), "block size 0 is not 1048576"),
        refused("block size 2^31", |i| put(i, BLOCK_SIZE, 1 << 31), "block size 2147483648"),
        refused(
            "unaligned map offset",
            |i| put(i, MAP_OFFSET, 0x201),
            "unaligned block map offset 0x201",
        ),
        refused(
            "map offset in the header",
            |i| put(i, MAP_OFFSET, 0),
            "block map offset 0x0 within the header",
        ),
        refused("unaligned data offset", |i| put(i, DATA_OFFSET, 0x401), "unaligned data offset"),
        refused(
            "data offset in the header",
            |i| put(i, DATA_OFFSET, 0),
            "data offset 0x0 before the end of the block map",
        ),
        refused(
            "data offset on the map",
            |i| put(i, DATA_OFFSET, 0x200),
            "data offset 0x200 before the end of the block map",
        ),
        refused(
            "block map past the end of the file",
            |i| {
                put(i, MAP_OFFSET, 0xffff_fc00);
                put(i, DATA_OFFSET, 0xffff_fe00);
            },
            "but the file ends at",
        ),
        refused(
            "fewer blocks than the disk needs",
            |i| put(i, BLOCKS, 7),
            "disk size 8388608, image bitmap has room for 7340032",
        ),
        refused(
            "more blocks than there may be",
            |i| put(i, BLOCKS, u32::MAX),
            "too many blocks 4294967295, max is 536870784",
        ),
        refused(
            "most blocks that there may be",
            |i| put(i, BLOCKS, 0x1fff_ff80),
            "data offset 0x400 before the end of the block map",
        ),
        refused(
            "disk size 2^64 - 1",
            |i| i.put(DISK_SIZE, &[0xff; 8]),
            "size is 0xffffffffffffffff",
        ),
        refused("disk size 2^63", |i| i.put(DISK_SIZE + 7, &[0x80]), "size is 0x8000000000800000"),
        case("disk size 0", |i| i.put(DISK_SIZE, &[0; 8]), Expect::Survives),
        case("disk size 1000", |i| put(i, DISK_SIZE, 1000), Expect::Survives),
        refused("link", |i| put(i, LINK, 1), "non-NULL link UUID"),
        refused("parent", |i| put(i, PARENT, 1), "non-NULL parent UUID"),
        case("unknown type", |i| put(i, TYPE, 77), Expect::Harmless),
        refused("cut off in the header", |i| i.truncate(0x100), "sector size 0 is not 512"),
        refused("cut off in the map", |i| i.truncate(0x210), "but the file ends at 0x210"),
        refused("empty", |i| i.truncate(0), "bad signature 00000000"),
    ]
}

fn map() -> Vec<Case> {
    vec![
        case(
            "two entries for one block",
            |i| entry(i, 4, 1),
            Expect::NotWritable("block index 1 also used by 1"),
        ),
        case(
            "all entries for one block",
            |i| (0..8).for_each(|block| entry(i, block, 0)),
            Expect::NotWritable("block index 0 also used by 0"),
        ),
        case(
            "an entry too large",
            |i| entry(i, 4, 8),
            Expect::NotWritable("block index 4 too large, is 8"),
        ),
        case(
            "an entry of 2^32 - 3",
            |i| entry(i, 4, 0xffff_fffd),
            Expect::NotWritable("block index 4 too large, is 4294967293"),
        ),
        case(
            "an entry behind the end of the file",
            |i| entry(i, 4, 7),
            Expect::Damaged("block index 4 behind the end of the file, is 7"),
        ),
        case(
            "cut off in a block",
            |i| i.truncate(0x400 + 3 * BLOCK + 5),
            Expect::Damaged("block index 6 behind the end of the file, is 3"),
        ),
        case("a block discarded that is counted", |i| entry(i, 3, 0xffff_fffe), Expect::Leaking),
        case("too many blocks counted", |i| put(i, ALLOCATED, 6), Expect::Leaking),
        case(
            "more blocks counted than there may be",
            |i| put(i, ALLOCATED, u32::MAX),
            Expect::Damaged("allocated blocks mismatch, is 4, should be 4294967295"),
        ),
        case(
            "too few blocks counted",
            |i| put(i, ALLOCATED, 1),
            Expect::Damaged("allocated blocks mismatch, is 4, should be 1"),
        ),
        case(
            "a gap, and as many blocks counted as are used",
            |i| {
                entry(i, 1, u32::MAX);
                put(i, ALLOCATED, 3);
            },
            Expect::Damaged("blocks up to 4 in use, but 3 are allocated"),
        ),
    ]
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    let mut cases = header();
    cases.extend(map());
    cases
}

/// Changes up to eight words: header fields, entries of the block map, or unused bytes after the block map.
pub fn damage(random: &mut Random, bytes: &mut [u8]) {
    mutate::little_words(random, bytes, SIGNATURE..MAP, MAP..MAP + 256);
}
