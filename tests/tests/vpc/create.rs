//! New images have the same bytes as those of `qemu-img create`, except for the time stamp, the identifier and the checksum.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::Img;

/// Returns the bytes of an image. The time stamp, the checksum and the identifier are set to zero in all footers.
fn without_identity(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).expect("the image");
    let end = bytes.len() - 512;
    for at in [0, end] {
        if bytes[at..].starts_with(b"conectix") {
            bytes[at + 24..at + 28].fill(0);
            bytes[at + 64..at + 84].fill(0);
        }
    }
    bytes
}

#[test]
fn new_images_are_the_same_bytes() {
    let both = Differential::new();
    for size in ["0", "1", "512", "1000", "64k", "3500000", "10M", "31M", "127G", "128G", "2040G"] {
        for options in ["force_size=off", "force_size=on", "force_size=on,subformat=fixed"] {
            if options.contains("fixed") && size.ends_with('G') {
                continue;
            }
            both.same(Img, &["create", "-f", "vpc", "-o", options, "image", size]);
            let theirs = without_identity(&both.qemu_directory().join("image"));
            for directory in both.our_directories() {
                let same = without_identity(&directory.join("image")) == theirs;
                assert!(same, "{size} {options}");
            }
            // QEMU does not open a fixed image that consists of a footer only.
            if (size, options) != ("0", "force_size=on,subformat=fixed") {
                both.same(Img, &["info", "--output=json", "-f", "vpc", "image"]);
            }
        }
    }
}

#[test]
fn wrong_options_are_refused_as_by_the_qemu_tools() {
    let both = Differential::new();
    for options in
        ["subformat=foo", "subformat=", "force_size=maybe", "preallocation=metadata", "static=on"]
    {
        both.same(Img, &["create", "-f", "vpc", "-o", options, "image", "1M"]);
    }
    both.same(Img, &["create", "-f", "vpc", "-o", "help", "image"]);
    both.same(Img, &["create", "-f", "vpc", "image", "2041G"]);
    both.same(Img, &["create", "-f", "vpc", "-o", "force_size=on", "image", "2041G"]);
    both.same(Img, &["create", "-f", "vpc", "-b", "base", "-F", "raw", "image"]);
    both.same(Img, &["create", "-q", "-f", "vpc", "image", "1M"]);
    both.same(Img, &["resize", "-f", "vpc", "image", "2M"]);
    both.same(Img, &["snapshot", "-c", "s", "image"]);
    both.same(Img, &["amend", "-f", "vpc", "-o", "force_size=on", "image"]);
    both.same(Img, &["convert", "-c", "-O", "vpc", "image", "compressed"]);
}

#[test]
fn the_size_is_taken_from_the_field_that_the_user_chooses() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "vpc", "-o", "force_size=on", "image", "10M"]);
    // Set the geometry of a 10 MiB disk, and the creator application of Virtual PC ("vpc ").
    both.prepare(|directory| {
        let path = directory.join("image");
        let mut bytes = std::fs::read(&path).expect("the image");
        for at in [0, bytes.len() - 512] {
            bytes[at + 56..at + 60].copy_from_slice(&[1, 0x2d, 4, 17]);
            bytes[at + 28..at + 32].copy_from_slice(b"vpc ");
            bytes[at + 64..at + 68].fill(0);
            let sum = bytes[at..at + 512].iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
            bytes[at + 64..at + 68].copy_from_slice(&(!sum).to_be_bytes());
        }
        std::fs::write(&path, bytes).expect("the image");
    });
    both.same(Img, &["info", "--output=json", "image"]);
    for calculation in ["chs", "current_size", "other"] {
        let image = format!("driver=vpc,file.filename=image,force_size_calc={calculation}");
        both.same(Img, &["info", "--output=json", "--image-opts", &image]);
        both.same(Img, &["map", "--output=json", "--image-opts", &image]);
    }
}

#[test]
fn the_measured_sizes_are_those_of_the_images() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let run = |line: &str| {
        Program::oxblk().args(line.split(' ')).directory(scratch.path()).succeed().out()
    };
    run("img create -q -f raw disk 20M");
    Program::oxblk()
        .args(["io", "-f", "raw", "-c", "write 1M 2M", "-c", "write 9M 64k", "disk"])
        .directory(scratch.path())
        .succeed();
    for options in ["force_size=on", "force_size=off", "subformat=fixed"] {
        let measured = run(&format!("img measure -f raw -O vpc -o {options} disk"));
        run(&format!("img convert -f raw -O vpc -o {options} disk image"));
        let len = std::fs::metadata(scratch.path().join("image")).expect("the image").len();
        assert!(measured.contains(&format!("required size: {len}\n")), "{options}: {measured}");
    }
}
