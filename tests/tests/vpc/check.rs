//! Repairs of VPC images lose no data, and QEMU can read the repaired images.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oxblk_tests::hostile::bounded;
use oxblk_tests::program::{Program, Reply};

/// Offset of the BAT in bytes.
const TABLE: u64 = 0x600;
/// Offset of the first block in bytes.
const DATA: u64 = 0x800;
/// Length of a block in the file, in bytes.
const STRIDE: u64 = (2 << 20) + 512;
const ABSENT: u32 = u32::MAX;

/// An image of 20 MiB. Blocks 0, 3, 5 and 9 of the disk are the first four blocks of the file.
struct Image {
    scratch: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let image = Self { scratch: tempfile::tempdir().expect("a scratch directory") };
        let create = ["create", "-q", "-f", "vpc", "-o", "force_size=on", "image", "20M"];
        image.qemu("qemu-img", &create).succeed();
        let writes =
            ["write -P 1 0 2M", "write -P 2 6M 2M", "write -P 3 10M 2M", "write -P 4 18M 2M"];
        let writes = writes.iter().flat_map(|write| ["-c", write]);
        image.qemu("qemu-io", &["-f", "vpc", "image"]).args(writes).succeed();
        image
    }

    fn qemu(&self, tool: &str, args: &[&str]) -> Program {
        Program::new(tool).args(args).directory(self.directory())
    }

    fn directory(&self) -> &Path {
        self.scratch.path()
    }

    fn file(&self) -> File {
        let path = self.directory().join("image");
        File::options().read(true).write(true).open(path).expect("the image")
    }

    fn len(&self) -> u64 {
        self.file().metadata().expect("the image").len()
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, offset).expect("the image");
    }

    fn entry(&self, block: u64, sector: u32) {
        self.put(TABLE + 4 * block, &sector.to_be_bytes());
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.directory().join("image")).expect("the image")
    }

    fn check(&self, more: &[&str]) -> Reply {
        bounded(self.directory(), &[&["img", "check", "-f", "vpc"], more, &["image"]].concat())
    }

    /// Checks that `img check` finds no fault, that the footer at the end equals its copy, and that the `qemu-io` commands
    /// `reads` succeed.
    fn assert_clean(&self, reads: &[&str]) {
        let checked = self.check(&[]);
        assert_eq!(checked.code(), 0, "{}{}", checked.out(), checked.err());
        let bytes = self.bytes();
        assert!(bytes.ends_with(&bytes[..512]), "the footer and its copy differ");
        let reads = reads.iter().flat_map(|read| ["-c", read]);
        let reply = self.qemu("qemu-io", &["-r", "-f", "vpc"]).args(reads).arg("image").succeed();
        assert!(!reply.out().contains("verification failed"), "{}", reply.out());
    }
}

const READS: [&str; 4] =
    ["read -P 1 0 2M", "read -P 2 6M 2M", "read -P 3 10M 2M", "read -P 4 18M 2M"];

#[test]
fn a_damaged_footer_is_read_and_repaired_from_the_other_one() {
    let footer = |image: &Image| image.len() - 512;
    let faults: [&dyn Fn(&Image); 5] = [
        &|image| image.put(0, &[0; 512]),
        &|image| image.put(300, &[1]),
        &|image| image.put(footer(image), &[0; 512]),
        &|image| image.file().set_len(footer(image)).expect("the image"),
        &|image| image.put(512 + 900, &[1]),
    ];
    for fault in faults {
        let image = Image::new();
        fault(&image);
        assert_eq!(image.check(&[]).code(), 2);
        assert_eq!(image.check(&["-r", "leaks"]).code(), 2);
        let read = ["io", "-r", "-f", "vpc", "-c", "read -P 4 18M 2M", "image"];
        assert_eq!(bounded(image.directory(), &read).code(), 0);
        let repaired = image.check(&["-r", "all"]);
        assert_eq!(repaired.code(), 0, "{}{}", repaired.out(), repaired.err());
        image.assert_clean(&READS);
    }
}

#[test]
fn a_copy_of_the_footer_that_differs_is_reported_and_repaired() {
    let image = Image::new();
    // Write a valid footer of a fixed image over the copy.
    let mut footer = image.bytes()[..512].to_vec();
    footer[60..64].copy_from_slice(&2_u32.to_be_bytes());
    footer[64..68].fill(0);
    let sum = footer.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    image.put(0, &footer);
    let found = image.check(&[]);
    assert_eq!(found.code(), 2);
    let text = "ERROR: the copy of the footer at the beginning differs from the footer";
    assert!(found.err().contains(text), "{}", found.err());
    let repaired = image.check(&["-r", "all"]);
    assert_eq!(repaired.code(), 0, "{}{}", repaired.out(), repaired.err());
    image.assert_clean(&READS);
}

#[test]
fn a_write_to_an_image_without_a_footer_at_its_end_leaves_one() {
    let image = Image::new();
    // Simulate a power cut that has left a part of a new block.
    image.file().set_len(image.len() - 512 + 1_000_000).expect("the image");
    image.put(image.len() - 1000, &[9; 1000]);
    let write = ["io", "-f", "vpc", "-c", "write -P 5 2M 64k", "image"];
    assert_eq!(bounded(image.directory(), &write).code(), 0);
    assert_eq!(image.len(), DATA + 5 * STRIDE + 512);
    image.assert_clean(&READS);
    image.assert_clean(&["read -P 5 2M 64k", "read -P 0 2162688 2031616"]);
}

