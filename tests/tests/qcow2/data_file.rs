//! qcow2 images with an external data file, compared with the QEMU tools.

use std::path::Path;

use oxblk::core::{
    Backend, Errno, Graph, OpenFlags, Options, Perm, Permissions, Result, WriteFlags, ZeroFlags,
};
use oxblk::ring::block_on;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::differential::Differential;
use oxblk_tests::hostile::image::Image;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};
use oxblk_tests::sim_disk::{self, Pace};

const L2: usize = 0x4_0000;

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// Creates an image `a` with the data file `d`, the same in every directory.
fn image(options: &str, size: &str) -> Differential {
    let both = Differential::new();
    let options = format!("data_file=d{options}");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", &options, "a", size]);
    both
}

/// Asserts that QEMU's check passes on the image of every directory, and that QEMU reads the same contents from all images. The
/// tools run in the directory of the images, because the data file's name is relative.
fn same_content(both: &Differential, image: &str) {
    both.qemu(Img, &["check", "-q", image]);
    both.qemu(Img, &["convert", "-O", "raw", image, "content.raw"]);
    both.same_bytes("content.raw");
}

/// Asserts that the data files `d` have the same bytes. QEMU's file may have zeroes up to the end of the last cluster.
fn same_data(both: &Differential) {
    let theirs = std::fs::read(both.qemu_directory().join("d")).expect("QEMU's file");
    for directory in both.our_directories() {
        let ours = std::fs::read(directory.join("d")).expect("oxblk's file");
        let behind = theirs.get(ours.len()..).expect("a file that is no longer than QEMU's");
        assert!(theirs.starts_with(&ours), "the contents differ");
        assert!(
            behind.len() < 2 << 20 && behind.iter().all(|byte| *byte == 0),
            "the lengths differ"
        );
    }
}

#[test]
fn new_images_and_their_data_files_are_the_same() {
    for (options, size) in [
        ("", "64M"),
        ("", "513"),
        (",data_file_raw=on", "20M"),
        (",data_file_raw=on", "1G"),
        (",data_file_raw=on,cluster_size=4k", "3000k"),
        (",data_file_raw=off", "1M"),
        (",preallocation=metadata", "10M"),
        (",preallocation=falloc", "1000k"),
        (",preallocation=full,data_file_raw=on", "1M"),
        (",extended_l2=on", "1M"),
        (",extended_l2=on,data_file_raw=on,cluster_size=16k", "5M"),
    ] {
        let both = Differential::new();
        let options = format!("data_file=d{options}");
        both.same(Img, &["create", "-f", "qcow2", "-o", &options, "a", size]);
        both.same_bytes("a");
        same_data(&both);
        both.same(Img, &["info", "a"]);
        both.same(Img, &["info", "--output=json", "a"]);
        both.same(Img, &["check", "a"]);
        both.same(Img, &["map", "--output=json", "a"]);
        both.same(Img, &["measure", "-O", "qcow2", "-o", &options, "a"]);
    }
}

#[test]
fn guest_data_lies_in_the_data_file_at_its_guest_offset() {
    for options in
        ["", ",data_file_raw=on", ",extended_l2=on,cluster_size=16k", ",preallocation=metadata"]
    {
        let both = image(options, "1M");
        for line in [
            "write -P 1 0 64k",
            "write -P 2 130k 4k",
            "write -z -u 0 64k",
            "write -P 3 20k 5k",
            "write -z 128k 16k",
            "discard 16k 16k",
            "write -P 4 1000k 24k",
        ] {
            both.same(Io, &["-d", "unmap", "-c", line, "a"]);
            both.same(Img, &["map", "--output=json", "a"]);
            same_content(&both, "a");
            if options.contains("raw") {
                same_data(&both);
            }
        }
        both.same(Img, &["map", "a"]);
        both.same(Img, &["check", "a"]);
        both.same(Img, &["convert", "-O", "raw", "a", "a.raw"]);
        both.same_bytes("a.raw");
    }
}

#[test]
fn images_are_converted_to_and_from_ones_with_data_files() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "s", "1M"]);
    both.qemu(Io, &["-c", "write -P 1 5k 300k", "-c", "write -P 2 800k 3k", "s"]);
    for line in [
        "convert -O qcow2 -o data_file=d1 s a1",
        "convert -O qcow2 -o data_file=d2,data_file_raw=on s a2",
        "convert -c -O qcow2 -o data_file=d3 s a3",
        "convert -O qcow2 a1 b1",
        "compare a1 a2",
        "compare s b1",
        "compare -f raw -F qcow2 d2 s",
    ] {
        both.same(Img, &words(line));
    }
    both.same_bytes("d2");
    for name in ["a1", "a2", "b1"] {
        same_content(&both, name);
    }
}

