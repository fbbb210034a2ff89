//! qcow2 images with subclusters (extended L2 entries), compared with the QEMU tools. Both programs create, use, inspect, check
//! and resize images, and each program also uses the images of the other program.

use std::path::Path;

use oxblk_tests::differential::{Differential, check_clean};
use oxblk_tests::hostile::image::Image;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

const L2: usize = 0x4_0000;

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// Creates an image of this size over 3 MiB of data, the same in every directory.
fn over_a_backing_file(options: &str, size: &str) -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "base", "3M"]);
    both.qemu(Io, &["-c", "write -P 9 0 3M", "base"]);
    let options = format!("extended_l2=on,{options}backing_file=base,backing_fmt=qcow2");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", &options, "a", size]);
    both
}

/// Returns the extents that `map` prints, without their offsets. Adjacent extents of the same kind are joined.
fn map_of(mut program: Program, directory: &Path, image: &str) -> Vec<(String, u64)> {
    program = program.args(["map", "--output=json", image]).directory(directory);
    let mut extents: Vec<(String, u64)> = Vec::new();
    for line in program.succeed().out().lines() {
        let (_, line) = line.split_once("\"length\": ").expect("an extent");
        let (length, what) = line.split_once(',').expect("an extent");
        let place = if what.contains("offset") { " at a place" } else { "" };
        // The host may store zero data as a hole.
        let what = match what.contains("\"data\": true") {
            true => what.replace("\"zero\": true", "\"zero\": false"),
            false => what.to_owned(),
        };
        let what =
            what.split(", \"offset\"").next().unwrap_or_default().trim_end_matches(['}', ',', ']']);
        let (what, length) = (format!("{what}{place}"), length.parse::<u64>().expect("a length"));
        match extents.last_mut() {
            Some((last, joined)) if *last == what => *joined += length,
            _ => extents.push((what, length)),
        }
    }
    extents
}

/// Asserts that the contents and the map of an image are the same in every directory.
fn look_the_same(both: &Differential, image: &str) {
    let theirs = map_of(Program::new("qemu-img"), &both.qemu_directory(), image);
    for directory in both.our_directories() {
        assert_eq!(map_of(Program::oxblk().arg("img"), &directory, image), theirs);
    }
    both.same_content(image);
}

#[test]
fn writes_and_zero_writes_cover_the_same_subclusters_as_with_qemu() {
    for (options, unit) in [("", 2048), ("cluster_size=16k,", 512), ("cluster_size=2M,", 65_536)] {
        let both = over_a_backing_file(options, "6M");
        for (command, offset, len) in [
            ("write -P 1", 2.0, 1.5),
            ("write -P 2", 5.5, 0.25),
            ("write -P 3", 30.0, 5.0),
            ("write -z", 8.0, 3.0),
            ("write -z", 12.5, 3.0),
            ("write -z -u", 40.0, 2.0),
            ("write -P 4", 8.5, 0.5),
            ("write -P 5", 0.0, 70.0),
            ("write -z -u", 32.0, 32.0),
            ("write -P 6", 33.0, 1.0),
            ("write -z", 1.0, 4.0),
        ] {
            let unit = f64::from(unit);
            let line = format!("{command} {} {}", offset * unit, len * unit);
            both.same(Io, &["-c", &line, "a"]);
            if command.contains("-P") {
                look_the_same(&both, "a");
            }
        }
        look_the_same(&both, "a");
    }
}

#[test]
fn a_write_turns_a_compressed_cluster_into_a_standard_cluster() {
    let both = over_a_backing_file("", "4M");
    for line in [
        "write -c -P 1 64k 64k",
        "write -c -P 2 128k 64k",
        "write -P 3 70k 3k",
        "write -z 130k 4k",
        "write -z -u 64k 64k",
        "discard 128k 64k",
    ] {
        both.same(Io, &["-c", line, "a"]);
        look_the_same(&both, "a");
    }
}

