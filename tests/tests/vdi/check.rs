//! Repairs of VDI images lose no data, free only blocks that cannot contain data of the disk, and leave images that pass QEMU's
//! check.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oxblk_tests::hostile::bounded;
use oxblk_tests::program::{Program, Reply};

/// The byte offset of the header field with the number of allocated blocks.
const ALLOCATED: u64 = 0x184;
/// The byte offset of the block map.
const MAP: u64 = 0x200;
/// The byte offset of the blocks in the file.
const DATA: u64 = 0x400;
const MIB: u64 = 1 << 20;
/// The map entry of a block that is not allocated.
const ABSENT: u32 = u32::MAX;

/// An image of 10 MiB. Blocks 0, 3, 5 and 9 of the disk are blocks 0 to 3 of the file.
struct Image {
    scratch: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let image = Self { scratch: tempfile::tempdir().expect("a scratch directory") };
        image.qemu("qemu-img", &["create", "-q", "-f", "vdi", "image", "10M"]).succeed();
        let writes =
            ["write -P 1 0 1M", "write -P 2 3M 1M", "write -P 3 5M 1M", "write -P 4 9M 1M"];
        let writes = writes.iter().flat_map(|write| ["-c", write]);
        image.qemu("qemu-io", &["-f", "vdi", "image"]).args(writes).succeed();
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
        File::options().write(true).open(path).expect("the image")
    }

    fn len(&self) -> u64 {
        self.file().metadata().expect("the image").len()
    }

    fn put(&self, offset: u64, value: u32) {
        self.file().write_all_at(&value.to_le_bytes(), offset).expect("the image");
    }

    fn entry(&self, block: u64, value: u32) {
        self.put(MAP + 4 * block, value);
    }

    /// Stores the current contents of the disk.
    fn remember(&self) {
        self.qemu("qemu-img", &["convert", "-f", "vdi", "-O", "raw", "image", "before"]).succeed();
    }

    fn check(&self, more: &[&str]) -> Reply {
        bounded(self.directory(), &[&["img", "check", "-f", "vdi"], more, &["image"]].concat())
    }

    fn assert_unchanged_and_clean(&self) {
        self.qemu("qemu-img", &["compare", "-q", "-f", "raw", "-F", "vdi", "before", "image"])
            .succeed();
        self.qemu("qemu-img", &["check", "-q", "image"]).succeed();
        assert_eq!(self.check(&[]).code(), 0);
    }
}

#[test]
fn leaked_blocks_are_reported_and_the_last_blocks_fill_the_gaps() {
    let image = Image::new();
    image.entry(0, ABSENT);
    image.put(ALLOCATED, 5);
    image.remember();
    let found = image.check(&[]);
    assert_eq!(found.code(), 3);
    assert!(found.err().contains("Leaked blocks: 2 of the 5 allocated blocks are unused"));
    let repaired = image.check(&["-r", "leaks"]);
    assert_eq!(repaired.code(), 0, "{}", repaired.err());
    assert!(repaired.out().contains("2 leaked clusters"), "{}", repaired.out());
    assert_eq!(image.len(), DATA + 3 * MIB);
    image.assert_unchanged_and_clean();
}

#[test]
fn gaps_are_filled_when_an_image_is_closed_after_writing() {
    let image = Image::new();
    image.entry(3, ABSENT);
    image.remember();
    let io = ["io", "-f", "vdi", "-c", "read -P 3 5M 1M", "image"];
    Program::oxblk().args(io).directory(image.directory()).succeed();
    image.assert_unchanged_and_clean();
}

#[test]
fn a_wrong_count_is_repaired() {
    for count in [0, 3, 11, u32::MAX] {
        let image = Image::new();
        image.put(ALLOCATED, count);
        image.remember();
        assert_eq!(image.check(&[]).code(), 2);
        assert_eq!(image.check(&["-r", "leaks"]).code(), 2);
        assert_eq!(image.check(&["-r", "all"]).code(), 0);
        image.assert_unchanged_and_clean();
    }
}

