//! Corrupt VPC images: footers, header fields, entries of the BAT, truncated files.

use super::image::Image;
use super::mutate;
use super::{Case, Expect};
use crate::program::Program;
use crate::random::Random;

/// The offset of the header in dynamic images, in bytes.
const HEADER: usize = 512;
/// The offset of the BAT in dynamic images, in bytes.
const TABLE: usize = 0x600;
/// The size of a block in the file, in bytes.
const STRIDE: usize = (2 << 20) + 512;
/// The length of a footer, in bytes.
const FOOTER: usize = 512;

/// Offsets of fields, in bytes.
mod field {
    pub(super) const HEADER_OFFSET: usize = 16;
    pub(super) const TIME: usize = 24;
    pub(super) const CREATOR: usize = 28;
    pub(super) const SIZE: usize = 48;
    pub(super) const GEOMETRY: usize = 56;
    pub(super) const TYPE: usize = 60;
    pub(super) const CHECKSUM: usize = 64;
    pub(super) const TABLE_OFFSET: usize = 512 + 16;
    pub(super) const ENTRIES: usize = 512 + 28;
    pub(super) const BLOCK_SIZE: usize = 512 + 32;
}

use field::*;

/// Returns a good image of 8 MiB with a subformat. Blocks 0, 1 and 3 of a dynamic image have data.
///
/// # Panics
/// When the QEMU tools are missing.
pub fn good(subformat: &str) -> Image {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tool = |name: &str, args: &[&str]| {
        Program::new(name).args(args).directory(scratch.path()).succeed();
    };
    let options = format!("force_size=on,subformat={subformat}");
    tool("qemu-img", &["create", "-q", "-f", "vpc", "-o", &options, "good.vhd", "8M"]);
    let writes = ["-c", "write -P 1 0 2M", "-c", "write -P 2 3M 64k", "-c", "write -P 3 6M 1M"];
    tool("qemu-io", &[&["-f", "vpc"], &writes[..], &["good.vhd"]].concat());
    Image::new(std::fs::read(scratch.path().join("good.vhd")).expect("the good image"))
}