#[test]
fn a_cluster_shared_with_a_snapshot_is_copied_only_where_it_has_data() {
    let both = over_a_backing_file("", "4M");
    for line in ["write -P 1 4k 4k", "write -P 2 20k 2k", "write -z 40k 4k"] {
        both.same(Io, &["-c", line, "a"]);
    }
    both.same(Img, &["snapshot", "-c", "one", "a"]);
    for line in ["write -P 3 6k 3k", "write -z 50k 2k", "write -P 4 128k 1k", "discard 128k 64k"] {
        both.same(Io, &["-c", line, "a"]);
        both.same_content("a");
    }
    // QEMU also copies the subclusters between the written subclusters.
    let [directory, _] = both.our_directories();
    let map = map_of(Program::oxblk().arg("img"), &directory, "a");
    let depths: Vec<_> =
        map.iter().map(|(what, len)| (what.contains("depth\": 1"), *len)).collect();
    let expected = [
        (true, 4096),
        (false, 6144),
        (true, 10_240),
        (false, 2048),
        (true, 18_432),
        (false, 4096),
        (true, 6144),
        (false, 2048),
    ];
    assert_eq!(depths.get(..8), Some(&expected[..]), "{map:?}");
    both.same(Img, &["snapshot", "-a", "one", "a"]);
    look_the_same(&both, "a");
    both.same(Img, &["snapshot", "-d", "one", "a"]);
    look_the_same(&both, "a");
}

#[test]
fn sizes_preallocation_and_info_are_the_same_as_with_qemu() {
    let both = Differential::new();
    for options in
        ["extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M"]
    {
        both.same(Img, &["measure", "-O", "qcow2", "-o", options, "--size", "11G"]);
        both.same(Img, &["create", "-f", "qcow2", "-o", options, "a", "20M"]);
        both.same_bytes("a");
        both.same(Img, &["info", "a"]);
        both.same(Img, &["info", "--output=json", "a"]);
        let preallocated = format!("{options},preallocation=metadata");
        both.same(Img, &["create", "-q", "-f", "qcow2", "-o", &preallocated, "a", "20M"]);
        both.same_bytes("a");
        both.same(Io, &["-c", "write -P 7 1M 3k", "-c", "write -P 8 10M 64k", "a"]);
        look_the_same(&both, "a");
        both.same(Img, &["measure", "-O", "qcow2", "-o", options, "a"]);
    }
}

#[test]
fn an_image_with_a_backing_file_may_be_preallocated() {
    for mode in ["metadata", "falloc", "full"] {
        let both = over_a_backing_file(&format!("preallocation={mode},"), "6M");
        both.same(Img, &["map", "--output=json", "a"]);
        let made =
            format!("extended_l2=on,preallocation={mode},backing_file=base,backing_fmt=qcow2");
        both.same(Img, &["create", "-q", "-f", "qcow2", "-o", &made, "a", "6M"]);
        both.same(Img, &["check", "a"]);
        both.same(Io, &["-c", "write -P 1 5k 1k", "-c", "write -z 1M 64k", "a"]);
        both.same_content("a");
    }
}

#[test]
fn an_image_is_resized_as_by_qemu() {
    let both = over_a_backing_file("", "1234k");
    both.same(Io, &["-c", "write -P 1 1M 200k", "a"]);
    for line in [
        "resize a 2M",
        "resize a 4M",
        "resize --shrink a 1101k",
        "resize a 3M",
        "resize --preallocation=metadata a 5M",
        "resize --shrink a 512",
        "resize a 4M",
    ] {
        both.same(Img, &words(line));
        both.same_content("a");
    }
}

#[test]
fn conflicting_options_are_refused_with_qemus_messages() {
    let both = Differential::new();
    for line in [
        "create -f qcow2 -o extended_l2=on,cluster_size=8k a 1M",
        "create -f qcow2 -o extended_l2=on,compat=0.10 a 1M",
        "create -f qcow2 -o extended_l2=on,compat=0.10,cluster_size=4k a 1M",
        "create -f qcow2 -o extended_l2=maybe a 1M",
        "measure -O qcow2 -o extended_l2=on,cluster_size=8k --size 1M",
    ] {
        both.same(Img, &words(line));
    }
}

