//! Zero writes and discards in qcow2 images, compared with the QEMU tools. Both programs make the same ranges zero, so
//! zeroed ranges stay zero when a backing file is added later.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

const SIZE: &str = "1000k";

fn image(options: &str, before: &[&str]) -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    both.qemu(Io, &["-c", "write -q -P 7 0 700k", "base"]);
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    create.extend(options.split_whitespace());
    create.extend(["a", SIZE]);
    both.qemu(Img, &create);
    if !before.is_empty() {
        both.qemu(Io, &commands(before));
    }
    both
}

fn commands<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    let mut args = Vec::new();
    for line in lines {
        args.extend(["-c", line]);
    }
    args.push("a");
    args
}

#[test]
fn zero_writes_make_the_same_entries_as_with_qemu() {
    let lines = [
        "write -q -z 0 128k",
        "write -q -z -u 128k 128k",
        "write -q -z 260k 8k",
        "write -q -z -u 380k 8k",
        "write -q -z 448k 70k",
        "write -q -z 970k 30k",
    ];
    let compressed = "write -q -c -P 1 0 960k";
    let before: [&[&str]; 4] = [
        &[],
        &["write -q -P 1 64k 10k", "write -q -P 1 256k 10k"],
        &["write -q -P 1 0 1000k", "write -q -z 0 1000k"],
        &[compressed],
    ];
    for options in ["-o compat=1.1", "-o extended_l2=on", "-o compat=0.10"] {
        for backing in ["", " -F qcow2 -b base"] {
            for before in before {
                let both = image(&format!("{options}{backing}"), before);
                both.same(Io, &commands(&lines));
                both.same_content("a");
                // QEMU may choose another offset for data that must be written. QEMU keeps the offset of a cluster whose
                // subclusters become zero one after the other.
                let moves = before.contains(&compressed) || options.contains("0.10");
                let is_plain = before.is_empty() || !options.contains("extended");
                if backing.is_empty() && is_plain && !moves {
                    both.same_bytes("a");
                }
            }
        }
    }
}

#[test]
fn zeroed_ranges_stay_zero_when_a_backing_file_is_added_later() {
    for options in ["-o compat=1.1", "-o extended_l2=on"] {
        let both = image(options, &["write -q -P 1 256k 64k"]);
        let zeroes = ["write -q -z 0 128k", "write -q -z 140k 4k", "discard -q 256k 64k"];
        both.same(Io, &commands(&zeroes));
        both.same(Img, &["rebase", "-u", "-F", "qcow2", "-b", "base", "a"]);
        let reads = ["read -P 0 0 128k", "read -P 0 140k 4k", "read -P 0 256k 64k"];
        both.same(Io, &commands(&reads));
        both.same_content("a");
    }
}

#[test]
fn converting_into_an_existing_image_writes_its_zeroes() {
    let both = image("", &["write -q -P 1 0 64k", "write -q -z 128k 128k"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "target", SIZE]);
    both.same(Img, &["convert", "-n", "-O", "qcow2", "a", "target"]);
    both.same(Img, &["rebase", "-u", "-F", "qcow2", "-b", "base", "target"]);
    both.same(Io, &["-c", "read -P 0 64k 936k", "-c", "read -P 1 0 64k", "target"]);
}

#[test]
fn a_shared_cluster_that_becomes_zero_keeps_the_data_of_the_snapshot() {
    for command in ["write -q -z 0 128k", "write -q -z -u 0 128k", "discard -q 0 128k"] {
        let both = image("", &["write -q -P 1 0 1000k"]);
        both.same(Img, &["snapshot", "-c", "one", "a"]);
        both.same(Io, &commands(&[command]));
        both.same(Img, &["map", "--output=json", "a"]);
        both.same_content("a");
        both.same(Img, &["snapshot", "-a", "one", "a"]);
        both.same_content("a");
    }
}

#[test]
fn a_map_that_starts_inside_an_allocated_zero_cluster_has_the_right_offset() {
    let both = image("", &["write -q -P 1 0 256k", "write -q -z 0 192k"]);
    for start in ["0", "4k", "68k", "130k"] {
        both.same(Img, &["map", "--output=json", "-s", start, "a"]);
    }
}

#[test]
fn version_2_refuses_zero_writes_without_a_fallback() {
    let both = image("-o compat=0.10", &[]);
    for line in ["write -z -n 0 64k", "write -z -u -n 0 64k"] {
        both.same(Io, &commands(&[line]));
    }
}