#[test]
fn an_image_is_resized_together_with_its_data_file() {
    for options in ["", ",data_file_raw=on", ",extended_l2=on"] {
        let both = image(options, "1000k");
        both.same(Io, &["-c", "write -P 1 900k 100k", "a"]);
        for line in [
            "resize a 1234k",
            "resize --shrink a 950k",
            "resize a 3M",
            "resize --preallocation=metadata a 4M",
            "resize --shrink a 512",
            "resize a 2M",
        ] {
            both.same(Img, &words(line));
            same_content(&both, "a");
            same_data(&both);
            both.same(Img, &["map", "--output=json", "a"]);
        }
    }
}

#[test]
fn conflicting_options_are_refused_with_qemus_messages() {
    let both = image("", "1M");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "plain", "1M"]);
    for line in [
        "create -f qcow2 -o data_file_raw=on b 1M",
        "create -f qcow2 -o data_file=e,compat=0.10 b 1M",
        "create -f qcow2 -o data_file=e,data_file_raw=maybe b 1M",
        "create -f qcow2 -o data_file=e,data_file_raw=on -b plain -F qcow2 b 1M",
        "create -f qcow2 -o data_file=json:{} b 1M",
        "create -f qcow2 -o data_file= b 1M",
        "create -f qcow2 -o data_file=/nonexistent/e b 1M",
        "snapshot -c one a",
        "snapshot -d one a",
        "snapshot -l a",
        "map --image-opts driver=qcow2,file.filename=plain,data-file.filename=d",
        "map --image-opts driver=qcow2,file.filename=a,data-file=nonode",
        "info --image-opts driver=qcow2,file.filename=a,data-file.filename=nofile",
    ] {
        both.same(Img, &words(line));
    }
    both.same(Io, &["-c", "write -c 0 64k", "a"]);
}

#[test]
fn the_user_may_give_another_data_file_than_the_image_names() {
    let both = image("", "1M");
    both.qemu(Io, &["-c", "write -P 7 0 64k", "a"]);
    both.prepare(|directory| {
        std::fs::rename(directory.join("d"), directory.join("moved")).expect("a data file");
    });
    for line in ["info a", "map a", "check a"] {
        both.same(Img, &words(line));
    }
    let read = ["-c", "read -P 7 0 64k"];
    both.same(Io, &[&read[..], &["a"]].concat());
    for data in ["data-file.filename=moved", "data-file.driver=file,data-file.filename=moved"] {
        let options = format!("driver=qcow2,file.filename=a,{data}");
        both.same(Io, &[&read[..], &["--image-opts", &options]].concat());
        both.same(Img, &["map", "--image-opts", &options]);
        both.same(Img, &["check", "--image-opts", &options]);
    }
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"},"data-file":{"driver":"raw","file":{"driver":"file","filename":"moved"}}}"#;
    both.same(Io, &[&read[..], &[json]].concat());
}

/// Creates an image with four clusters of data, and corrupts the image with `spoil`.
fn damaged(spoil: impl Fn(&mut Image)) -> Differential {
    let both = image("", "1M");
    both.qemu(Io, &["-c", "write -P 1 0 256k", "a"]);
    let mut image = Image::new(std::fs::read(both.qemu_directory().join("a")).expect("an image"));
    spoil(&mut image);
    both.file("a", image.bytes());
    both
}

#[test]
fn damaged_entries_are_reported_and_repaired_as_by_qemu() {
    for (word, value) in [
        (1, 0x0000_0000_0001_0000),
        (0, 0),
        (0, 0x8000_0000_0000_0001),
        (1, 0x8000_0000_0002_0000),
        (1, 0x8000_0000_0001_0200),
        (1, 0x8000_0000_0001_0201),
        (1, 0x4000_0000_0001_0000),
        (1, 0x8000_0000_00ff_0000),
        (1, 0x8000_0000_0001_0001),
    ] {
        let both = damaged(|image| image.put64(L2 + word * 8, value));
        both.same(Img, &["check", "a"]);
        both.same_exit_code(Io, &["-r", "-c", "read 0 256k", "a"]);
        both.same_exit_code(Img, &["check", "-r", "all", "a"]);
        both.same(Img, &["check", "a"]);
    }
}