#[test]
fn images_are_converted_to_and_from_subclusters() {
    let both = over_a_backing_file("", "4M");
    both.same(Io, &["-c", "write -P 1 5k 3k", "-c", "write -z 128k 6k", "a"]);
    for line in [
        "convert -O raw a a.raw",
        "convert -O qcow2 -o extended_l2=on a.raw b",
        "convert -c -O qcow2 -o extended_l2=on,cluster_size=16k a c",
        "convert -O qcow2 -o extended_l2=on,preallocation=metadata a d",
        "convert -O qcow2 -o extended_l2=on -B base -F qcow2 a e",
    ] {
        both.same(Img, &words(line));
    }
    for name in ["a.raw", "b", "c", "d", "e"] {
        both.same_content(name);
        both.same(Img, &["compare", "a", name]);
    }
}

/// Creates an image with every kind of entry, and corrupts the image with `spoil`. The L2 table is at [`L2`].
fn damaged(spoil: impl Fn(&mut Image)) -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "a", "1M"]);
    for line in [
        "write -P 1 0 64k",
        "write -c -P 2 64k 64k",
        "write -z 128k 64k",
        "write -P 3 192k 8k",
        "write -P 4 256k 8k",
    ] {
        both.qemu(Io, &["-c", line, "a"]);
    }
    let mut image = Image::new(std::fs::read(both.qemu_directory().join("a")).expect("an image"));
    spoil(&mut image);
    both.file("a", image.bytes());
    both
}

/// The damaged words of the L2 table: the index and the new value.
const FAULTS: &[(usize, u64)] = &[
    // Subclusters are both allocated and zero.
    (1, 0x0000_0001_ffff_ffff),
    (7, u64::MAX),
    // Subclusters are allocated although the entry has no cluster.
    (5, 1),
    (5, u64::MAX),
    (11, 1 << 31),
    // Bit 0 of the first word is set. This bit is unused.
    (6, 0x8000_0000_0007_0001),
    (10, 1),
    // The host offset is unaligned, reserved bits are set, the host offset is that of another cluster, the copied flag is
    // missing, or the host offset is past the end of the file.
    (6, 0x8000_0000_0007_0200),
    (6, 0x8200_0000_0007_0000),
    (6, 0x8000_0000_0005_0000),
    (6, 0x0000_0000_0007_0000),
    (6, 0x8000_0100_0000_0000),
    // A compressed cluster has a bitmap.
    (3, 1),
    (3, 1 << 32),
];

#[test]
fn damaged_entries_are_reported_as_by_qemu() {
    for (word, value) in FAULTS {
        let both = damaged(|image| image.put64(L2 + word * 8, *value));
        both.same(Img, &["check", "a"]);
        // Skip the read if the entry refers to an offset past the end of the file.
        if value & 0x0000_0100_0000_0000 == 0 {
            both.same_exit_code(Io, &["-r", "-c", "read 0 512k", "a"]);
        }
    }
}

#[test]
fn a_repair_drops_an_unaligned_offset_of_a_cluster_without_data() {
    let both = damaged(|image| {
        image.put64(L2 + 48, 0x8000_0000_0007_0200);
        image.put64(L2 + 56, 0xffff_0000 << 32);
    });
    both.same(Img, &["check", "-r", "all", "a"]);
    both.same(Img, &["check", "a"]);
}

#[test]
fn a_repair_keeps_the_data_of_a_compressed_cluster_with_a_bitmap() {
    for fix in ["leaks", "all"] {
        let both = damaged(|image| image.put64(L2 + 24, 0xff));
        for directory in both.our_directories() {
            let repair = ["img", "check", "-r", fix, "a"];
            let reply = Program::oxblk().args(repair).directory(&directory).run();
            assert_eq!(reply.code(), if fix == "all" { 0 } else { 2 }, "{}", reply.out());
            let read = ["-r", "-c", "read -P 2 64k 64k", "a"];
            Program::new("qemu-io").args(read).directory(&directory).succeed();
            if fix == "all" {
                check_clean(&directory.join("a"));
            }
        }
    }
}
