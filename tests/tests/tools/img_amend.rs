//! `img amend` compared with qemu-img: output, exit codes, and the changed image.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

fn each(both: &Differential, line: &str) {
    both.prepare(|directory| {
        Program::new("qemu-img").args(words(line)).directory(directory).succeed();
    });
}

/// Creates an image with data and zero clusters over a backing file, and with a snapshot if `snapshot` is set. `seen.raw` has
/// its guest-visible contents.
fn image(options: &str, snapshot: bool) -> Differential {
    let made = tempfile::tempdir().unwrap();
    let run = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(made.path()).succeed();
    };
    run("qemu-img", &words("create -q -f qcow2 base.qcow2 10M"));
    run("qemu-io", &["-c", "write -P 1 0 5M", "base.qcow2"]);
    let create = format!("create -q -f qcow2 -o {options} -b base.qcow2 -F qcow2 a.qcow2 10M");
    run("qemu-img", &words(&create));
    run("qemu-io", &["-c", "write -z 0 1M", "-c", "write -P 2 2M 1M", "a.qcow2"]);
    if snapshot {
        run("qemu-img", &words("snapshot -c kept a.qcow2"));
        run("qemu-io", &["-c", "write -P 3 512k 1M", "-c", "write -z 3M 100k", "a.qcow2"]);
    }
    run("qemu-img", &words("convert -O raw a.qcow2 seen.raw"));
    let both = Differential::new();
    both.copies(made.path());
    both
}

#[test]
fn an_image_is_amended_from_one_version_to_the_other_and_back() {
    for (options, snapshot) in [("cluster_size=64k", true), ("cluster_size=4k", false)] {
        let both = image(options, snapshot);
        for options in ["compat=0.10", "compat=v3,lazy_refcounts=on", "compat=v2"] {
            both.same(Img, &["amend", "-o", options, "a.qcow2"]);
            both.same_content("a.qcow2");
            each(&both, "compare -q a.qcow2 seen.raw");
            both.prepare(|directory| {
                let version = std::fs::read(directory.join("a.qcow2")).unwrap()[7];
                assert_eq!(version, if options.contains("v3") { 3 } else { 2 });
            });
        }
        if snapshot {
            // The zero clusters of the snapshot have become data clusters too.
            each(&both, "snapshot -a kept a.qcow2");
            both.same_content("a.qcow2");
        }
    }
}

#[test]
fn a_version_2_image_without_a_backing_file_takes_no_space_for_zeroes() {
    let both = Differential::new();
    both.qemu(Img, &words("create -q -f qcow2 a.qcow2 64M"));
    both.qemu(Io, &["-c", "write -z 0 40M", "-c", "write -P 1 1M 1M", "a.qcow2"]);
    both.same(Img, &words("amend -o compat=0.10 a.qcow2"));
    both.same_content("a.qcow2");
    for directory in both.our_directories() {
        assert!(std::fs::metadata(directory.join("a.qcow2")).unwrap().len() < 2 << 20);
    }
}

#[test]
fn refcounts_are_amended_to_every_width() {
    let both = image("cluster_size=512", true);
    for width in ["64", "2", "32", "16"] {
        both.same(Img, &["amend", "-q", "-o", &format!("refcount_bits={width}"), "a.qcow2"]);
        both.same_content("a.qcow2");
        each(&both, "compare -q a.qcow2 seen.raw");
    }
    // QEMU needs a long time for these widths, so only oxblk runs.
    let ours = image("cluster_size=64k", false);
    let directory = &ours.our_directories()[0];
    for width in ["1", "64", "8", "4"] {
        let options = format!("refcount_bits={width}");
        let amend = Program::oxblk().args(["img", "amend", "-o", &options, "a.qcow2"]);
        amend.directory(directory).succeed();
        for line in ["compare -q a.qcow2 seen.raw", "check -q a.qcow2"] {
            Program::new("qemu-img").args(words(line)).directory(directory).succeed();
        }
    }
    let write = ["-c", "write -P 9 7M 1M", "a.qcow2"];
    Program::new("qemu-io").args(write).directory(directory).succeed();
    Program::new("qemu-img").args(words("check -q a.qcow2")).directory(directory).succeed();
}

#[test]
fn one_command_amends_several_options() {
    let both = image("compat=0.10,cluster_size=4k", true);
    both.same(
        Img,
        &words("amend -o compat=1.1,size=12M,refcount_bits=8,lazy_refcounts=on a.qcow2"),
    );
    both.same_content("a.qcow2");
    both.same(Img, &words("info a.qcow2"));
    both.same(Img, &words("amend -o size=7M,refcount_bits=16,lazy_refcounts=off a.qcow2"));
    both.same_content("a.qcow2");
    both.same(Img, &words("amend -o size=10M,compat=0.10 a.qcow2"));
    both.same_content("a.qcow2");
}

