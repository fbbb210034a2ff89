//! `img info`, `map`, `measure` and `check` print the same as qemu-img.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

/// Creates a chain of three qcow2 images with data, zeroes, discards and a compressed cluster, and raw images.
fn images() -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "raw", "a.raw", "1M"]);
    both.qemu(Io, &["-f", "raw", "-c", "write 128k 64k", "a.raw"]);
    both.file("odd.raw", &[7; 1000]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let commands = ["write 0 64k", "write -P 3 1M 64k", "write -z 2M 64k", "write -c 3M 64k"];
    for command in commands {
        both.qemu(Io, &["-c", command, "a.qcow2"]);
    }
    both.qemu(Io, &["-c", "discard 1M 64k", "a.qcow2"]);
    let over = |below: &str, name: &str| {
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name]);
    };
    over("a.qcow2", "b.qcow2");
    both.qemu(Io, &["-c", "write 128k 64k", "b.qcow2"]);
    over("b.qcow2", "c.qcow2");
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1G"]);
    both
}

#[test]
fn info_of_raw_images_and_protocols_is_the_same() {
    let both = images();
    same(
        &both,
        &[
            "info a.raw",
            "info odd.raw",
            "info -U a.raw",
            "info --output=json a.raw",
            "info --output=json --backing-chain a.raw",
            "info --image-opts driver=raw,file.filename=a.raw,offset=512",
            "info json:{\"driver\":\"null-co\",\"size\":1048576}",
            "info null-co://",
            "info null-aio://",
            "info --output json null-co://",
            "info /dev/null",
        ],
    );
}

#[test]
fn info_of_qcow2_images_and_chains_is_the_same() {
    let both = images();
    same(
        &both,
        &[
            "info a.qcow2",
            "info old.qcow2",
            "info c.qcow2",
            "info --backing-chain c.qcow2",
            "info -b c.qcow2",
            "info --output json --backing-chain c.qcow2",
            "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2",
            "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}",
        ],
    );
}

#[test]
fn info_prints_where_a_backing_file_is_relative_to_the_image() {
    let both = Differential::new();
    both.prepare(|directory| std::fs::create_dir(directory.join("sub")).expect("a directory"));
    both.qemu(Img, &["create", "-q", "-f", "raw", "sub/base.raw", "1M"]);
    both.qemu(
        Img,
        &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "sub/top.qcow2"],
    );
    same(&both, &["info sub/top.qcow2", "info --output json sub/top.qcow2"]);
    same(&both, &["info --backing-chain sub/top.qcow2"]);
}

#[test]
fn images_that_cannot_be_inspected_are_reported_with_qemus_messages() {
    let both = images();
    same(
        &both,
        &[
            "info",
            "info a b",
            "info nofile",
            "info --output=xml a.raw",
            "info -f qcow2 a.raw",
            "info -f nope a.raw",
            "info --image-opts driver=qcow2,file.filename=a.qcow2,backing.driver=qcow2",
            "info --image-opts driver=qcow2,file.filename=a.qcow2,backing.driver=raw,backing.foo=3",
            "info --image-opts driver=qcow2,file.filename=a.qcow2,backing.foo=3",
            "info --image-opts driver=qcow2,file.filename=b.qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2",
            "info json:{\"driver\":\"qcow2\",\"file.filename\":\"a.qcow2\",\"backing\":{}}",
            "info --image-opts driver=qcow2,file.driver=file,file.filename=a.raw",
            "info --image-opts a.qcow2",
            "info --image-opts driver=raw",
            "info --image-opts driver=raw,file.filename=a.raw,bogus=1",
            "info --image-opts -f raw a.qcow2",
            "info nosuchproto:foo",
            "info --object",
            "check a.raw",
            "check --output json a.raw",
            "check -f qcow2 a.raw",
            "check nofile",
            "check -r a.qcow2",
            "check -r foo a.qcow2",
            "check -r all -U a.raw",
            "check -T foo a.qcow2",
        ],
    );
    both.same(Img, &["info", ""]);
}

#[test]
fn maps_are_the_same() {
    let both = images();
    same(
        &both,
        &[
            "map a.raw",
            "map --output json a.raw",
            "map --output json odd.raw",
            "map --start-offset 64k --max-length 128k --output json a.raw",
            "map --start-offset 1000 --output json a.raw",
            "map --start-offset 100M --output json a.raw",
            "map null-co://",
            "map --output json null-co://",
            "map a.qcow2",
            "map --output json a.qcow2",
            "map c.qcow2",
            "map --output json c.qcow2",
            "map --start-offset 64k --max-length 1000 --output json c.qcow2",
            "map --start-offset 1000 --output json c.qcow2",
            "map -s 0 -l 64k a.qcow2",
            "map --start-offset foo c.qcow2",
            "map --max-length foo c.qcow2",
            "map",
        ],
    );
}

