//! `img commit` compared with qemu-img: output, exit codes, and the contents of the images after the commit.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// Creates `top` over `mid` over `base`, all of different sizes. `seen.raw` has the contents of `top`.
fn chain(options: &str, base: &str) -> Differential {
    let made = tempfile::tempdir().unwrap();
    let run = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(made.path()).succeed();
    };
    let img = |line: &str| run("qemu-img", &words(line));
    img(&format!("create -q -f {base} base 10M"));
    run("qemu-io", &["-f", base, "-c", "write -P 1 0 5M", "base"]);
    img(&format!("create -q -f qcow2 -o {options} -b base -F {base} mid.qcow2 11M"));
    run("qemu-io", &["-c", "write -P 5 1M 1M", "mid.qcow2"]);
    img(&format!("create -q -f qcow2 -o {options} -b mid.qcow2 -F qcow2 top.qcow2 12M"));
    let write =
        ["-c", "write -P 2 2010k 1M", "-c", "write -z 3500k 700k", "-c", "write -P 9 9M 5k"];
    run("qemu-io", &[&write[..], &["top.qcow2"]].concat());
    img("convert -O raw top.qcow2 seen.raw");
    let both = Differential::new();
    both.copies(made.path());
    both
}

fn each(both: &Differential, line: &str) {
    both.prepare(|directory| {
        Program::new("qemu-img").args(words(line)).directory(directory).succeed();
    });
}

#[test]
fn a_commit_moves_the_overlays_data_to_its_backing_file_and_empties_the_overlay() {
    for options in
        ["cluster_size=64k", "compat=0.10", "refcount_bits=1,cluster_size=4k", "extended_l2=on"]
    {
        let both = chain(options, "qcow2");
        both.same(Img, &words("commit top.qcow2"));
        for image in ["top.qcow2", "mid.qcow2", "base"] {
            both.same_content(image);
        }
        each(&both, "compare -q top.qcow2 seen.raw");
        each(&both, "compare -q mid.qcow2 seen.raw");
        both.same(Img, &words("commit -p -q -t none mid.qcow2"));
        each(&both, "compare -q -f qcow2 base seen.raw");
        both.same(Img, &words("commit mid.qcow2"));
        each(&both, "check -q top.qcow2");
        each(&both, "check -q mid.qcow2");
        for directory in both.our_directories() {
            let size = std::fs::metadata(directory.join("top.qcow2")).unwrap().len();
            assert!(size <= 16 << 20, "{options}: {size} bytes are left");
        }
    }
}

#[test]
fn a_commit_grows_a_raw_base_and_writes_all_data_to_it() {
    let both = chain("cluster_size=64k", "raw");
    both.same(Img, &words("commit -b base top.qcow2"));
    each(&both, "compare -q -f raw base seen.raw");
    both.same_bytes("base");
    both.same_bytes("top.qcow2");
    both.same(Img, &words("info top.qcow2"));
}

#[test]
fn a_commit_includes_intermediate_layers_and_the_top_keeps_its_data() {
    for name in ["base", "./base", "mid.qcow2"] {
        let both = chain("cluster_size=4k", "qcow2");
        both.same(Img, &["commit", "-b", name, "top.qcow2"]);
        both.same_content("base");
        both.same_bytes("top.qcow2");
        both.same(Img, &words("info top.qcow2"));
        each(&both, "compare -q top.qcow2 seen.raw");
    }
}

#[test]
fn snapshots_of_an_overlay_outlive_its_commit() {
    let both = chain("cluster_size=4k", "qcow2");
    both.qemu(Img, &words("snapshot -c kept top.qcow2"));
    both.qemu(Io, &["-c", "write -P 8 0 1M", "top.qcow2"]);
    both.same(Img, &words("commit top.qcow2"));
    both.same_content("top.qcow2");
    each(&both, "snapshot -a kept top.qcow2");
    both.same_content("top.qcow2");
}

#[test]
fn errors_are_reported_as_by_qemu_img() {
    let both = chain("cluster_size=64k", "raw");
    both.qemu(Img, &words("create -q -f qcow2 alone.qcow2 1M"));
    for line in [
        "commit",
        "commit a b",
        "commit alone.qcow2",
        "commit -f raw base",
        "commit base",
        "commit nofile",
        "commit -b top.qcow2 top.qcow2",
        "commit -b nofile top.qcow2",
        "commit -t foo top.qcow2",
        "commit -r foo top.qcow2",
        "commit -r -1 top.qcow2",
        "commit -f qcow2 --image-opts top.qcow2",
        "commit -r 0 -d top.qcow2",
        "commit -q --rate 100M -d top.qcow2",
        "commit -d --image-opts driver=qcow2,file.filename=top.qcow2",
    ] {
        both.same(Img, &words(line));
    }
    each(&both, "compare -q top.qcow2 seen.raw");
}

#[test]
fn a_base_is_given_by_its_name_in_the_overlay_or_by_its_full_path() {
    let both = Differential::new();
    both.prepare(|directory| std::fs::create_dir(directory.join("s")).unwrap());
    both.qemu(Img, &words("create -q -f qcow2 s/base 1M"));
    both.qemu(Img, &words("create -q -f qcow2 -F qcow2 -b base s/top"));
    for line in ["commit -b s/base s/top", "commit -b x s/top", "commit -b base s/top"] {
        both.same(Img, &words(line));
    }
}
