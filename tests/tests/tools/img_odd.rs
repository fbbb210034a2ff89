//! Names, sizes, options and environments that are unusual or not documented.

use std::io::Read;
use std::process::{Command, Stdio};

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};
use oxblk_tests::program::{Program, oxblk};

fn same(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

fn images() -> Differential {
    let both = Differential::new();
    both.file("odd.raw", &[7; 1000]);
    both.file("odd2.raw", &[7; 100_001]);
    both.file("empty.raw", b"");
    both.file("colon:x.raw", &[5; 4096]);
    both.file("com,ma.raw", &[6; 4096]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    both.qemu(Io, &["-c", "write -q 1M 64k", "a.qcow2"]);
    both
}

#[test]
fn names_with_prefixes_colons_and_commas_are_shown_as_qemu_shows_them() {
    same(
        &images(),
        &[
            "info file:odd.raw",
            "info file:colon:x.raw",
            "info ./colon:x.raw",
            "info colon:x.raw",
            "info host_device:/dev/null",
            "info com,ma.raw",
            "info --image-opts driver=raw,file.filename=com,,ma.raw",
            "create -f qcow2 -b file:colon:x.raw -F raw n.qcow2",
            "info n.qcow2",
            "convert file:odd.raw file:out.raw",
        ],
    );
}

#[test]
fn info_prints_nested_formats_level_by_level() {
    same(
        &images(),
        &[
            "info --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
            "info --output json --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
            "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}}",
        ],
    );
}

#[test]
fn wrong_values_in_option_strings_are_refused_with_qemus_messages() {
    same(
        &images(),
        &[
            "info --image-opts filename=odd.raw",
            "info --image-opts file.=odd.raw",
            "info --image-opts driver=raw,file.=odd.raw",
            "info --image-opts driver=raw,file..filename=odd.raw",
            "info json:{\"driver\":\"raw\",\"file\":{\"\":\"odd.raw\"}}",
            "info --image-opts driver=raw,size=100000000,file.filename=./colon:x.raw",
            "info --image-opts driver=raw,offset=foo,file.filename=odd2.raw",
            "info --image-opts driver=raw,offset=-1,file.filename=odd2.raw",
            "info --image-opts driver=qcow2,cache-size=foo,file.filename=a.qcow2",
            "info --image-opts driver=null-co,bogus=foo",
            "info --image-opts driver=file,filename=odd.raw,cache.direct=maybe",
            "info --image-opts driver=file,filename=odd.raw,detect-zeroes=bogus",
            "info json:[1]",
            "info json:\"x\"",
            "info json:{\"filename\":\"a.qcow2\"}",
            "info --object secret,id=s odd.raw",
            "info --object secret,id=s,file=nofile odd.raw",
            "info --object secret,id=s,data=x,bogus=1 odd.raw",
            "info --object secret,id=1s,data=x odd.raw",
            "create -f qcow2 n.qcow2 1M 2M",
            "create -u -f qcow2 -b nowhere -F nope n.qcow2 1M",
            "create -f qcow2 -o size=-1 n.qcow2",
            "create -f qcow2 -o refcount_bits=-1 n.qcow2 1M",
            "create -f qcow2 -o refcount_bits=-0x10 n.qcow2 1M",
            "create -f qcow2 -o refcount_bits=18446744073709551615 n.qcow2 1M",
            "create -f qcow2 -o refcount_bits=-18446744073709551600 n.qcow2 1M",
            "amend -o refcount_bits=-1 a.qcow2",
            "measure -O qcow2 --size 1M -o refcount_bits=-1",
            "convert -O qcow2 -o refcount_bits=-1 a.qcow2 n.qcow2",
            "create -f qcow2 -o cluster_size=-1 n.qcow2 1M",
            "create -f qcow2 -o encrypt.format=bogus n.qcow2 1M",
            "resize a.qcow2 +-1",
            "convert -O qcow2 -o help",
            "convert -o help",
        ],
    );
}

#[test]
fn numbers_are_parsed_as_by_the_c_library() {
    let both = images();
    both.same(Img, &["create", "-f", "raw", "n.raw", " +1M"]);
    both.same(Img, &["resize", "a.qcow2", " 5M"]);
    same(&both, &["bench -c 2 -S 0 -f raw odd2.raw", "create -f raw m.raw +1M"]);
}

#[test]
fn files_of_odd_sizes_read_as_whole_sectors() {
    let both = images();
    same(
        &both,
        &[
            "create -f qcow2 -b odd.raw -F raw n.qcow2",
            "compare odd.raw odd2.raw",
            "compare empty.raw odd.raw",
            "compare -s empty.raw odd.raw",
            "compare odd2.raw odd.raw",
            "convert -O qcow2 empty.raw e.qcow2",
            "convert -O qcow2 odd.raw odd2.raw o.qcow2",
            "measure -O qcow2 odd2.raw",
        ],
    );
    both.same_content("o.qcow2");
}

#[test]
fn an_image_that_ends_too_early_compares_and_maps_the_same() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    both.qemu(Io, &["-c", "write -q -P 1 0 64k", "-c", "write -q -P 5 -c 3M 64k", "a.qcow2"]);
    both.prepare(|directory| {
        let bytes = std::fs::read(directory.join("a.qcow2")).expect("an image");
        let short = bytes.get(..300_000).expect("a longer image");
        std::fs::write(directory.join("short.qcow2"), short).expect("an image");
    });
    same(
        &both,
        &["compare a.qcow2 short.qcow2", "compare short.qcow2 a.qcow2", "info short.qcow2"],
    );
}

#[test]
fn an_image_over_a_read_only_node_is_not_opened_for_writing() {
    let both = images();
    let json = "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"odd.raw\",\"read-only\":true}}";
    both.same(Io, &["-c", "write 0 512", json]);
    both.same(Io, &["-r", "-c", "length", json]);
    let json = "json:{\"driver\":\"qcow2\",\"file.filename\":\"a.qcow2\",\"read-only\":true}";
    both.same(Io, &["-c", "write 0 512", json]);
}

#[test]
fn exceeding_the_file_size_limit_is_an_error_and_not_a_fatal_signal() {
    let both = Differential::new();
    let command = "ulimit -f 100; exec \"$0\" img create -f raw n.raw 1M";
    for directory in both.our_directories() {
        let reply = Program::new("sh").arg("-c").arg(command).arg(oxblk()).directory(&directory);
        let reply = reply.run();
        assert_eq!(reply.code(), 1);
        let expected = "n.raw: The image size is too large for file format 'raw'\n";
        assert!(reply.err().ends_with(expected), "{}", reply.err());
    }
}

#[test]
fn an_image_in_use_can_become_a_backing_file() {
    let both = images();
    let mut users: Vec<_> = [both.qemu_directory()]
        .into_iter()
        .chain(both.our_directories())
        .map(|directory| {
            let mut user = Command::new("qemu-io");
            user.arg("a.qcow2").current_dir(directory).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut user = user.spawn().expect("qemu-io");
            // qemu-io prints its prompt when the image is open.
            let mut byte = [0];
            user.stdout.as_mut().expect("a pipe").read_exact(&mut byte).expect("a prompt");
            user
        })
        .collect();
    same(
        &both,
        &["create -f qcow2 -b a.qcow2 -F qcow2 n.qcow2", "info a.qcow2", "info -U n.qcow2"],
    );
    for user in &mut users {
        drop(user.stdin.take());
        user.wait().expect("qemu-io ends");
    }
    both.same_content("n.qcow2");
}

#[test]
fn numbers_of_dd_mean_the_same_as_with_qemu() {
    let both = images();
    same(
        &both,
        &[
            "convert -r 0 odd2.raw rate.raw",
            "convert -O qcow2 -o size=100M a.qcow2 sized.qcow2",
            "convert -O qcow2 -o size=1M a.qcow2 small.qcow2",
            "compare -s sized.qcow2 small.qcow2",
            "dd if=odd2.raw of=d.raw skip=1k",
            "dd if=odd2.raw of=d.raw count=1M",
            "dd if=odd2.raw of=d.raw skip=0x10 count=20",
            "dd if=odd2.raw of=nodir/d.raw",
        ],
    );
    both.same_bytes("rate.raw");
    both.same_bytes("d.raw");
}

#[test]
fn only_the_first_wrong_number_of_a_command_is_reported() {
    let both = images();
    for command in ["write \"0\" \"512\"", "write 'a' 'b'", "alloc a b", "discard a b", "read a b"]
    {
        both.same(Io, &["-c", command, "a.qcow2"]);
    }
}

#[test]
fn the_error_for_an_unavailable_io_command_names_it() {
    for name in ["zone_open", "zone_report", "zrp"] {
        let reply = Program::oxblk().args(["io", "-c", name]).run();
        assert_eq!(reply.code(), 1);
        assert_eq!(reply.err(), format!("oxblk io: The command '{name}' is not supported yet\n"));
    }
}
