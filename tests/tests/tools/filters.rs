//! The filters `copy-on-read`, `compress`, `preallocate` and `blkverify` on the command line, in comparison with QEMU.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

const CHAIN: &str = "driver=copy-on-read,file.driver=qcow2,file.file.filename=top.qcow2,\
                     file.backing.driver=qcow2,file.backing.file.filename=middle.qcow2,\
                     file.backing.node-name=middle";
const COMPRESS: &str = "driver=compress,file.driver=qcow2,file.file.filename=a.qcow2";
const PREALLOCATE: &str = "driver=qcow2,file.driver=preallocate,file.file.filename=a.qcow2";

/// A chain of three images, an image, and a raw file.
fn images() -> Differential {
    let both = Differential::new();
    let overlay = |name, below| {
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name]);
    };
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    both.qemu(Io, &["-c", "write -P 1 0 128k", "base.qcow2"]);
    overlay("middle.qcow2", "base.qcow2");
    both.qemu(Io, &["-c", "write -P 2 64k 64k", "-c", "write -P 2 192k 64k", "middle.qcow2"]);
    overlay("top.qcow2", "middle.qcow2");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    both.qemu(Io, &["-c", "write -P 1 0 64k", "a.qcow2"]);
    both.file("b.raw", &[7; 100 << 10]);
    both
}

/// The image `top.qcow2` below `filter`.
fn below(filter: &str) -> String {
    format!("driver={filter},file.driver=qcow2,file.file.filename=top.qcow2")
}

#[test]
fn commit_and_rebase_use_the_image_below_a_filter() {
    const GROUP: [&str; 2] = ["--object", "throttle-group,id=g"];
    let through = |filter: &str, words: &[&str]| {
        let both = images();
        both.qemu(Io, &["-c", "write -P 3 320k 64k", "-c", "write -z 384k 64k", "top.qcow2"]);
        let options = below(filter);
        let last = ["--image-opts", options.as_str()];
        both.same(Img, &[words, &GROUP, &last].concat());
        both.same(Img, &["map", "--output=json", "top.qcow2"]);
        for image in ["top.qcow2", "middle.qcow2", "base.qcow2"] {
            both.same_content(image);
        }
    };
    for filter in ["throttle,throttle-group=g", "copy-on-read"] {
        through(filter, &["commit"]);
        through(filter, &["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2"]);
        through(filter, &["rebase", "-b", ""]);
    }
    for base in ["middle.qcow2", "base.qcow2", "absent.qcow2"] {
        through("throttle,throttle-group=g", &["commit", "-b", base]);
    }
    through("throttle,throttle-group=g", &["commit", "-d"]);
    through("compress", &["rebase", "-b", ""]);
}

#[test]
fn names_of_blkdebug_contain_only_plain_names() {
    let both = images();
    for image in [
        "image.driver=compress,image.file.driver=qcow2,image.file.file.filename=a.qcow2",
        "image.driver=preallocate,image.file.driver=file,image.file.filename=b.raw",
        "image.driver=raw,image.file.driver=preallocate,image.file.file.filename=b.raw",
        "image.driver=raw,image.file.driver=raw,image.file.file.filename=b.raw",
        "image.driver=raw,image.file.driver=file,image.file.filename=b.raw",
        "image.driver=blkdebug,image.image.driver=file,image.image.filename=b.raw",
    ] {
        both.same(Img, &["info", "--image-opts", &format!("driver=blkdebug,{image}")]);
    }
}

#[test]
fn odd_options_of_filters_are_refused_in_the_same_words() {
    let both = images();
    let quorum = "driver=quorum,vote-threshold=1,children.0.driver=raw,\
                  children.0.file.filename=b.raw";
    for file in [
        "file.driver=file,file.filename=b.raw",
        "file.driver=",
        "file.driver=foo",
        "file.filename=b.raw",
        "file.filename=absent",
        "file.driver=file",
        "file.driver=null-co",
        "file=absent",
    ] {
        both.same(Img, &["info", "--image-opts", &format!("{quorum},{file}")]);
    }
    for rules in [
        r#""inject-error":{}"#,
        r#""set-state":{}"#,
        r#""inject-error":[]"#,
        r#""inject-error":[{}]"#,
        r#""inject-error":{"a":{}}"#,
    ] {
        let name = format!(
            r#"json:{{"driver":"blkdebug","image":{{"driver":"file","filename":"b.raw"}},{rules}}}"#
        );
        both.same(Io, &["-c", "read 0 512", &name]);
    }
}