#[test]
fn contradictory_data_file_bits_are_reported_as_by_qemu() {
    const INCOMPATIBLE: usize = 79;
    const AUTOCLEAR: usize = 95;
    for (at, value) in [(INCOMPATIBLE, 4), (AUTOCLEAR, 2)] {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "a", "1M"]);
        both.prepare(|directory| {
            let path = directory.join("a");
            let mut bytes = std::fs::read(&path).expect("an image");
            bytes[at] = value;
            std::fs::write(&path, bytes).expect("an image");
        });
        for line in ["info a", "map a", "check a"] {
            both.same(Img, &words(line));
        }
    }
}

#[test]
fn a_data_file_that_is_shorter_than_the_disk_reads_as_zeroes_behind_its_end() {
    let both = image(",preallocation=metadata", "1M");
    both.prepare(|directory| {
        let file = std::fs::OpenOptions::new().write(true).open(directory.join("d"));
        file.and_then(|file| file.set_len(100 << 10)).expect("a data file");
    });
    both.same(Io, &["-c", "read -P 0 0 1M", "-c", "write -P 3 900k 4k", "a"]);
    same_content(&both, "a");
}

#[test]
fn growth_reveals_no_old_data_behind_the_end_in_a_longer_raw_data_file() {
    for (old, new) in [("1M", "3M"), ("1M", "1536k"), ("1000k", "1001k"), ("1000k", "4M")] {
        let both = image(",data_file_raw=on", old);
        both.qemu(Io, &["-c", "write -P 1 0 1000k", "a"]);
        both.prepare(|directory| {
            let path = directory.join("d");
            let mut data = std::fs::read(&path).expect("a data file");
            data.resize(2 << 20, 0x78);
            std::fs::write(&path, data).expect("a data file");
        });
        for directory in both.our_directories() {
            let run = |words: &[&str]| Program::oxblk().args(words).directory(&directory).succeed();
            run(&["img", "resize", "a", new]);
            run(&["img", "convert", "-O", "raw", "a", "content.raw"]);
            let content = std::fs::read(directory.join("content.raw")).expect("the content");
            let (written, gained) = content.split_at(1000 << 10);
            assert!(written.iter().all(|byte| *byte == 1), "{old} to {new}: data lost");
            assert!(gained.iter().all(|byte| *byte == 0), "{old} to {new}: old data shows");
        }
    }
}

#[test]
fn the_name_of_a_data_file_is_always_a_path() {
    for name in [r#"json:{"driver":"null-co"}"#, "nbd:127.0.0.1:1", "nbd://127.0.0.1:1/x"] {
        let both = Differential::new();
        let [directory, _] = both.our_directories();
        let long = "x".repeat(name.len());
        let options = format!("data_file={long}");
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", &options, "a", "1M"]);
        let path = directory.join("a");
        let mut bytes = std::fs::read(&path).expect("an image");
        let at = bytes.windows(long.len()).position(|w| w == long.as_bytes()).expect("the name");
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(&path, bytes).expect("an image");
        let open = ["io", "-r", "-c", "read 0 4k", "a"];
        let reply = Program::oxblk().args(open).directory(&directory).run();
        assert_eq!(reply.code(), 1, "{name}: {}", reply.out());
        assert!(reply.err().contains("No such file or directory"), "{}", reply.err());
        if !name.contains('/') {
            std::fs::write(directory.join(name), [0; 65_536]).expect("a data file");
            Program::oxblk().args(open).directory(&directory).succeed();
        }
        let info = Program::oxblk().args(["img", "info", "a"]).directory(&directory).run();
        assert_eq!(info.code(), 0, "{}", info.err());
    }
}

#[test]
fn a_data_file_follows_its_image_when_that_is_reopened() {
    let both = image("", "1M");
    let change =
        ["-c", "reopen -r", "-c", "write 0 4k", "-c", "reopen -w", "-c", "write -P 2 0 4k"];
    both.same(Io, &[&["-c", "write -P 1 0 64k"], &change[..], &["a"]].concat());
    same_content(&both, "a");
}

/// Opens an image in a new graph. `name` is an absolute path, so the path of the data file is absolute too.
async fn open(name: &Path, driver: &str, flags: OpenFlags) -> Result<Backend> {
    let options = Options::from_dotted(&format!("driver={driver}"), None)?;
    Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything)
        .open_backend(name.to_str(), options, flags)
        .await
}

