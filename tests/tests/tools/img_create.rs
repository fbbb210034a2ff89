//! `img create` prints and creates the same as qemu-img.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

/// Runs each line with every program, and compares the results.
fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

#[test]
fn a_new_raw_image_is_printed_and_created() {
    let both = Differential::new();
    same(
        &both,
        &[
            "create -f raw a.raw 1M",
            "create a.raw 1.5M",
            "create -f raw a.raw .5M",
            "create -f raw a.raw 0x10",
            "create -f raw a.raw 1b",
            "create -f raw a.raw 1000",
            "create -f raw a,b.raw 1M",
            "create -q -f raw a.raw 2M",
            "create -f file x.raw 1M",
            "create -f raw a.raw -o size=2M",
            "create -f raw -o preallocation=off -o size=4k a.raw",
            "create -f raw -o preallocation=full a.raw 1M",
            "create -f raw -o preallocation=falloc a.raw 1M",
            "create -f raw -o nocow=on a.raw 1M",
            "create -f raw --object secret,id=s0,data=abc a.raw 1M",
        ],
    );
    both.same_bytes("a.raw");
}

#[test]
fn wrong_sizes_and_options_are_refused_with_qemus_messages() {
    let both = Differential::new();
    same(
        &both,
        &[
            "create",
            "create -f raw",
            "create -f raw a b c",
            "create --bogus",
            "create --b x y",
            "create -f",
            "create --format",
            "create --quiet=3 a 1M",
            "create -y a",
            "create -f raw a.raw 1X",
            "create -f raw a.raw -1",
            "create -f raw a.raw 0x10k",
            "create -f raw a.raw 8E",
            "create -f raw a.raw 7E",
            "create -f raw a.raw 16E",
            "create -f raw a.raw 1e3",
            "create -f raw a.raw",
            "create -f raw a.raw 1M -o size=2M",
            "create -f raw a.raw -o size=foo",
            "create -f raw -o size a.raw 1M",
            "create -f raw -o bogus=1 a.raw 1M",
            "create -f raw -o preallocation=bogus a.raw 1M",
            "create -f raw -o preallocation=metadata a.raw 1M",
            "create -f raw -o , a.raw 1M",
            "create -f raw -o =x a.raw 1M",
            "create -f raw -b base -F raw b.raw",
            "create -f nope a.raw 1M",
            "create -f null-co x 1M",
            "create -f raw null-co:// 1M",
            "create -f raw nosuch:x 1M",
            "create -f raw /nonexistent/a.raw 1M",
            "create -f raw --object bogus,id=s0,data=abc a.raw 1M",
        ],
    );
    both.same(Img, &["create", "-f", "raw", "a.raw", ""]);
}

#[test]
fn options_of_formats_are_listed() {
    let both = Differential::new();
    same(
        &both,
        &[
            "create -f raw -o help",
            "create -f raw -o ?",
            "create -f raw -o help a.raw",
            "create -f file -o help",
            "create -f qcow2 -o help",
            "create -f qcow2 -o help a.qcow2 1M",
            "create -f qcow2 -o size=3 -o help a.qcow2",
            "create -f raw -o help a.raw x",
            "create -f raw -o help a.raw x y",
            "create -f nope -o help a.raw x",
            "create -f raw -o help nosuch:x",
            "create -f nope -o help",
            "create -f null-co -o help",
        ],
    );
}

#[test]
fn a_new_qcow2_image_is_printed_with_its_options_and_created() {
    let both = Differential::new();
    for line in [
        "create -f qcow2 a.qcow2 1M",
        "create -f qcow2 a.qcow2 1T",
        "create -f qcow2 -o compat=0.10,cluster_size=4k a.qcow2 1M",
        "create -f qcow2 -o compat=v3,cluster_size=2M a.qcow2 100M",
        "create -f qcow2 -o refcount_bits=1,lazy_refcounts=on,compression_type=zstd a.qcow2 1M",
        "create -f qcow2 -o refcount_bits=64,cluster_size=512 a.qcow2 8M",
        "create -f qcow2 -o preallocation=metadata a.qcow2 1M",
        "create -f qcow2 -o preallocation=falloc a.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts a.qcow2 1M",
        "create -f qcow2 -o nolazy_refcounts a.qcow2 1M",
        "create -f qcow2 -o size=3 -o cluster_size=4k a.qcow2",
        "create -q -f qcow2 a.qcow2 1M",
    ] {
        same(&both, &[line]);
        both.same_content("a.qcow2");
    }
}

#[test]
fn wrong_qcow2_options_are_refused_with_qemus_messages() {
    let both = Differential::new();
    same(
        &both,
        &[
            "create -f qcow2 -o compat=0.10,cluster_size=4k,lazy_refcounts=on a.qcow2 1M",
            "create -f qcow2 -o compat=2 a.qcow2 1M",
            "create -f qcow2 -o cluster_size=4M a.qcow2 1M",
            "create -f qcow2 -o cluster_size=1000 a.qcow2 1M",
            "create -f qcow2 -o cluster_size=256 a.qcow2 1M",
            "create -f qcow2 -o cluster_size=foo a.qcow2 1M",
            "create -f qcow2 -o cluster_size=20E a.qcow2 1M",
            "create -f qcow2 -o refcount_bits=3 a.qcow2 1M",
            "create -f qcow2 -o refcount_bits=128 a.qcow2 1M",
            "create -f qcow2 -o refcount_bits=foo a.qcow2 1M",
            "create -f qcow2 -o lazy_refcounts=maybe a.qcow2 1M",
            "create -f qcow2 a.qcow2 4E",
            "create -f qcow2 /nonexistent/a.qcow2 1M",
            "create -f qcow2 -F raw a.qcow2 1M",
        ],
    );
}

#[test]
fn a_backing_file_is_opened_unless_an_option_forbids_it() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    same(
        &both,
        &[
            "create -f qcow2 -b base.qcow2 b.qcow2",
            "create -f qcow2 -o backing_file=base.qcow2 b.qcow2 1M",
            "create -f qcow2 -b base.qcow2 -F nope b.qcow2",
            "create -f qcow2 -b missing -F raw b.qcow2",
            "create -f qcow2 -b missing -F raw b.qcow2 1M",
            "create -f qcow2 -b b.qcow2 -F qcow2 b.qcow2",
            "create -u -f qcow2 -b missing b.qcow2 1M",
            "create -u -f qcow2 -b missing -F raw b.qcow2",
            "create -f qcow2 -o backing_file=x,,y,backing_fmt=raw c.qcow2 1M",
            "create -u -f qcow2 -o backing_file=x,,y,backing_fmt=raw c.qcow2 1M",
            "create -u -f qcow2 -b missing -F raw d.qcow2 1M",
            "create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 b.qcow2",
            "create -f qcow2 -b base.qcow2 -F qcow2 b.qcow2",
        ],
    );
    both.same(Img, &["create", "-f", "qcow2", "-b", "", "x.qcow2", "1M"]);
    both.same_content("b.qcow2");
    both.same(Io, &["-c", "length", "b.qcow2"]);
}

#[test]
fn commands_that_do_not_exist_are_refused() {
    let both = Differential::new();
    same(&both, &["foo", "--foo", "-x"]);
    both.same(Img, &[]);
}