#[test]
fn impossible_amends_are_refused_as_by_qemu_img() {
    let both = image("cluster_size=64k", true);
    both.qemu(Img, &words("create -q -f qcow2 -o compat=0.10 old.qcow2 10M"));
    both.qemu(Img, &words("create -q -f raw a.raw 10M"));
    let before = std::fs::read(both.qemu_directory().join("a.qcow2")).unwrap();
    for options in [
        "backing_file=base.qcow2",
        "backing_file=",
        "backing_fmt=raw",
        "data_file=x",
        "data_file_raw=on",
        "encrypt.state=active",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=1",
        "refcount_bits=x",
        "compat=0.9",
        "compat=",
        "compat=0.10,lazy_refcounts=on",
        "lazy_refcounts=x",
        "bogus=1",
        "size=x",
        "size=5",
        "size=30E",
        ",",
        "preallocation=full",
        "encryption=on",
        "cluster_size=4k",
    ] {
        both.same(Img, &["amend", "-o", options, "a.qcow2"]);
    }
    for directory in both.our_directories() {
        assert!(std::fs::read(directory.join("a.qcow2")).unwrap() == before);
    }
    for options in ["lazy_refcounts=on", "refcount_bits=32", "refcount_bits=16", "size=0"] {
        both.same(Img, &["amend", "-o", options, "old.qcow2"]);
    }
    for line in [
        "amend -o help -f qcow2 a.qcow2",
        "amend -f qcow2 -o help",
        "amend -o help a.qcow2",
        "amend -o help",
        "amend -f raw -o help a.qcow2",
        "amend -f raw -o size=1M a.raw",
        "amend a.qcow2",
        "amend -f foo -o help",
        "amend -o size=10M nofile",
        "amend -o size=10M a.qcow2 b",
        "amend -f qcow2 --image-opts -o size=10M a.qcow2",
        "amend -t foo -o size=10M a.qcow2",
        "amend --force -q -o size=11M a.qcow2",
        "amend -o size=10M --image-opts driver=qcow2,file.filename=a.qcow2",
        "amend -o backing_file=base.qcow2,backing_fmt=qcow2 a.qcow2",
        "amend -o data_file_raw=off a.qcow2",
        "amend -o size=12M a.qcow2",
        "amend -o compat=0.10 a.qcow2",
    ] {
        both.same(Img, &words(line));
    }
    both.same_content("a.qcow2");
}

#[test]
fn an_amend_to_version_2_that_would_lose_a_feature_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let run = |program: Program, line: &str| program.args(words(line)).directory(directory.path());
    let create = "create -q -f qcow2 -o compression_type=zstd a.qcow2 1M";
    run(Program::new("qemu-img"), create).succeed();
    let reply = run(Program::oxblk().arg("img"), "amend -o compat=0.10 a.qcow2").run();
    assert_eq!(reply.code(), 1);
    assert!(reply.err().contains("incompatible features 0x8 set"), "{}", reply.err());
    run(Program::new("qemu-img"), "check -q a.qcow2").succeed();
}

#[test]
fn a_damaged_image_is_not_downgraded() {
    // An L2 entry gets an unaligned offset, or the offset of the refcount table.
    for entry in [0x8000_0000_0005_0200_u64, 0x8000_0000_0001_0000] {
        let directory = tempfile::tempdir().unwrap();
        let run = |program: Program, args: &[&str]| program.args(args).directory(directory.path());
        run(Program::new("qemu-img"), &words("create -q -f qcow2 a.qcow2 1M")).succeed();
        let write = ["-c", "write -z 0 128k", "-c", "write 128k 64k", "a.qcow2"];
        run(Program::new("qemu-io"), &write).succeed();
        let path = directory.path().join("a.qcow2");
        let mut bytes = std::fs::read(&path).unwrap();
        let l2 = u64::from_be_bytes(bytes[0x30000..0x30008].try_into().unwrap()) & !(1 << 63);
        let at = usize::try_from(l2).unwrap() + 16;
        bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let reply = run(Program::oxblk().arg("img"), &words("amend -o compat=0.10 a.qcow2")).run();
        assert_eq!(reply.code(), 1, "{}", reply.err());
        let last = reply.err();
        assert!(last.lines().count() <= 2, "{last}");
        // The image must still have version 3, and must be marked corrupt.
        let after = std::fs::read(&path).unwrap();
        assert_eq!(after[7], 3);
        assert_eq!(after[79] & 2, 2);
    }
}

#[test]
fn passwords_of_an_encrypted_image_are_added_and_erased() {
    const SECRETS: [&str; 4] =
        ["--object", "secret,id=a,data=one", "--object", "secret,id=b,data=two"];
    let both = Differential::new();
    let create = "encrypt.format=luks,encrypt.key-secret=a,encrypt.iter-time=10";
    let before = ["create", "-q", "-f", "qcow2", "-o", create];
    both.qemu(Img, &[&before[..], &SECRETS, &["disk", "1M"]].concat());
    let opened_with =
        |key: &str| format!("driver=qcow2,file.filename=disk,encrypt.key-secret={key}");
    let steps = [
        ("a", "encrypt.state=active,encrypt.new-secret=b,encrypt.iter-time=10"),
        ("a", "encrypt.state=active,encrypt.new-secret=b,encrypt.iter-time=10,encrypt.keyslot=0"),
        ("b", "encrypt.state=inactive,encrypt.old-secret=a"),
        ("a", "encrypt.state=inactive,encrypt.keyslot=1"),
        ("b", "encrypt.state=inactive,encrypt.keyslot=1"),
        ("b", "encrypt.state=active"),
        ("b", "encrypt.keyslot=9,encrypt.state=inactive"),
    ];
    for (key, options) in steps {
        let image = opened_with(key);
        let amend = ["amend", "-o", options, "--image-opts", &image];
        both.same(Img, &[&amend[..], &SECRETS].concat());
    }
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "plain", "1M"]);
    both.same(Img, &["amend", "-o", "encrypt.state=inactive,encrypt.keyslot=1", "plain"]);
}