#[test]
fn a_scheme_in_the_option_filename_has_no_meaning() {
    let both = images();
    for name in ["file:b.raw", "nbd:b.raw", "foo:b.raw", "http:", "blkdebug:", "blkdebug::b.raw"] {
        both.same(Img, &["info", "--image-opts", &format!("driver=raw,file.filename={name}")]);
        both.same(Img, &["info", "--image-opts", &format!("file.filename={name}")]);
    }
    both.file("x:y", &[7; 4096]);
    both.same(Io, &["--image-opts", "driver=raw,file.filename=x:y", "-c", "read -P 7 0 4k"]);
}

#[test]
fn a_filter_that_cannot_be_reopened_prevents_the_reopen_of_the_node_above() {
    let both = images();
    let options = "driver=blkdebug,image.driver=copy-on-read,image.node-name=cor,image.read-only=off,\
                   image.file.driver=qcow2,image.file.file.filename=top.qcow2";
    let commands = ["-c", "read 0 4k", "-c", "reopen -w", "-c", "write 0 4k"];
    both.same(Io, &[&["-r", "--image-opts", options][..], &commands].concat());
    both.same_content("top.qcow2");
}

#[test]
fn copy_on_read_copies_what_qemu_copies() {
    for (options, commands) in [
        ("", &["read -P 1 0 64k", "read -P 2 64k 64k", "read 0 512k", "map", "alloc 0 1M"][..]),
        ("", &["read 1000 10", "write 100 100", "write -z 128k 64k", "discard 256k 64k"]),
        ("", &["write -c 256k 64k", "truncate 2M", "length", "info"]),
        (",bottom=middle", &["read -P 1 0 64k", "read -P 2 64k 64k", "read 0 512k", "map"]),
        (",bottom=absent", &["read 0 64k"]),
        (",foo=1", &["read 0 64k"]),
    ] {
        let both = images();
        both.io(&format!("{CHAIN}{options}"), commands);
        both.same(Img, &["map", "--output=json", "top.qcow2"]);
        both.same_content("top.qcow2");
    }
    let both = images();
    both.io("driver=copy-on-read", &["read 0 64k"]);
    both.io("driver=copy-on-read,file.driver=raw,file.file.filename=b.raw", &["read 0 4k", "map"]);
    both.same(Io, &["-r", "--image-opts", CHAIN, "-c", "read 0 4k"]);
    let writable = format!(
        "{CHAIN},read-only=off,auto-read-only=off,file.read-only=off,file.file.read-only=off"
    );
    for disk in [CHAIN, &writable, &format!("{writable},bottom=middle")] {
        both.same(Img, &["info", "--image-opts", disk]);
        both.same(Img, &["map", "--image-opts", disk]);
    }
}

#[test]
fn compress_compresses_what_qemu_compresses() {
    let both = images();
    both.io(
        COMPRESS,
        &[
            "write -P 9 512k 64k",
            "write -P 8 600k 10",
            "read -P 9 512k 64k",
            "map",
            "write -c 128k 64k",
            "write -z 768k 64k",
            "write 700k 4k",
            "read 700k 4k",
            "discard 512k 64k",
            "map",
            "length",
            "info",
        ],
    );
    both.same_content("a.qcow2");
    both.same(Img, &["map", "--output=json", "a.qcow2"]);
    for disk in [
        "driver=compress,file.driver=raw,file.file.filename=b.raw",
        "driver=compress,file.filename=b.raw",
        "driver=compress",
        "driver=compress,foo=1,file.driver=qcow2,file.file.filename=a.qcow2",
        "driver=compress,file.driver=compress,file.file.driver=qcow2,file.file.file.filename=a.qcow2",
    ] {
        both.io(disk, &["write 128k 64k"]);
    }
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "odd.qcow2", "1000k"]);
    both.io("driver=compress,file.driver=qcow2,file.file.filename=odd.qcow2", &["write 0 64k"]);
    for command in [&["info"][..], &["info", "--output=json"], &["check"], &["resize"]] {
        let size = if command == ["resize"] { Some("2M") } else { None };
        let words = [command, &["--image-opts", COMPRESS], size.as_slice()].concat();
        both.same(Img, &words);
    }
}

