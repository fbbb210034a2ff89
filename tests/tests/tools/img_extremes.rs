//! Sizes, names and option lists at their limits, and devices as targets, compared with QEMU's tools.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

fn images() -> Differential {
    let both = Differential::new();
    both.file("a.raw", &[7; 1 << 20]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", "data_file=df.raw", "df.qcow2", "4M"]);
    both
}

#[test]
fn an_option_list_with_a_comma_too_many_is_refused() {
    same(
        &images(),
        &[
            "create -f raw -o ,, n 1M",
            "create -f raw -o , n 1M",
            "create -f raw -o  n 1M",
            "create -f raw -o ,,size=1M n",
            "create -f raw -o size=1M, n",
            "create -f raw -o size=1M,, n",
            "amend -o ,, a.qcow2",
            "convert -O qcow2 -o ,, a.raw n",
            "measure -O qcow2 -o ,, a.raw",
        ],
    );
}

#[test]
fn a_size_beyond_the_longest_disk_is_refused_by_resize() {
    let both = images();
    same(
        &both,
        &[
            "resize -f raw a.raw 9223372036854775807",
            "resize -f raw a.raw 9223372036854775808",
            "resize -f raw a.raw 9223372035781034496",
            "resize -f raw a.raw 9223372035781033985",
            "resize -f raw a.raw +9223372035781033984",
            "resize -f raw a.raw 0xffffffffffffffff",
            "resize -f raw a.raw 0x10000000000000000",
            "resize -f raw a.raw 0x1k",
            "resize -f raw a.raw 1e3",
            "resize -f raw a.raw nan",
            "resize -f qcow2 a.qcow2 9223372036854775807",
            "resize -f qcow2 a.qcow2 9223372036854775296",
            "resize -f qcow2 a.qcow2 9223372035781033984",
        ],
    );
    both.same(Io, &["-f", "raw", "-c", "truncate 9223372036854775807", "a.raw"]);
    both.same(Io, &["-c", "truncate 9223372035781034496", "a.qcow2"]);
}

#[test]
fn numbers_of_new_images_beyond_two_to_the_63rd_are_negative() {
    same(
        &Differential::new(),
        &[
            "create -f raw n 0xffffffffffffffff",
            "create -f raw n 9223372036854775807",
            "create -f raw -o size=0xffffffffffffffff n",
            "create -f raw -o size=0x8000000000000000 n",
            "create -f raw -o extent_size_hint=0xffffffffffffffff n 1M",
            "create -f qcow2 n 9223372036854775807",
            "create -f qcow2 n 9223372035781033984",
            "create -f qcow2 -o size=0xffffffffffffffff n",
            "create -f qcow2 -o size=0xfffffffffffffe00 n",
            "create -f qcow2 -o size=9223372036854775296 n",
            "create -f qcow2 -o cluster_size=0xffffffffffffffff n 1M",
            "create -f qcow2 -o refcount_bits=0xffffffffffffffff n 1M",
            "create -f qcow2 --object secret,id=s,data=a \
             -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0xffffffffffffffff n 1M",
            "measure -O raw --size 9223372036854775807",
            "measure -O qcow2 --size 9223372036854775807",
            "measure -O qcow2 -o refcount_bits=0xffffffffffffffff --size 1M",
        ],
    );
}

#[test]
fn an_image_longer_than_the_longest_disk_is_not_opened() {
    same(
        &Differential::new(),
        &[
            "info --image-opts driver=null-co,size=9223372035781033984",
            "info --image-opts driver=null-co,size=9223372035781033985",
            "info --image-opts driver=null-co,size=9223372036854775807",
            "info --image-opts driver=raw,file.driver=null-co,file.size=9223372035781034496",
            "info --image-opts driver=raw,size=1M,file.driver=null-co,file.size=9223372035781034496",
        ],
    );
}

#[test]
fn a_name_of_a_snapshot_is_stored_up_to_255_bytes() {
    let both = images();
    for name in ["a".repeat(1100), "\u{e9}".repeat(200)] {
        both.same(Img, &["snapshot", "-c", &name, "a.qcow2"]);
        both.same(Img, &["snapshot", "-d", &name, "a.qcow2"]);
    }
    both.same(Img, &["snapshot", "-d", &"a".repeat(255), "a.qcow2"]);
}

#[test]
fn a_name_of_a_bitmap_is_not_shortened() {
    let both = images();
    for len in [1023, 1024, 1100] {
        // The message contains the generated node name. This name differs between the tools.
        both.same_exit_code(Img, &["bitmap", "--add", "a.qcow2", &"a".repeat(len)]);
    }
    both.same(Img, &["map", "a.qcow2"]);
}

#[test]
fn a_snapshot_that_cannot_be_applied_is_reported_as_by_qemu() {
    same(
        &images(),
        &[
            "snapshot -a s a.raw",
            "snapshot -f raw -a s a.raw",
            "snapshot -a s --image-opts file.filename=a.raw",
            "snapshot -a s a.qcow2",
            "snapshot -a s df.qcow2",
        ],
    );
}

#[test]
fn an_existing_device_is_used_and_a_missing_one_is_not_created() {
    same(
        &images(),
        &[
            "create -f raw -o help /dev/null",
            "create -f host_device -o help",
            "create -f raw /dev/null 0",
            "create -f raw -o preallocation=off /dev/null 0",
            "create -f raw -o preallocation=off /dev/null 1M",
            "create -f raw -o preallocation=full /dev/null 0",
            "create -f raw -o preallocation=bad /dev/null 0",
            "create -f raw -o nocow=on /dev/null 0",
            "create -f raw host_device:zz 1M",
            "create -f qcow2 host_device:zz 1M",
            "create -f raw -o preallocation=falloc host_device:zz 1M",
            "create -f raw host_device: 1M",
            "create -f raw host_device:a.raw 1M",
            "create -f host_device zz 1M",
            "convert -O raw -o preallocation=full a.raw /dev/null",
        ],
    );
}