#[test]
fn a_data_file_in_use_is_locked_against_other_writers() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let [image, other, data] = ["a", "b", "d"].map(|name| scratch.path().join(name));
    for name in [&image, &other] {
        let options = format!("data_file={}", data.display());
        let create = ["create", "-q", "-f", "qcow2", "-o", &options];
        Program::new("qemu-img").args(create).arg(name).arg("1M").succeed();
    }
    block_on(async {
        let to_write = || OpenFlags { unmap: true, ..OpenFlags::default() };
        let to_read = || OpenFlags { read_only: true, ..OpenFlags::default() };
        let shared = || OpenFlags { force_share: true, ..to_read() };
        let disk = open(&image, "qcow2", to_write()).await.expect("an image");
        for (name, driver) in [(&other, "qcow2"), (&data, "raw")] {
            let Err(refused) = open(name, driver, to_write()).await else { panic!("no lock") };
            assert!(refused.to_string().contains("lock"), "{refused}");
            let read = open(name, driver, shared()).await.expect("a reader that shares");
            read.close().await.expect("it closes");
        }
        disk.close().await.expect("it closes");

        let readers = [
            open(&image, "qcow2", to_read()).await.expect("an image"),
            open(&other, "qcow2", to_read()).await.expect("an image"),
        ];
        for reader in readers {
            reader.close().await.expect("it closes");
        }
        let disk = open(&other, "qcow2", to_write()).await.expect("an image");
        disk.close().await.expect("it closes");
    });
}

#[test]
fn a_name_that_does_not_fit_in_the_header_is_reported_with_its_kind() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let long = |byte: &str| format!("{0}/{0}", byte.repeat(200));
    std::fs::create_dir(scratch.path().join("d".repeat(200))).expect("a directory");
    let data = format!("cluster_size=512,data_file={}", long("d"));
    let run = |more: &[&str]| {
        let create = ["img", "create", "-q", "-u", "-f", "qcow2"];
        let reply = Program::oxblk().args(create).args(more).directory(scratch.path()).run();
        assert_eq!(reply.code(), 1, "{}", reply.out());
        reply.err().to_owned()
    };
    let said = run(&["-o", &data, "a.qcow2", "1M"]);
    let text = format!("Could not update qcow2 header with data file '{}': No space", long("d"));
    assert!(said.contains(&text), "{said}");
    let backing = ["-F", "raw", "-b", &long("b"), "-o", "cluster_size=512", "b.qcow2", "1M"];
    let said = run(&backing);
    assert!(said.contains("Could not assign backing file 'bbb"), "{said}");
}

#[test]
fn a_fast_zero_write_writes_no_zeroes_to_a_raw_data_file() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let create = ["create", "-q", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on"];
    Program::new("qemu-img").args(create).args(["a", "1M"]).directory(scratch.path()).succeed();
    let bytes = std::fs::read(scratch.path().join("a")).expect("the image");
    let (image, data) = (Disk::from_bytes(1, &bytes), Disk::new(1, 1 << 20));
    sim::run(1, async {
        let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
        for (name, disk) in [("image", &image), ("data", &data)] {
            let node = sim_disk::add(&graph, name, disk, false, Pace::AtOnce).expect("a node");
            graph.keep_open(node).expect("a node");
        }
        let options = Options::from_dotted("driver=qcow2,file=image,data-file=data", None);
        let node = graph.open(options.expect("options"), OpenFlags::default()).await;
        let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
        let disk = Backend::new(&graph, "", node.expect("an image"), all).expect("a disk");
        disk.write(0, vec![7; 65_536].into(), WriteFlags::empty()).await.expect("a write");
        // The file cannot zero a range without writing zeroes.
        let (op, errno) = (FaultOp::Fallocate, Errno::OPNOTSUPP);
        let fail = vec![FailRule { op, nth: None, range: None, errno, once: false }];
        data.set_faults(Faults { fail, ..Faults::default() });
        let error = disk.write_zeroes(0, 65_536, ZeroFlags::NO_FALLBACK).await;
        assert_eq!(error.expect_err("no fast way").raw_errno(), Errno::OPNOTSUPP);
        assert!(data.bytes()[..65_536].iter().all(|byte| *byte == 7), "zeroes were written");
        disk.write_zeroes(0, 65_536, ZeroFlags::empty()).await.expect("a zero write");
        assert!(data.bytes()[..65_536].iter().all(|byte| *byte == 0), "the data stays");
        disk.close().await.expect("a close");
    });
}