#[test]
fn preallocate_checks_its_options_and_leaves_the_file_as_qemu_does() {
    for option in [
        "prealloc-size=1M",
        "prealloc-align=0",
        "prealloc-align=3",
        "prealloc-align=513",
        "prealloc-align=-1",
        "prealloc-align=x",
        "prealloc-size=0",
        "prealloc-size=x",
        "prealloc-size=-1",
        "prealloc-size=100",
        "foo=1",
    ] {
        let both = images();
        let commands =
            ["write 0 64k", "write 512k 256k", "write -z 128k 64k", "read -P 0 128k 64k", "map"];
        both.io(&format!("{PREALLOCATE},file.{option}"), &commands);
        same_length(&both, "a.qcow2");
        both.same_content("a.qcow2");
    }
    let both = images();
    both.same(Img, &["info", "--image-opts", PREALLOCATE]);
    both.same(Img, &["info", "--output=json", "--image-opts", PREALLOCATE]);
    let raw = "driver=raw,file.driver=preallocate,file.file.filename=b.raw,\
               file.prealloc-size=1M,file.prealloc-align=65536";
    both.io(raw, &["truncate 200k", "length", "write 150k 10k", "truncate 120k", "length"]);
    let file = "driver=preallocate,file.filename=b.raw,prealloc-size=1M";
    both.io(
        file,
        &[
            "truncate 200k",
            "write 190k 20k",
            "length",
            "reopen -o prealloc-size=2M",
            "reopen -o prealloc-size=x",
            "reopen -o foo=x",
            "map",
            "info",
        ],
    );
    both.same(Io, &["-r", "--image-opts", file, "-c", "read 0 4k"]);
    same_length(&both, "b.raw");
}

fn length(directory: &Path, name: &str) -> u64 {
    std::fs::metadata(directory.join(name)).expect("a file").len()
}

/// Compares the lengths of a file.
fn same_length(both: &Differential, name: &str) {
    let expected = length(&both.qemu_directory(), name);
    assert_eq!(both.our_directories().map(|ours| length(&ours, name)), [expected; 2]);
}

/// The length of a file while an image is open, and after the image was closed.
#[test]
fn preallocated_space_exists_only_while_the_image_is_open() {
    let both = images();
    let disk = format!("{PREALLOCATE},file.prealloc-size=10M,file.prealloc-align=4M");
    let words = ["--image-opts", &disk, "-c", "write 64k 64k", "-c", "abort"];
    both.same_exit_code(Io, &words);
    assert_eq!(length(&both.qemu_directory(), "a.qcow2"), 12 << 20);
    same_length(&both, "a.qcow2");
    let both = images();
    both.io(&disk, &["write 64k 64k", "reopen -r", "read 64k 64k"]);
    same_length(&both, "a.qcow2");
}

#[test]
fn blkverify_compares_as_qemu_does() {
    let both = images();
    both.qemu(Img, &["convert", "-O", "raw", "a.qcow2", "copy.raw"]);
    for name in [
        "blkverify:copy.raw:a.qcow2",
        "blkverify:copy.raw",
        "blkverify:",
        "blkverify:absent:a.qcow2",
        "blkverify:copy.raw:absent",
    ] {
        both.same(Img, &["info", name]);
        both.same(Img, &["info", "--output=json", name]);
    }
    for disk in [
        "driver=blkverify,raw.filename=copy.raw,test.driver=qcow2,test.file.filename=a.qcow2",
        "driver=blkverify,raw.filename=copy.raw,test.filename=a.qcow2",
        "driver=raw,file.driver=blkverify,file.raw.filename=copy.raw,file.test.driver=qcow2,\
         file.test.file.filename=a.qcow2",
        "driver=blkverify",
        "driver=blkverify,raw.filename=copy.raw",
        "driver=blkverify,test.filename=a.qcow2",
        "driver=blkverify,foo=1,raw.filename=copy.raw,test.driver=qcow2,\
         test.file.filename=a.qcow2",
    ] {
        both.same(Img, &["info", "--image-opts", disk]);
        both.same(Img, &["map", "--image-opts", disk]);
    }
    let name = "blkverify:copy.raw:a.qcow2";
    let commands = [
        "-c",
        "read -P 1 0 64k",
        "-c",
        "write -P 3 64k 64k",
        "-c",
        "read -P 3 64k 64k",
        "-c",
        "write 100 100",
        "-c",
        "discard 0 64k",
        "-c",
        "read 0 64k",
        "-c",
        "flush",
        "-c",
        "map",
        "-c",
        "length",
    ];
    both.same(Io, &[&["-f", "raw", name], &commands[..]].concat());
    both.same_content("a.qcow2");
    both.same(Img, &["compare", "copy.raw", "a.qcow2"]);
    // After a difference, QEMU's tools end without another line.
    both.qemu(Io, &["-f", "raw", "-c", "write -P 9 128k 512", "copy.raw"]);
    both.same_exit_code(Io, &["-f", "raw", name, "-c", "read 100k 100k"]);
}