#[test]
fn a_gap_that_the_count_hides_is_found() {
    let image = Image::new();
    image.entry(3, ABSENT);
    image.put(ALLOCATED, 3);
    image.remember();
    image.qemu("qemu-img", &["check", "-q", "image"]).succeed();
    assert!(image.check(&[]).err().contains("ERROR: blocks up to 4 in use, but 3 are allocated"));
    assert_eq!(image.check(&["-r", "all"]).code(), 0);
    image.assert_unchanged_and_clean();
}

#[test]
fn a_repair_copies_shared_blocks_and_does_not_reuse_unreferenced_blocks() {
    let image = Image::new();
    // After this change, no entry refers to block 2 of the file. This block contains the data of the disk at 5 MiB.
    image.entry(5, 1);
    image.entry(6, 1);
    image.remember();
    assert_eq!(image.check(&["-r", "leaks"]).code(), 2);
    let repaired = image.check(&["-r", "all"]);
    assert_eq!(repaired.code(), 3, "{}", repaired.err());
    let lost = std::fs::read(image.directory().join("image")).expect("the image");
    let at = usize::try_from(DATA + 2 * MIB).expect("a small image");
    assert!(lost[at..at + (1 << 20)].iter().all(|byte| *byte == 3));
    assert_eq!(image.check(&["-r", "leaks"]).code(), 0);
    image.assert_unchanged_and_clean();
}

#[test]
fn a_repair_keeps_the_data_of_too_large_entries() {
    let image = Image::new();
    image.entry(4, 20);
    // The block is inside the file, but behind all blocks that the image may have.
    image.file().write_all_at(&[7; 1 << 20], DATA + 11 * MIB).expect("the image");
    image.entry(6, 11);
    image.remember();
    assert_eq!(image.check(&["-r", "all"]).code(), 0);
    image.assert_unchanged_and_clean();
}

#[test]
fn a_truncated_file_is_repaired() {
    let image = Image::new();
    image.file().set_len(image.len() - MIB - 5).expect("the image");
    image.remember();
    let found = image.check(&[]);
    assert!(found.err().contains("ERROR: block index 5 behind the end of the file, is 2"));
    assert_eq!(image.check(&["-r", "all"]).code(), 0);
    assert_eq!(image.len(), DATA + 4 * MIB);
    image.assert_unchanged_and_clean();
}

#[test]
fn an_image_that_is_unsafe_to_write_can_be_read_and_the_error_names_the_repair() {
    let image = Image::new();
    image.entry(4, 1);
    let io = |access: &[&str], command: &str| {
        bounded(
            image.directory(),
            &[&["io", "-f", "vdi", "-c", command], access, &["image"]].concat(),
        )
    };
    assert_eq!(io(&["-r"], "read -P 2 4M 1M").code(), 0);
    let refused = io(&[], "write 0 512");
    assert_eq!(refused.code(), 1);
    let message = "another entry refers to this block too";
    assert!(refused.err().contains(message), "{}", refused.err());
}

#[test]
fn a_block_map_of_holes_is_checked_in_bounded_memory() {
    let image = Image::new();
    // The block map has 2^22 entries with the value 0.
    let (entries, data) = (1 << 22, (1 << 24) + 0x200);
    image.file().set_len(MAP).expect("the image");
    image.file().set_len(u64::from(data) + MIB).expect("the image");
    image.put(0x180, entries);
    image.put(0x158, data);
    let found = image.check(&["-q"]);
    assert_eq!(found.code(), 2);
    assert!(found.err().contains("ERROR: block index 0 also used by 0"));
    assert!(found.err().lines().count() < 1000);
    let repaired = image.check(&["-q", "-r", "all"]);
    assert_eq!(repaired.code(), 2);
    let said = format!("Not repaired: {} entries", entries - 1);
    assert!(repaired.err().contains(&said), "{}", repaired.err());
    let run = |args: &[&str]| bounded(image.directory(), args).code();
    assert_eq!(run(&["img", "info", "image"]), 0);
    assert_eq!(run(&["io", "-f", "vdi", "-c", "write 0 512", "image"]), 1);
}
