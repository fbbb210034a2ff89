//! Corrupt parallels images: header fields, BAT entries, truncated files.

use super::image::Image;
use super::mutate;
use super::{Case, Expect};
use crate::program::Program;
use crate::random::Random;

/// The offset of the BAT, in bytes.
const BAT: usize = 64;
/// The size of a cluster, in bytes.
const CLUSTER: usize = 1 << 20;

/// Offsets of header fields, in bytes.
mod field {
    pub(super) const VERSION: usize = 16;
    pub(super) const HEADS: usize = 20;
    pub(super) const TRACKS: usize = 28;
    pub(super) const ENTRIES: usize = 32;
    pub(super) const SECTORS: usize = 36;
    pub(super) const IN_USE: usize = 44;
    pub(super) const DATA_OFF: usize = 48;
    pub(super) const FLAGS: usize = 52;
    pub(super) const EXT_OFF: usize = 56;
}

use field::*;

/// Returns a good image of 8 MiB. Clusters 0, 1, 3 and 6 of the disk have data.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good() -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    tool("qemu-img", &["create", "-q", "-f", "parallels", "good", "8M"]);
    let writes = ["-c", "write -P 1 0 2M", "-c", "write -P 2 3M 64k", "-c", "write -P 3 6M 1M"];
    tool("qemu-io", &[&["-f", "parallels"], &writes[..], &["good"]].concat());
    Image::new(std::fs::read(scratch.path().join("good")).expect("the good image"))
}

fn put(image: &mut Image, offset: usize, value: u32) {
    image.put(offset, &value.to_le_bytes());
}

fn entry(image: &mut Image, cluster: usize, value: u32) {
    put(image, BAT + 4 * cluster, value);
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn refused(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Refused(text))
}

/// Returns all cases.
pub fn cases() -> Vec<Case> {
    vec![
        refused("magic", |i| put(i, 4, 0), "Image not in Parallels format"),
        refused("version 3", |i| put(i, VERSION, 3), "Image not in Parallels format"),
        refused("no tracks", |i| put(i, TRACKS, 0), "Zero sectors per track"),
        refused("tracks 2^32 - 1", |i| put(i, TRACKS, u32::MAX), "Too big cluster"),
        refused("tracks 0x3fffff", |i| put(i, TRACKS, 0x3f_ffff), "Too big cluster"),
        refused("BAT of 2^32 - 1 entries", |i| put(i, ENTRIES, u32::MAX), "Catalog too large"),
        refused("BAT of 2^29 entries", |i| put(i, ENTRIES, 1 << 29), "Catalog too large"),
        refused("BAT past the end", |i| put(i, ENTRIES, 1 << 24), "BAT up to 0x4000040"),
        case("BAT shorter than the disk", |i| put(i, ENTRIES, 3), Expect::Survives),
        refused("2^64 - 1 sectors", |i| i.put(SECTORS, &[0xff; 8]), "File too large"),
        refused("2^54 sectors", |i| i.put(SECTORS + 6, &[0x40]), "File too large"),
        case("no sectors", |i| i.put(SECTORS, &[0; 8]), Expect::Survives),
        case("no heads", |i| put(i, HEADS, 0), Expect::Harmless),
        case("unknown flags", |i| put(i, FLAGS, u32::MAX), Expect::Harmless),
        refused("cut off in the header", |i| i.truncate(60), "Image not in Parallels format"),
        refused("cut off in the BAT", |i| i.truncate(70), "BAT up to 0x60, but the file ends"),
        case(
            "not closed",
            |i| put(i, IN_USE, 0x746f_6e59),
            Expect::Damaged("image was not closed correctly"),
        ),
        case(
            "data offset 0",
            |i| put(i, DATA_OFF, 0),
            Expect::Damaged("data_off field has incorrect value"),
        ),
        case(
            "data offset in the BAT",
            |i| put(i, DATA_OFF, 1),
            Expect::Damaged("data_off field has incorrect value"),
        ),
        case(
            "data offset far out",
            |i| put(i, DATA_OFF, u32::MAX),
            Expect::Damaged("data_off field has incorrect value"),
        ),
        case(
            "data offset behind clusters",
            |i| put(i, DATA_OFF, 0x1000),
            Expect::Damaged("cluster 0 is outside image"),
        ),
        case("extension offset without an extension", |i| put(i, EXT_OFF, 0x800), Expect::Survives),
        case("extension far out", |i| i.put(EXT_OFF, &[0xff; 8]), Expect::Survives),
        case(
            "two entries for one cluster",
            |i| entry(i, 4, 1),
            Expect::Damaged("duplicate offset in BAT entry 4"),
        ),
        case(
            "all entries for one cluster",
            |i| (0..8).for_each(|cluster| entry(i, cluster, 1)),
            Expect::Damaged("duplicate offset in BAT entry 7"),
        ),
        case(
            "an entry behind the end of the file",
            |i| entry(i, 4, 20),
            Expect::Damaged("cluster 4 is outside image"),
        ),
        case(
            "an entry of 2^32 - 1",
            |i| entry(i, 4, u32::MAX),
            Expect::Damaged("cluster 4 is outside image"),
        ),
        case(
            "cut off in a cluster",
            |i| i.truncate(4 * CLUSTER + 5),
            Expect::Damaged("cluster 6 is outside image"),
        ),
        case("space at the end", |i| i.put(6 * CLUSTER, &[1]), Expect::Leaking),
        case("a cluster to which no entry refers", |i| entry(i, 3, 0), Expect::Harmless),
    ]
}

/// Changes up to eight words: header fields, BAT entries, or unused bytes after the BAT.
pub fn damage(random: &mut Random, bytes: &mut [u8]) {
    mutate::little_words(random, bytes, 16..BAT, BAT..BAT + 256);
}