#[test]
fn leaked_blocks_are_reported_and_the_last_block_fills_the_gap() {
    let image = Image::new();
    image.entry(3, ABSENT);
    let found = image.check(&[]);
    assert_eq!(found.code(), 3);
    assert!(found.out().contains("1 leaked clusters"), "{}", found.out());
    assert_eq!(image.check(&["-r", "leaks"]).code(), 0);
    assert_eq!(image.len(), DATA + 3 * STRIDE + 512);
    image.assert_clean(&["read -P 1 0 2M", "read -P 0 6M 2M", READS[2], READS[3]]);
}

#[test]
fn entries_of_a_shared_or_overlapping_block_get_copies_of_what_they_read() {
    let image = Image::new();
    image.entry(4, 4);
    // The entry of block 7 refers to a sector inside block 3 in the file.
    image.entry(7, u32::try_from(DATA / 512 + STRIDE / 512 + 8).expect("a sector"));
    image.entry(8, 1);
    let found = image.check(&[]);
    for text in [
        "ERROR: block 4 at sector 4 is also used by an earlier block",
        "ERROR: block 7 at sector 4109 overlaps another block",
        "ERROR: block 8 at sector 1 overlaps the metadata of the image",
    ] {
        assert!(found.err().contains(text), "{text}: {}", found.err());
    }
    let repaired = image.check(&["-r", "all"]);
    assert_eq!(repaired.code(), 0, "{}{}", repaired.out(), repaired.err());
    image.assert_clean(&READS);
    // Before the repair, block 7 contained most of block 3, then the sector bitmap and the beginning of block 5.
    image.assert_clean(&["read -P 1 8M 2M", "read -P 2 14M 2093056", "read -P 3 16773632 3584"]);
}

/// Corrupts an image, repairs it, and checks that the repair has not changed the contents of the disk.
fn repair_changes_nothing(spoil: &dyn Fn(&Image)) {
    let image = Image::new();
    spoil(&image);
    let raw = ["img", "convert", "-f", "vpc", "-O", "raw", "image", "before"];
    assert_eq!(bounded(image.directory(), &raw).code(), 0);
    assert_eq!(image.check(&[]).code(), 2);
    let repaired = image.check(&["-r", "all"]);
    assert_eq!(repaired.code(), 0, "{}{}", repaired.out(), repaired.err());
    image.assert_clean(&[]);
    let compare = ["compare", "-q", "-f", "raw", "-F", "vpc", "before", "image"];
    image.qemu("qemu-img", &compare).succeed();
    let write = ["io", "-f", "vpc", "-c", "write -P 6 2M 2M", "image"];
    assert_eq!(bounded(image.directory(), &write).code(), 0);
    image.assert_clean(&["read -P 6 2M 2M"]);
}

#[test]
fn entries_that_all_refer_to_metadata_get_copies_of_what_they_read() {
    repair_changes_nothing(&|image| {
        [0, 3, 5, 9].into_iter().for_each(|block| image.entry(block, 1));
    });
}

#[test]
fn copies_are_kept_in_an_image_whose_blocks_are_not_in_a_row() {
    repair_changes_nothing(&|image| {
        let len = image.len();
        image.file().set_len(len + 4096 + STRIDE).expect("the image");
        image.put(len + 4096, &vec![7; 2 << 20]);
        let sector = u32::try_from((len + 4096) / 512).expect("a sector");
        // Entry 1 refers to the new last block of the file. Entries 7 and 8 also refer to the first block.
        image.entry(1, sector);
        image.entry(7, 4);
        image.entry(8, 4);
    });
}

#[test]
fn a_truncated_file_is_not_read_as_zeroes_and_is_repaired() {
    let image = Image::new();
    image.file().set_len(DATA + 2 * STRIDE + 1024).expect("the image");
    let io = |command: &str| {
        bounded(image.directory(), &["io", "-r", "-f", "vpc", "-c", command, "image"])
    };
    assert_eq!(io("read -P 2 6M 2M").code(), 0);
    assert_eq!(io("read -P 3 10M 512").code(), 0);
    for lost in ["read 10M 1M", "read 18M 512"] {
        let failed = io(lost);
        assert_eq!(failed.code(), 1, "{lost}");
        assert!(failed.out().contains("read failed"), "{}", failed.out());
    }
    assert_eq!(image.check(&[]).code(), 2);
    assert_eq!(image.check(&["-r", "all"]).code(), 0);
    assert_eq!(image.len(), DATA + 3 * STRIDE + 512);
    image.assert_clean(&[READS[0], READS[1], "read -P 3 10M 512", "read -P 0 18M 2M"]);
}

#[test]
fn a_bat_of_holes_is_checked_in_bounded_memory() {
    let image = Image::new();
    // The disk has 2^22 blocks of 512 bytes. The BAT is behind all other data, and all its entries are 0.
    let table: u64 = 16 << 20;
    image.file().set_len(table + (1 << 24) + 512).expect("the image");
    image.put(512 + 16, &table.to_be_bytes());
    image.put(512 + 28, &(1_u32 << 22).to_be_bytes());
    image.put(512 + 32, &512_u32.to_be_bytes());
    let mut footer = image.bytes()[..512].to_vec();
    footer[48..56].copy_from_slice(&(1_u64 << 31).to_be_bytes());
    footer[64..68].fill(0);
    let sum = footer.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    image.put(0, &footer);
    let found = image.check(&["-q"]);
    assert_eq!(found.code(), 2);
    let text = "ERROR: block 0 at sector 0 overlaps the metadata of the image";
    assert!(found.err().contains(text), "{}", found.err());
    assert!(found.err().lines().count() < 1000);
    let repaired = image.check(&["-q", "-r", "all"]);
    assert_eq!(repaired.code(), 2);
    let said = format!("Not repaired: {} entries", 1 << 22);
    assert!(repaired.err().contains(&said), "{}", repaired.err());
}
