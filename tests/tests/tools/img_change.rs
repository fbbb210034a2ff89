//! `img compare`, `resize` and `bench` print and do the same as qemu-img.

use oxblk_tests::differential::Differential;
use oxblk_tests::differential::normalise::Rules;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

fn images() -> Differential {
    let both = Differential::new().rules(Rules { progress: true, ..Rules::default() });
    for (name, size) in [("a.raw", "1M"), ("b.raw", "2M"), ("zero.raw", "1M"), ("zero2.raw", "2M")]
    {
        both.qemu(Img, &["create", "-q", "-f", "raw", name, size]);
    }
    both.qemu(Io, &["-f", "raw", "-c", "write -P 5 512k 4k", "a.raw"]);
    both.prepare(|directory| {
        let change = |name: &str, at: usize, to: &str| {
            let mut bytes = std::fs::read(directory.join(name)).expect("an image");
            *bytes.get_mut(at).expect("in the image") = b'x';
            std::fs::write(directory.join(to), bytes).expect("an image");
        };
        change("a.raw", 700_000, "a2.raw");
        change("zero2.raw", 1_500_000, "tail.raw");
    });
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "zero.qcow2", "1M"]);
    both.qemu(Img, &["convert", "-O", "qcow2", "a.raw", "a.qcow2"]);
    both
}

#[test]
fn comparisons_find_the_same_differences_as_qemu_img() {
    let both = images();
    same(
        &both,
        &[
            "compare a.raw a.raw",
            "compare a.raw a2.raw",
            "compare -q a.raw a2.raw",
            "compare -p a.raw a.raw",
            "compare a.raw b.raw",
            "compare -s a.raw b.raw",
            "compare zero.raw zero2.raw",
            "compare -q zero.raw zero2.raw",
            "compare -s zero.raw zero2.raw",
            "compare zero.raw tail.raw",
            "compare tail.raw zero.raw",
            "compare zero.raw zero.qcow2",
            "compare -s zero.raw zero.qcow2",
            "compare a.raw a.qcow2",
            "compare -s a.raw a.qcow2",
            "compare -f raw -F qcow2 a.raw a.qcow2",
            "compare -f raw -F raw a.raw a.qcow2",
            "compare -f qcow2 a.raw a.qcow2",
            "compare nofile a.raw",
            "compare a.raw nofile",
            "compare -T foo a.raw a.raw",
            "compare --image-opts -f raw a b",
            "compare -z a b",
            "compare",
            "compare a.raw",
        ],
    );
}

#[test]
fn raw_images_are_resized() {
    let both = images();
    same(
        &both,
        &[
            "resize",
            "resize a.raw",
            "resize a.raw 8M",
            "resize a.raw x 8M",
            "resize a.raw x -- 8M",
            "resize a.raw x y -- 8M",
            "resize -- a.raw x 8M",
            "resize -f -- a.raw x 8M",
            "resize -f raw a.raw +1M",
            "resize -f raw a.raw -1M",
            "resize -f raw --shrink a.raw -1M",
            "resize -f raw a.raw foo",
            "resize -f raw a.raw 0",
            "resize -f raw a.raw +0",
            "resize -f raw --shrink a.raw -100M",
            "resize -f raw a.raw +8E",
            "resize --preallocation full -f raw a.raw +1M",
            "resize --preallocation falloc -f raw a.raw +1M",
            "resize --preallocation metadata -f raw a.raw +1M",
            "resize --preallocation=bogus a.raw +1M",
            "resize nofile 1M",
            "resize a.raw 8M extra",
            "resize -5 a.raw",
            "resize -q -f raw --shrink a.raw 1234567",
            "info -f raw a.raw",
        ],
    );
    both.same_bytes("a.raw");
}

#[test]
fn qcow2_images_are_resized() {
    let both = images();
    same(
        &both,
        &[
            "resize a.qcow2 8M",
            "resize a.qcow2 2M",
            "resize --shrink a.qcow2 2M",
            "resize -q a.qcow2 4M",
            "resize --preallocation=full --shrink a.qcow2 -1M",
            "resize --shrink a.qcow2 1000",
            "resize a.qcow2 4E",
            "resize a.qcow2 8M -f qcow2",
        ],
    );
    both.same_content("a.qcow2");
}

#[test]
fn preallocated_growth_of_qcow2_images_allocates_their_clusters() {
    use std::os::unix::fs::MetadataExt;
    for (mode, options) in [
        ("metadata", "cluster_size=64k"),
        ("metadata", "cluster_size=512"),
        ("falloc", "cluster_size=64k"),
        ("full", "cluster_size=4k"),
        ("full", "cluster_size=2M,refcount_bits=1"),
    ] {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "1M"]);
        // The file has freed clusters with old data in its middle.
        both.qemu(Io, &["-c", "write -P 6 0 1M", "-c", "write -P 5 0 64k", "a.qcow2"]);
        both.qemu(Io, &["-d", "unmap", "-c", "discard 512k 256k", "a.qcow2"]);
        both.same(Img, &["resize", &format!("--preallocation={mode}"), "a.qcow2", "+9M"]);
        both.same_content("a.qcow2");
        for directory in both.our_directories() {
            let image = directory.join("a.qcow2");
            Program::new("qemu-img").arg("check").arg(&image).succeed();
            let map = Program::new("qemu-img").args(["map", "--output=json"]).arg(&image).succeed();
            let last = map.out().lines().last().unwrap().to_owned();
            assert!(last.contains(r#""present": true"#), "{mode} {options}: {last}");
            let stored = std::fs::metadata(&image).unwrap().blocks() * 512;
            assert_eq!(stored >= 9 << 20, mode != "metadata", "{mode} {options}: {stored}");
        }
    }
}

#[test]
fn benchmarks_print_and_refuse_the_same_as_qemu_img() {
    let both = images();
    same(
        &both,
        &[
            "bench",
            "bench -c 100 a.raw",
            "bench -c 100 -w -f raw a.raw",
            "bench -c 100 -w a.raw",
            "bench -c 100 -w a.qcow2",
            "bench -c 200 -w --pattern 5 --flush-interval 100 -d 32 a.qcow2",
            "bench -c 200 -w --flush-interval 100 --no-drain -d 32 a.qcow2",
            "bench -c 100 -w --flush-interval 10 a.raw",
            "bench -c 100 -w --pattern 300 a.raw",
            "bench -c 100 --flush-interval 10 a.raw",
            "bench -c foo a.raw",
            "bench -c -1 a.raw",
            "bench -d 0 a.raw",
            "bench -s 5G a.raw",
            "bench -S 8k -o 512k -c 10 a.raw",
            "bench -o foo a.raw",
            "bench -o 100M -c 10 a.raw",
            "bench -i foo a.raw",
            "bench -i io_uring -c 10 a.raw",
            "bench -i native -c 10 a.raw",
            "bench -n -c 10 a.raw",
            "bench -t foo -c 10 a.raw",
            "bench -U -w -c 10 a.raw",
            "bench -c 10 null-co://",
            "bench -w -c 10 nofile",
            "bench -c 10 -s 8M a.raw",
            "bench -c 3 -d 1 -s 1M -f raw a.raw",
        ],
    );
    both.same_bytes("a.raw");
    both.same_content("a.qcow2");
}
