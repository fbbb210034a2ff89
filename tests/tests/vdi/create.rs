//! Creation of VDI images, and writes to them.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

/// The header fields with the random identifiers of the image.
const IDENTIFIERS: std::ops::Range<usize> = 0x188..0x1a8;

fn oxblk(directory: &Path, line: &str) -> Program {
    Program::oxblk().args(line.split(' ')).directory(directory)
}

/// Returns the bytes of an image without its identifiers. Asserts that the identifiers are version 4 UUIDs.
fn without_identifiers(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).expect("an image");
    for uuid in bytes[IDENTIFIERS].chunks_exact_mut(16) {
        assert_eq!((uuid[7] >> 4, uuid[8] >> 6), (4, 2), "{}: {uuid:x?}", path.display());
        uuid.fill(0);
    }
    bytes
}

fn assert_same_bytes(both: &Differential, name: &str) {
    let qemu = without_identifiers(&both.qemu_directory().join(name));
    for directory in both.our_directories() {
        assert!(without_identifiers(&directory.join(name)) == qemu, "{name} differs");
    }
}

#[test]
fn new_images_are_the_same_bytes_but_for_their_identifiers() {
    let both = Differential::new();
    for size in ["0", "1", "513", "10M", "3500000", "64G"] {
        both.same(Img, &["create", "-f", "vdi", "image", size]);
        assert_same_bytes(&both, "image");
    }
    for size in ["0", "1", "3500000"] {
        for more in ["", ",preallocation=off", ",preallocation=falloc", ",preallocation=full"] {
            let options = format!("static=on{more}");
            both.same(Img, &["create", "-f", "vdi", "-o", &options, "image", size]);
            assert_same_bytes(&both, "image");
        }
    }
}

#[test]
fn wrong_options_are_refused_as_by_the_qemu_tools() {
    let both = Differential::new();
    for options in ["static=3", "preallocation=x", "preallocation=metadata", "cluster_size=1M"] {
        both.same(Img, &["create", "-f", "vdi", "-o", options, "image", "1M"]);
    }
    both.same(Img, &["create", "-f", "vdi", "image", "1125898833100801"]);
    both.same(Img, &["create", "-f", "vdi", "-o", "help", "image"]);
    both.same(Img, &["create", "-f", "vdi", "-b", "base", "-F", "raw", "image"]);
}

#[test]
fn space_is_reserved_for_a_static_image_if_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let blocks = |options: &str| {
        oxblk(scratch.path(), &format!("img create -q -f vdi -o {options} image 4M")).succeed();
        std::fs::metadata(scratch.path().join("image")).expect("an image").blocks()
    };
    assert!(blocks("static=on") < 4 << 11);
    assert!(blocks("static=on,preallocation=falloc") >= 4 << 11);
}

#[test]
fn unsupported_operations_are_refused_as_by_the_qemu_tools() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "vdi", "image", "2M"]);
    both.same(Img, &["resize", "-f", "vdi", "image", "4M"]);
    both.same(Img, &["resize", "--shrink", "-f", "vdi", "image", "1M"]);
    both.same(Img, &["snapshot", "-c", "some", "image"]);
    both.same(Img, &["amend", "-f", "vdi", "-o", "size=4M", "image"]);
    both.same(Img, &["commit", "-f", "vdi", "image"]);
    both.same(Img, &["convert", "-c", "-O", "vdi", "image", "other"]);
    both.same(
        Io,
        &["-f", "vdi", "-c", "truncate 4M", "-c", "write -c 0 1M", "-c", "info", "image"],
    );
}

#[test]
fn either_program_continues_an_image_of_the_other() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let run = |tool: &str, args: &[&str]| {
        let program = match tool {
            "oxblk" => Program::oxblk(),
            tool => Program::new(tool),
        };
        program.args(args).directory(scratch.path()).succeed();
    };
    run("qemu-img", &["create", "-q", "-f", "raw", "model", "20M"]);
    run("qemu-img", &["create", "-q", "-f", "vdi", "image", "20M"]);
    let writes = [
        "write -P 1 1536k 64k",
        "write -P 2 500k 3M",
        "write -z 9M 3M",
        "write -P 3 12287k 2k",
        "write -P 4 20971008 512",
        "write -P 5 0 20M",
    ];
    for (number, write) in writes.iter().enumerate() {
        let reads = ["-f", "vdi", "-c", write, "image"];
        if number % 2 == 0 {
            run("oxblk", &[&["io"], &reads[..]].concat());
        } else {
            run("qemu-io", &reads);
        }
        run("qemu-io", &["-f", "raw", "-c", write, "model"]);
        run("qemu-img", &["check", "-q", "-f", "vdi", "image"]);
        run("oxblk", &["img", "check", "-q", "-f", "vdi", "image"]);
        run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "vdi", "model", "image"]);
        run("oxblk", &["img", "compare", "-q", "-f", "raw", "-F", "vdi", "model", "image"]);
    }
}

#[test]
fn a_new_image_is_as_large_as_measured() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    oxblk(directory, "img create -q -f raw disk 10M").succeed();
    let io = Program::oxblk().args(["io", "-f", "raw", "-c", "write -P 1 0 3M", "disk"]);
    io.directory(directory).succeed();
    let measured = |line: &str| {
        let reply = oxblk(directory, line).succeed();
        let numbers = |text: &str| -> Vec<u64> {
            text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect()
        };
        numbers(&reply.out())
    };
    let len = |name: &str| std::fs::metadata(directory.join(name)).expect("an image").len();
    let numbers = measured("img measure -f raw -O vdi disk");
    oxblk(directory, "img convert -f raw -O vdi disk image").succeed();
    assert_eq!(numbers, [len("image"), 0x400 + (10 << 20)]);
    assert_eq!(measured("img measure -O vdi --size 10M"), [0x400, 0x400 + (10 << 20)]);
    let numbers = measured("img measure -f raw -O vdi -o static=on disk");
    oxblk(directory, "img convert -f raw -O vdi -o static=on disk image").succeed();
    assert_eq!(numbers, [len("image"); 2]);
}

#[test]
fn discarded_space_is_released_to_the_host_and_stays_allocated() {
    use std::os::unix::fs::MetadataExt;
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path();
    oxblk(directory, "img create -q -f vdi image 10M").succeed();
    let io = |commands: &[&str]| {
        let commands: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let program = Program::oxblk().args(["io", "-d", "unmap", "-f", "vdi"]).args(commands);
        program.arg("image").directory(directory).succeed();
    };
    io(&["write -P 1 0 4M"]);
    let before = std::fs::metadata(directory.join("image")).expect("an image");
    io(&["discard 1M 2M", "read -P 1 0 1M", "read -P 0 1M 2M", "read -P 1 3M 1M"]);
    let after = std::fs::metadata(directory.join("image")).expect("an image");
    assert_eq!(before.len(), after.len());
    // Blocks of the image are not aligned to blocks of the host, so a few blocks of the host remain allocated.
    assert!(before.blocks() - after.blocks() >= (2 << 11) - 32);
    Program::new("qemu-img").args(["check", "image"]).directory(directory).succeed();
}