/// Writes the correct checksum into a footer.
fn correct(footer: &mut [u8]) {
    footer[CHECKSUM..CHECKSUM + 4].fill(0);
    let sum = footer.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
    footer[CHECKSUM..CHECKSUM + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Returns the offset of the footer in the last sector.
fn last(bytes: &[u8]) -> usize {
    bytes.len().saturating_sub(1) / FOOTER * FOOTER
}

/// Writes a field of the footer at `at`, and its correct checksum.
fn put_at(image: &mut Image, at: usize, field: usize, value: &[u8]) {
    let mut footer = image.bytes()[at..at + FOOTER].to_vec();
    footer[field..field + value.len()].copy_from_slice(value);
    correct(&mut footer);
    image.put(at, &footer);
}

/// Writes a field of the last footer.
fn put_last(image: &mut Image, field: usize, value: &[u8]) {
    let at = last(image.bytes());
    put_at(image, at, field, value);
}

/// Writes a field of both footers.
fn put_both(image: &mut Image, field: usize, value: &[u8]) {
    put_at(image, 0, field, value);
    put_last(image, field, value);
}

/// Sets the size of the disk in all footers of an image.
pub fn set_size(bytes: &mut [u8], size: u64) {
    let end = last(bytes);
    for at in [0, end] {
        if bytes.get(at..).is_some_and(|footer| footer.starts_with(b"conectix")) {
            let footer = &mut bytes[at..at + FOOTER];
            footer[SIZE..SIZE + 8].copy_from_slice(&size.to_be_bytes());
            correct(footer);
        }
    }
}

fn entry(image: &mut Image, block: usize, sector: u32) {
    image.put32(TABLE + 4 * block, sector);
}

const fn case(name: &'static str, spoil: fn(&mut Image), expect: Expect) -> Case {
    Case { name, spoil, expect }
}

fn refused(name: &'static str, spoil: fn(&mut Image), text: &'static str) -> Case {
    case(name, spoil, Expect::Refused(text))
}

fn footers() -> Vec<Case> {
    vec![
        case(
            "copy of the footer damaged",
            |i| i.put(100, &[1]),
            Expect::Damaged("the copy of the footer at the beginning is damaged"),
        ),
        case(
            "footer at the end damaged",
            |i| i.put(i.bytes().len() - 100, &[1]),
            Expect::Damaged("the file does not end with a footer"),
        ),
        case(
            "no footer at the end",
            |i| i.truncate(i.bytes().len() - FOOTER),
            Expect::Damaged("the file does not end with a footer"),
        ),
        case("the last byte cut off", |i| i.truncate(i.bytes().len() - 1), Expect::Harmless),
        case(
            "footers that differ",
            |i| put_last(i, TIME, &[1, 2, 3, 4]),
            Expect::Damaged("the footer differs from its copy"),
        ),
        refused(
            "both footers damaged",
            |i| {
                i.put(100, &[1]);
                i.put(i.bytes().len() - 100, &[1]);
            },
            "Incorrect header checksum",
        ),
        refused("empty", |i| i.truncate(0), "File too small for a VHD header"),
        refused("cut off in the copy of the footer", |i| i.truncate(511), "File too small"),
        refused("type fixed", |i| put_both(i, TYPE, &[0, 0, 0, 2]), "The image has been truncated"),
        refused(
            "type differencing",
            |i| put_both(i, TYPE, &[0, 0, 0, 4]),
            "Differencing VHD images are not supported",
        ),
        case("type 9", |i| put_both(i, TYPE, &[0, 0, 0, 9]), Expect::Harmless),
        refused(
            "a fixed and a dynamic footer",
            |i| put_last(i, TYPE, &[0, 0, 0, 2]),
            "the footer of a fixed image and the header of a dynamic image",
        ),
        refused("size 2^64 - 1", |i| put_both(i, SIZE, &[0xff; 8]), "File too large"),
        refused(
            "size 2040 GiB",
            |i| put_both(i, SIZE, &(0xff00_0000_u64 * 512).to_be_bytes()),
            "Page table too small",
        ),
        case("size 0", |i| put_both(i, SIZE, &[0; 8]), Expect::Survives),
        case("size 1000", |i| put_both(i, SIZE, &1000_u64.to_be_bytes()), Expect::Survives),
        case(
            "geometry 0",
            |i| {
                put_both(i, CREATOR, b"vpc ");
                put_both(i, GEOMETRY, &[0; 4]);
            },
            Expect::Survives,
        ),
        refused(
            "geometry too large",
            |i| {
                put_both(i, CREATOR, b"vpc ");
                put_both(i, GEOMETRY, &[0xff, 0xff, 0xff, 0xff]);
            },
            "Page table too small",
        ),
    ]
}

fn header() -> Vec<Case> {
    vec![
        refused("header cookie", |i| i.put(HEADER, &[0]), "Invalid header magic"),
        refused("header offset 0", |i| put_both(i, HEADER_OFFSET, &[0; 8]), "Invalid header magic"),
        refused(
            "header past the end of the file",
            |i| put_both(i, HEADER_OFFSET, &(1_u64 << 40).to_be_bytes()),
            "Error reading dynamic VHD header",
        ),
        refused(
            "header offset 2^64 - 1",
            |i| put_both(i, HEADER_OFFSET, &[0xff; 8]),
            "Error reading dynamic VHD header",
        ),
        case(
            "header checksum",
            |i| i.put(HEADER + 1000, &[1]),
            Expect::Damaged("the checksum of the header is wrong"),
        ),
        refused("block size 0", |i| i.put32(BLOCK_SIZE, 0), "Invalid block size 0"),
        refused("block size 256", |i| i.put32(BLOCK_SIZE, 256), "Invalid block size 256"),
        refused("block size 3 MiB", |i| i.put32(BLOCK_SIZE, 3 << 20), "Invalid block size 3145728"),
        refused("block size 512", |i| i.put32(BLOCK_SIZE, 512), "Page table too small"),
        refused(
            "block size 2^32 - 1",
            |i| i.put32(BLOCK_SIZE, u32::MAX),
            "Invalid block size 4294967295",
        ),
        case("block size 2^31", |i| i.put32(BLOCK_SIZE, 1 << 31), Expect::Survives),
        refused("too few entries", |i| i.put32(ENTRIES, 3), "Page table too small"),
        refused(
            "2^32 - 1 entries",
            |i| i.put32(ENTRIES, u32::MAX),
            "Max Table Entries too large (4294967295)",
        ),
        case("2^29 - 1 entries", |i| i.put32(ENTRIES, 0x1fff_ffff), Expect::Survives),
        refused(
            "BAT in the footer",
            |i| i.put64(TABLE_OFFSET, 0),
            "Block table offset 0x0 within the footer or the header",
        ),
        refused(
            "BAT in the header",
            |i| i.put64(TABLE_OFFSET, 0x400),
            "Block table offset 0x400 within the footer or the header",
        ),
        refused(
            "BAT past the end of the file",
            |i| i.put64(TABLE_OFFSET, 1 << 40),
            "The image has been truncated",
        ),
        refused(
            "BAT offset 2^64 - 1",
            |i| i.put64(TABLE_OFFSET, u64::MAX),
            "The image has been truncated",
        ),
        case("BAT on a block", |i| i.put64(TABLE_OFFSET, 0x1000), Expect::Survives),
    ]
}

fn table() -> Vec<Case> {
    vec![
        case(
            "two entries for one block",
            |i| entry(i, 2, 4),
            Expect::NotWritable("block 2 at sector 4 is also used by an earlier block"),
        ),
        case(
            "all entries for one block",
            |i| (0..4).for_each(|block| entry(i, block, 4)),
            Expect::NotWritable("is also used by an earlier block"),
        ),
        case(
            "an entry inside another block",
            |i| entry(i, 2, 5),
            Expect::NotWritable("block 2 at sector 5 overlaps another block"),
        ),
        case(
            "an entry for the copy of the footer",
            |i| entry(i, 2, 0),
            Expect::NotWritable("block 2 at sector 0 overlaps the metadata"),
        ),
        case(
            "all entries for the BAT",
            |i| (0..4).for_each(|block| entry(i, block, 3)),
            Expect::NotWritable("block 0 at sector 3 overlaps the metadata"),
        ),
        case(
            "an entry behind the end of the file",
            |i| entry(i, 2, 0xffff_fffe),
            Expect::NotWritable("block 2 at sector 4294967294 lies behind the end of the file"),
        ),
        case(
            "cut off in a block",
            |i| i.truncate(0x800 + 2 * STRIDE + 1000),
            Expect::NotWritable("block 3 at sector 8198 ends behind the end of the file"),
        ),
        case("a block to which no entry refers", |i| entry(i, 1, u32::MAX), Expect::Leaking),
        case(
            "space for a block at the end",
            |i| {
                let at = last(i.bytes());
                let footer = i.bytes()[at..].to_vec();
                i.put(at + STRIDE, &footer);
            },
            Expect::Leaking,
        ),
        case("sector bitmaps of zeroes", |i| i.put(0x800, &[0; 512]), Expect::Harmless),
    ]
}

/// Returns all cases of dynamic images.
pub fn dynamic() -> Vec<Case> {
    let mut cases = footers();
    cases.extend(header());
    cases.extend(table());
    cases
}

/// Returns all cases of fixed images.
pub fn fixed() -> Vec<Case> {
    vec![
        refused(
            "footer damaged",
            |i| i.put(i.bytes().len() - 100, &[1]),
            "Incorrect header checksum",
        ),
        refused("no footer", |i| i.truncate(8 << 20), "invalid VPC image"),
        refused("a byte behind the footer", |i| i.put(i.bytes().len(), &[0]), "invalid VPC image"),
        case("the last byte cut off", |i| i.truncate(i.bytes().len() - 1), Expect::Harmless),
        refused(
            "larger than the file",
            |i| put_last(i, SIZE, &((8_u64 << 20) + 512).to_be_bytes()),
            "The image has been truncated",
        ),
        refused("size 2^64 - 1", |i| put_last(i, SIZE, &[0xff; 8]), "File too large"),
        case(
            "smaller than the file",
            |i| put_last(i, SIZE, &(4_u64 << 20).to_be_bytes()),
            Expect::Harmless,
        ),
        refused(
            "guest data that looks like a dynamic image",
            |i| {
                let footer = i.bytes()[last(i.bytes())..].to_vec();
                i.put(0, &footer);
                put_at(i, 0, TYPE, &[0, 0, 0, 3]);
                put_at(i, 0, HEADER_OFFSET, &512_u64.to_be_bytes());
            },
            "the footer of a fixed image and the header of a dynamic image",
        ),
        case(
            "guest data that looks like a damaged footer",
            |i| i.put(0, b"conectix"),
            Expect::Harmless,
        ),
        refused("type dynamic", |i| put_last(i, TYPE, &[0, 0, 0, 3]), "Error reading dynamic VHD"),
    ]
}

/// Damages up to eight words of the header or of the BAT, or of the footer. The damaged footer has a correct checksum
/// in half of the images.
pub fn damage(random: &mut Random, bytes: &mut [u8], is_fixed: bool) {
    let end = last(bytes);
    if !is_fixed {
        mutate::big_words(random, bytes, HEADER + 16..HEADER + 40, TABLE..TABLE + 128);
    }
    if is_fixed || random.one_in(3) {
        let at = if is_fixed || random.one_in(2) { end } else { 0 };
        mutate::big_words(random, bytes, at + 16..at + 64, at + 48..at + 64);
        if random.one_in(2) {
            correct(&mut bytes[at..at + FOOTER]);
        }
    }
}