#[test]
fn a_map_of_a_raw_node_shows_the_image_below_it() {
    let both = images();
    let raw = "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2";
    let window = "driver=raw,offset=64k,size=2M,file.driver=qcow2,file.file.filename=a.qcow2";
    let twice = "driver=raw,file.driver=raw,file.file.driver=qcow2,file.file.file.filename=a.qcow2";
    for image in [raw, window, twice] {
        same(&both, &[&format!("map --image-opts {image}")]);
        same(&both, &[&format!("map --output=json --image-opts {image}")]);
        both.same(Io, &["--image-opts", "-c", "map", "-c", "alloc 0 4M", image]);
    }
}

#[test]
fn a_raw_node_over_a_chain_has_the_status_of_the_whole_chain() {
    let both = images();
    let direct = "driver=qcow2,file.filename=c.qcow2";
    let raw = "driver=raw,file.driver=qcow2,file.file.filename=c.qcow2";
    let run = |line: &str| {
        let program = Program::oxblk().arg("img").args(line.split(' '));
        program.directory(&both.our_directories()[0]).succeed().out()
    };
    let compared = run(&format!("compare -s --image-opts {direct} {raw}"));
    assert_eq!(compared, "Images are identical.\n");
    let without_depth = |image: &str| {
        let map = run(&format!("map --output=json --image-opts {image}"));
        let depths = ["\"depth\": 0, ", "\"depth\": 1, ", "\"depth\": 2, "];
        depths.iter().fold(map, |map, depth| map.replace(depth, ""))
    };
    assert_eq!(without_depth(raw), without_depth(direct));
}

/// Creates an image of 100 data clusters. The last `missing` of them are holes in the file.
fn with_holes_in_the_file(both: &Differential, name: &str, missing: u64) {
    const CLUSTER: u64 = 65536;
    both.qemu(Img, &["create", "-q", "-f", "qcow2", name, "1G"]);
    both.qemu(Io, &["-c", "write -q -P 5 0 6400k", name]);
    both.prepare(|directory| {
        let path = directory.join(name);
        let size = std::fs::metadata(&path).unwrap().len();
        let len = missing * CLUSTER;
        let (offset, len) = ((size - len).to_string(), len.to_string());
        Program::new("fallocate")
            .args(["--punch-hole", "--offset", &offset, "--length", &len, name])
            .directory(directory)
            .succeed();
    });
}

#[test]
fn a_map_asks_for_holes_of_the_file_only_if_much_of_it_is_missing() {
    let both = Differential::new();
    with_holes_in_the_file(&both, "few.qcow2", 9);
    with_holes_in_the_file(&both, "some.qcow2", 10);
    with_holes_in_the_file(&both, "many.qcow2", 60);
    both.qemu(
        Img,
        &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "ahead.qcow2", "8M"],
    );
    both.qemu(Io, &["-c", "write -q 1M 64k", "ahead.qcow2"]);
    same(
        &both,
        &[
            "map --output json few.qcow2",
            "map --output json some.qcow2",
            "map --output json many.qcow2",
            "map --output json ahead.qcow2",
            "map ahead.qcow2",
        ],
    );
}

#[test]
fn measurements_are_the_same() {
    let both = images();
    same(
        &both,
        &[
            "measure --size 1G",
            "measure -O raw --size 1000",
            "measure -O raw a.raw",
            "measure -O raw --output json odd.raw",
            "measure -O raw a.qcow2",
            "measure --size 1G -O qcow2",
            "measure --size 1G -O qcow2 --output json",
            "measure -O qcow2 a.qcow2",
            "measure -O qcow2 a.raw",
            "measure -O qcow2 --output json a.qcow2",
            "measure -O qcow2 -o cluster_size=4k --size 1G",
            "measure -O qcow2 -o cluster_size=4k a.raw",
            "measure -O qcow2 -o compat=0.10,refcount_bits=16,cluster_size=2M --size 1T",
            "measure -O qcow2 -o refcount_bits=1 --size 1000",
            "measure -O qcow2 -o preallocation=metadata --size 1G",
            "measure -O qcow2 -o preallocation=full --size 1G",
            "measure -O qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 c.qcow2",
            "measure",
            "measure -O nope --size 1G",
            "measure --size foo",
            "measure --size -1",
            "measure --size 1G a.raw",
            "measure -f raw --size 1G",
            "measure --image-opts --size 1G",
            "measure a b",
            "measure nofile",
            "measure -O qcow2 -o bogus=1 --size 1G",
            "measure -O qcow2 -o cluster_size=3 --size 1G",
            "measure --output foo --size 1",
        ],
    );
}

#[test]
fn a_broken_or_looping_chain_is_reported_and_not_followed() {
    let both = Differential::new();
    let over = |below: &str, name: &str| {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", name, "1M"];
        both.qemu(Img, &args);
    };
    over("loop2.qcow2", "loop1.qcow2");
    over("loop1.qcow2", "loop2.qcow2");
    over("missing.qcow2", "broken.qcow2");
    same(
        &both,
        &[
            "info loop1.qcow2",
            "info --backing-chain loop1.qcow2",
            "info broken.qcow2",
            "info --backing-chain broken.qcow2",
            "map broken.qcow2",
        ],
    );
    both.same(Io, &["-c", "length", "broken.qcow2"]);
}
