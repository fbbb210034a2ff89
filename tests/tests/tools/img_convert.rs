//! `img convert` and `dd` print the same as qemu-img and create images with the same contents.

use oxblk_tests::differential::Differential;
use oxblk_tests::differential::normalise::Rules;
use oxblk_tests::program::Tool::{Img, Io};

fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

fn images() -> Differential {
    let both = Differential::new().rules(Rules { progress: true, ..Rules::default() });
    both.qemu(Img, &["create", "-q", "-f", "raw", "a.raw", "9M"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -P 1 128k 64k", "a.raw"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -P 2 5000k 3001k", "a.raw"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -P 0 6M 100k", "a.raw"]);
    both.file("odd.raw", &[7; 1000]);
    both.qemu(Img, &["create", "-q", "-f", "raw", "b.raw", "1M"]);
    both.qemu(Io, &["-f", "raw", "-c", "write -P 5 512k 4k", "b.raw"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    for command in ["write -P 8 0 64k", "write -z 2M 64k", "write -c -P 9 3M 64k"] {
        both.qemu(Io, &["-c", command, "a.qcow2"]);
    }
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "c.qcow2"]);
    both.qemu(Io, &["-c", "write -P 7 100k 1M", "c.qcow2"]);
    both
}

#[test]
fn conversions_between_formats_keep_the_contents() {
    let both = images();
    for line in [
        "convert -O qcow2 a.raw out.qcow2",
        "convert -O qcow2 -W a.raw out.qcow2",
        "convert -O qcow2 -m 1 a.raw out.qcow2",
        "convert -O qcow2 -m 16 a.raw out.qcow2",
        "convert -O qcow2 -S 0 a.raw out.qcow2",
        "convert -O qcow2 -S 64k a.raw out.qcow2",
        "convert -O qcow2 -t none -T none a.raw out.qcow2",
        "convert -O qcow2 -o cluster_size=512 a.raw out.qcow2",
        "convert -O qcow2 -o cluster_size=2M a.raw out.qcow2",
        "convert -O qcow2 -o compat=0.10 a.raw out.qcow2",
        "convert -O qcow2 -o preallocation=metadata a.qcow2 out.qcow2",
        "convert -O qcow2 -o size=8M a.qcow2 out.qcow2",
        "convert -O qcow2 -c a.raw out.qcow2",
        "convert -O qcow2 -c -W a.raw out.qcow2",
        "convert -O qcow2 -c -o compression_type=zstd a.raw out.qcow2",
        "convert -O qcow2 -c -o cluster_size=4k a.raw out.qcow2",
        "convert -O qcow2 c.qcow2 out.qcow2",
        "convert -O qcow2 -c c.qcow2 out.qcow2",
        "convert -O qcow2 -B a.qcow2 -F qcow2 c.qcow2 out.qcow2",
        "convert -O qcow2 a.raw b.raw odd.raw out.qcow2",
        "convert -O qcow2 -c odd.raw a.raw out.qcow2",
    ] {
        same(&both, &[line]);
        both.same_content("out.qcow2");
    }
}

#[test]
fn conversions_to_raw_write_the_same_bytes_as_qemu_img() {
    let both = images();
    for line in [
        "convert a.raw out.raw",
        "convert -O raw a.qcow2 out.raw",
        "convert -O raw c.qcow2 out.raw",
        "convert -C a.raw out.raw",
        "convert -S 0 a.raw out.raw",
        "convert -S 8k a.raw out.raw",
        "convert -r 100M a.qcow2 out.raw",
        "convert --salvage a.raw out.raw",
        "convert a.raw b.raw odd.raw out.raw",
        "convert --image-opts driver=raw,file.filename=a.raw out.raw",
        "convert --source-image-opts driver=raw,file.filename=b.raw out.raw",
        "convert -n b.raw out.raw",
        "convert -n --target-is-zero b.raw out.raw",
        "convert -n --target-image-opts b.raw driver=raw,file.filename=out.raw",
        "convert -n a.raw null-co://",
        "dd if=a.raw of=out.raw",
        "dd if=a.raw of=out.raw bs=64k count=20 skip=1",
        "dd if=a.raw of=out.raw bs=300 count=7",
        "dd if=odd.raw of=out.raw bs=300",
        "dd -f qcow2 -O raw if=c.qcow2 of=out.raw bs=1M",
        "dd -U if=odd.raw of=out.raw",
    ] {
        same(&both, &[line]);
        both.same_bytes("out.raw");
    }
    same(&both, &["dd -f raw -O qcow2 if=a.raw of=out.qcow2 bs=1M"]);
    both.same_content("out.qcow2");
}

#[test]
fn progress_is_shown_unless_quiet() {
    let both = images();
    same(
        &both,
        &[
            "convert -p a.raw out.raw",
            "convert -p -q a.raw out.raw",
            "convert -p -O qcow2 a.raw out.qcow2",
            "convert -p nofile out.raw",
            "convert -p --salvage a.raw out.raw",
        ],
    );
}

#[test]
fn impossible_conversions_are_refused_with_qemus_messages() {
    let both = images();
    same(
        &both,
        &[
            "convert",
            "convert a.raw",
            "convert nofile out.raw",
            "convert -O nope a.raw out.raw",
            "convert -f nope a.raw out.raw",
            "convert -f qcow2 a.raw out.raw",
            "convert -O qcow2 -o cluster_size=3 a.raw out.qcow2",
            "convert -O qcow2 -o bogus=3 a.raw out.qcow2",
            "convert -O qcow2 -o compression_type=bad -c a.raw out.qcow2",
            "convert -O raw -c a.raw out.raw",
            "convert -O qcow2 -c -o preallocation=metadata a.qcow2 out.qcow2",
            "convert -m 0 a.raw out.raw",
            "convert -m 17 a.raw out.raw",
            "convert -m x a.raw out.raw",
            "convert -S foo a.raw out.raw",
            "convert -S 1000 a.raw out.raw",
            "convert -S 3G a.raw out.raw",
            "convert -C -S 4k a.raw out.raw",
            "convert -C -c -O qcow2 a.raw out.qcow2",
            "convert -C --salvage a.raw out.raw",
            "convert -t foo a.raw out.raw",
            "convert -T foo a.raw out.raw",
            "convert -r foo a.qcow2 out.raw",
            "convert --target-is-zero a.raw out.raw",
            "convert -n a.raw missing.raw",
            "convert -n a.raw odd.raw",
            "convert -n -o size=3 a.raw out.raw",
            "convert -n --target-is-zero -B a.qcow2 -F qcow2 -O qcow2 a.qcow2 c.qcow2",
            "convert --target-image-opts a.raw driver=raw,file.filename=out.raw",
            "convert -n --target-image-opts -O raw a.raw driver=raw,file.filename=out.raw",
            "convert --image-opts -f raw a.raw out.raw",
            "convert -O qcow2 -B a.qcow2 c.qcow2 out.qcow2",
            "convert -O qcow2 -o backing_file=a.qcow2 c.qcow2 out.qcow2",
            "convert -O qcow2 -F qcow2 c.qcow2 out.qcow2",
            "convert -O raw -B a.qcow2 -F qcow2 c.qcow2 out.qcow2",
            "convert -O qcow2 -B a.qcow2 -F qcow2 a.raw b.raw out.qcow2",
            "convert --skip-broken-bitmaps -O qcow2 a.qcow2 out.qcow2",
            "convert -O qcow2 a.raw /nonexistent/out.qcow2",
            "convert a.raw null-co://",
            "dd",
            "dd if=a.raw",
            "dd if=a.raw of=out.raw bs=foo",
            "dd if=a.raw of=out.raw bs=0",
            "dd if=a.raw of=out.raw count=foo",
            "dd if=a.raw of=out.raw count=0",
            "dd if=a.raw of=out.raw skip=100000",
            "dd if=a.raw of=out.raw bogus=1",
            "dd if=a.raw of=out.raw bogus",
            "dd if=a.raw of=out.raw skip",
            "dd if=a.raw of=out.raw skip=",
            "dd if=a.raw of=out.raw skip=-1",
            "dd if=a.raw of=out.raw bs=1000 skip=2 count=1",
            "dd if=a.raw of=out.raw bs=1000 skip=2 count=2",
            "dd if=nofile of=out.raw",
            "dd -O nope if=a.raw of=out.raw",
            "dd -f nope if=a.raw of=out.raw",
            "dd if=a.raw of=out.raw bs=3G",
            "dd --image-opts -f raw if=a.raw of=out.raw",
            "dd -n if=a.raw of=out.raw",
        ],
    );
}

#[test]
fn an_existing_target_keeps_its_backing_file() {
    let both = images();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "out.qcow2"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "alone.qcow2", "4M"]);
    for line in [
        "convert -n -O qcow2 -B a.qcow2 c.qcow2 out.qcow2",
        "convert -n -O qcow2 -B nofile c.qcow2 out.qcow2",
        "convert -n -O qcow2 -B a.qcow2 -F nope c.qcow2 out.qcow2",
        "convert -n -O qcow2 -F qcow2 c.qcow2 out.qcow2",
        "convert -n --target-is-zero -O qcow2 -B a.qcow2 c.qcow2 out.qcow2",
        "convert -n -O qcow2 -B a.qcow2 a.raw b.raw out.qcow2",
        "convert -n -O qcow2 -B a.qcow2 a.qcow2 alone.qcow2",
    ] {
        same(&both, &[line]);
        both.same_content("out.qcow2");
        both.same_content("alone.qcow2");
    }
}

#[test]
fn an_image_is_not_converted_onto_itself() {
    let both = images();
    same(&both, &["convert a.raw a.raw", "convert -O qcow2 a.qcow2 a.qcow2"]);
    same(&both, &["compare a.raw a.raw", "info a.qcow2"]);
    both.same_bytes("a.raw");
    both.same_bytes("a.qcow2");
}
