//! The commands of `io` print the same as the commands of qemu-io, on raw and on qcow2 images.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

const FORMATS: [&str; 2] = ["raw", "qcow2"];

/// Creates a disk of 64 MiB with some data, and files to write from.
fn disk(format: &str) -> Differential {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", format, "disk", "64M"]);
    for command in ["write -q -P 3 0 1M", "write -q -P 4 2M 64k"] {
        both.qemu(Io, &["-f", format, "-c", command, "disk"]);
    }
    both.file("pat", b"abcdefghij");
    both.file("empty", b"");
    both
}

/// Runs each command separately on one disk of each format.
fn each(commands: &[&str]) {
    for format in FORMATS {
        let both = disk(format);
        for command in commands {
            both.same(Io, &["-f", format, "-c", command, "disk"]);
        }
        both.same_content("disk");
    }
}

/// Runs command lines on one disk of each format. Words with blanks are in single quotes.
fn lines(lines: &[&str]) {
    for format in FORMATS {
        let both = disk(format);
        for line in lines {
            let line = line.replace("FORMAT", format);
            let words: Vec<&str> = line
                .split('\'')
                .enumerate()
                .flat_map(|(index, part)| match index % 2 {
                    0 => part.split(' ').filter(|word| !word.is_empty()).collect(),
                    _ => vec![part],
                })
                .collect();
            both.same(Io, &words);
        }
        both.same_content("disk");
    }
}

#[test]
fn reads_verify_print_and_report_the_same_as_qemu_io() {
    each(&[
        "read",
        "read 0",
        "read 0 512",
        "read -v 0 64",
        "read -v 500 40",
        "read -q 0 512",
        "read -C 0 512",
        "read -P 0 0 512",
        "read -P 1 0 512",
        "read -P 0x1g 0 512",
        "read -P 300 0 512",
        "read -P 0 -s 100 0 512",
        "read -P 0 -s 100 -l 500 0 512",
        "read -P 0 -l 100 -s 1000 0 512",
        "read -l 5 0 512",
        "read -s 5 0 512",
        "read -P 1 -s 5 -l 20 0 512",
        "read foo 512",
        "read 0 foo",
        "read -1 512",
        "read 0 -5",
        "read 0 3G",
        "read 64M 512",
        "read 0 1k 1k",
        "read -p 0 512",
        "read -x 0 512",
        "read 0 0",
        "read 1e 5",
        "read 0 8E",
        "read -a 0 512",
        "read -r 0 512",
        "read -v 990 120",
        "read -v 0 64",
        "readv",
        "readv 0",
        "readv 0 512 512",
        "readv -v 0 16 16",
        "readv -P 0xcd 0 512 512",
        "readv -P 1 0 512 512",
        "readv 0 foo",
        "readv foo 1",
        "readv -x 0 1",
        "readv 0 0",
        "readv 0 2G 1G",
        "readv 100M 512",
        "r 0 512",
        "rv 0 512",
        "read 0 \"\"",
    ]);
}

#[test]
fn a_zero_write_without_fallback_fails_on_formats_that_may_write_data() {
    for format in ["vdi", "vpc", "qed", "parallels"] {
        let both = disk(format);
        both.same(Io, &["-f", format, "-c", "write -z -n 0 1M", "disk"]);
    }
}

#[test]
fn writes_report_and_fail_as_with_qemu_io() {
    each(&[
        "write",
        "write 0 512",
        "write -P 7 1000 100",
        "write -z 64k 64k",
        "write -z -u 64k 64k",
        "write -u 64k 64k",
        "write -n 0 64k",
        "write -z -n 0 64k",
        "write -z -P 3 0 64k",
        "write -b -z 0 64k",
        "write -c 1000 64k",
        "write -f 0 64k",
        "write -f -c 0 64k",
        "write -s pat 0 64",
        "write -s nofile 0 64",
        "write -s pat -P 3 0 64",
        "write -s pat -z 0 64",
        "write -P foo 0 64",
        "write -C 0 512",
        "write 100M 512",
        "write -q 0 512",
        "write -z 1000 3000",
        "write 0 5G",
        "write -z 0 5G",
        "write -s empty 0 512",
        "write -r 0 64k",
        "write -r -z 0 64k",
        "write -r -z 0 x",
        "write -r -z -P 3 0 64k",
        "write -r -z -c 1 64k",
        "writev 0 512 512",
        "writev -P 5 0 1k 1k",
        "writev 0 x",
        "writev -f 0 512",
        "writev -P",
        "writev 100M 512",
        "flush",
        "flush x",
        "discard",
        "discard 0",
        "discard 0 64k",
        "discard -q 0 64k",
        "discard -C 0 64k",
        "discard 0 foo",
        "discard foo 1",
        "discard 0 3G",
        "discard 63M 2M",
        "discard 10 100",
        "truncate",
        "truncate 8M",
        "truncate 1M",
        "truncate foo",
        "truncate -m bogus 9M",
        "truncate -x",
        "truncate -1",
        "truncate -m off",
        "truncate -moff",
        "truncate -m off --",
        "truncate --",
        "truncate -m off x",
        "truncate x -m off",
        "truncate -- x",
        "truncate 20E -m off",
        "w 0 512",
        "f",
        "d 0 512",
        "t 8M",
    ]);
}

#[test]
fn aio_requests_report_the_same_as_qemu_io() {
    each(&[
        "aio_read 0 512",
        "aio_read -P 3 0 512",
        "aio_read -v 0 16",
        "aio_read 0",
        "aio_read foo 4",
        "aio_read 0 x",
        "aio_write 0 512",
        "aio_write -u 0 64k",
        "aio_write -C 0 64k",
        "aio_write -q 0 64k",
        "aio_write 80M 64k",
        "aio_read 80M 64k",
        "aio_read -i 0 64k",
        "aio_write -i 0 64k",
        "aio_write -f 0 64k",
        "aio_write -z 0 1k 1k",
        "aio_write -r -z 0 1k 1k",
        "aio_write -r -z 0 x",
        "aio_flush",
        "aio_flush x",
    ]);
}

#[test]
fn other_commands_answer_as_those_of_qemu_io() {
    each(&[
        "length",
        "length foo",
        "length",
        "length",
        "info",
        "info x",
        "map",
        "map x",
        "map x y",
        "alloc",
        "alloc 0",
        "alloc 0 64k",
        "alloc 0 4M",
        "alloc foo",
        "alloc 0 foo",
        "alloc 100M",
        "alloc 4M 512",
        "alloc 1000 5000",
        "alloc 3M 2M",
        "alloc 8M 2M",
        "sleep",
        "sleep 1",
        "sleep foo",
        "help a b",
        "foo",
        "",
        "   ",
        "quit",
        "q",
        "close",
        "reopen -r",
        "reopen -w",
        "reopen",
        "reopen -c foo",
        "reopen -r -w",
        "reopen -o foo=bar",
        "reopen -r -o read-only=on",
        "reopen -x",
        "reopen foo",
        "sigraise foo",
        "sigraise",
        "sigraise 0",
        "l",
        "a 0",
        "i",
        "m",
        "s",
        "h read",
        "c",
        "o",
        "abort x",
        "open disk",
        "sleep 0",
        "help foo",
        "help length",
    ]);
}

#[test]
fn info_prints_the_name_of_a_protocol_twice_as_qemu_io() {
    let both = Differential::new();
    both.file("b.raw", &[7; 4096]);
    for disk in [
        "driver=file,filename=b.raw",
        "driver=null-co",
        "driver=null-aio",
        "driver=raw,file.filename=b.raw",
        "driver=raw,file.driver=null-co",
        "driver=blkdebug,image.driver=raw,image.file.filename=b.raw",
    ] {
        both.same(Io, &["-c", "info", "--image-opts", disk]);
    }
}

#[test]
fn a_map_counts_whole_sectors_at_the_end_of_a_file() {
    let both = Differential::new();
    both.file("odd", &[7; 66_001]);
    for name in ["driver=file,filename=odd", "driver=raw,file.filename=odd"] {
        both.same(Io, &["--image-opts", "-c", "map", name]);
    }
}

#[test]
fn command_lines_open_and_refuse_the_same_as_qemu_io() {
    lines(&[
        "-f FORMAT -r -c 'write 0 512' disk",
        "-f FORMAT -r -c 'discard 0 512' disk",
        "-f FORMAT -r -c 'truncate 5M' disk",
        "-f FORMAT -r -c 'aio_write 0 512' disk",
        "-f FORMAT -r -c 'write foo' disk",
        "-f FORMAT -c close -c 'read 0 512' disk",
        "-f FORMAT -c 'read 0 512' -c foo -c 'read 0 512' disk",
        "-f FORMAT -c 'aio_read 0 512' -c aio_flush -c length disk",
        "-f FORMAT -c 'sigraise 15' -c length disk",
        "-f FORMAT -c 'sleep 1' -c quit -c length disk",
        "-f FORMAT -r -U -c 'read 0 64k' disk",
        "-f FORMAT -U -c 'read 0 64k' disk",
        "-f FORMAT -m -n -c 'write 0 64k' disk",
        "-f FORMAT -k -c 'read 0 64k' disk",
        "-f FORMAT -k -t none -c 'read 0 64k' disk",
        "-f FORMAT -i io_uring -c 'read 0 64k' disk",
        "-f FORMAT -i threads -c 'read 0 64k' disk",
        "-f FORMAT --object secret,id=x,data=y -c length disk",
        "-f FORMAT --object bogus,id=x,data=y -c length disk",
        "-f FORMAT --cmd length --cache writeback --discard unmap --aio threads disk",
        "-f FORMAT -c 'reopen -r' -c 'write 0 512' disk",
        "-f FORMAT -r -c 'reopen -w' -c 'write 0 512' disk",
        "-f FORMAT -c 'reopen -o' disk",
        "-f FORMAT -c 'reopen -c none' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -c none -o cache.direct=off' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o cache.direct=on' -c 'write 1000 512' -c 'read 1000 512' disk",
        "-f FORMAT -c 'write 0 64k' -c 'reopen -r' -c 'reopen -w -c writethrough' -c 'write 0 64k' disk",
        "-f FORMAT -c 'reopen -o file=nope' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o file.filename=nope' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o driver=null-co' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o node-name=nope' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o discard=nope' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o cache.=3' -c 'read 0 512' disk",
        "-f FORMAT -c 'reopen -o a..b=3' -c 'read 0 512' disk",
        "-f FORMAT -c map -c 'alloc 0 1M' null-co://",
        "--image-opts -c map driver=null-co,read-zeroes=on,size=1M",
        "-f FORMAT -c 'reopen -o detect-zeroes=on' -c 'write -z 0 512' disk",
        "-f FORMAT -c 'aio_write 0 64k' -c 'reopen -r' -c 'read 0 64k' disk",
        "-f FORMAT -c 'read 0 512' -c close -c 'open -r -o driver=FORMAT disk' -c length disk",
        "-f FORMAT -t foo disk",
        "-f FORMAT -d foo disk",
        "-f FORMAT -i foo disk",
        "--image-opts -f FORMAT disk",
        "-f FORMAT -c 'write -q -P 1 0 1M' -c 'read -v 1048570 20' disk",
        "-f FORMAT -c 'write -q -P 9 4k 4k' -c 'write -q -z 6k 1k' -c 'read -v 6140 10' -c 'read -P 9 4k 2k' disk",
        "-c length",
        "nofile",
        "-c 'read 0 512'",
        "-f foo -c length disk",
        "--image-opts driver=foo",
        "--image-opts driver=FORMAT,file.filename=disk -c length",
        "-c 'open -o driver=FORMAT disk' -c length",
        "-c 'open -o driver=FORMAT,file.filename=disk' -c length",
        "-c 'open nofile' -c length",
        "-c 'open -x disk' -c length",
        "-c open",
        "-c 'open a b'",
        "-c 'open -t foo disk'",
        "-c 'open -d foo disk'",
        "-c 'open -i foo disk'",
        "-c 'open -r -o driver=FORMAT disk' -c 'write 0 512'",
        "-c 'open -n -o driver=FORMAT disk' -c length -c close -c close",
    ]);
}

#[test]
fn a_raw_image_grows_with_preallocation() {
    let both = disk("raw");
    for command in ["truncate -m full 65M", "truncate -m falloc 66M", "truncate -m metadata 67M"] {
        both.same(Io, &["-f", "raw", "-c", command, "disk"]);
    }
    both.same(Img, &["info", "-f", "raw", "disk"]);
    both.same_bytes("disk");
}

#[test]
fn commands_come_from_standard_input_too() {
    for format in FORMATS {
        let both = disk(format);
        let args = ["-f", format, "disk"];
        both.same_with_input(Io, &args, b"length\nread 0 512\nfoo\n\nquit\nlength\n");
        both.same_with_input(Io, &args, b"write -P 7 1M 1k\nread -P 7 1M 1k");
    }
}

#[test]
fn a_probed_raw_image_does_not_become_another_format() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "raw", "disk", "1M"]);
    both.file("header", b"QFI\xfb\0\0\0\x03");
    both.same(Io, &["-c", "write -s header 0 512", "disk"]);
    both.same(Io, &["-c", "write -P 81 0 64k", "disk"]);
    both.same(Io, &["-c", "write -s pat 0 4k", "disk"]);
    both.same_bytes("disk");
    both.same(Io, &["-f", "raw", "-c", "write -s header 0 512", "disk"]);
    both.same(Img, &["info", "disk"]);
    both.same(Img, &["info", "-f", "raw", "disk"]);
    both.same(Img, &["convert", "-f", "raw", "-O", "raw", "disk", "copy"]);
    both.same_bytes("copy");
    both.same(Img, &["resize", "-f", "raw", "disk", "2M"]);
}

#[test]
fn compressed_writes_work_if_the_format_supports_them() {
    each(&["write -c 10M 64k", "read -P 0xcd 10M 64k", "write -c 20M 512"]);
}

#[test]
fn copy_on_read_stores_only_data_that_was_read() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    both.qemu(Io, &["-c", "write -q -P 7 0 512k", "base"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk", "2M"]);
    both.qemu(Io, &["-c", "write -q -P 9 64k 64k", "-c", "write -q -z 128k 64k", "disk"]);
    both.same(Io, &["-C", "-c", "read -P 7 1k 1k", "-c", "map", "disk"]);
    both.same(Io, &["-c", "open -C disk", "-c", "read 60k 140k", "-c", "map"]);
    both.same(Io, &["-C", "-c", "aio_read -P 7 300k 100k", "-c", "aio_flush", "-c", "map", "disk"]);
    both.same(Io, &["-C", "-c", "read -P 0 513k 1k", "-c", "map", "disk"]);
    both.same(Io, &["-C", "-r", "-c", "read 0 64k", "disk"]);
    both.same(Io, &["-C", "--image-opts", "driver=qcow2,file.filename=disk,read-only=on"]);
    both.same_content("disk");
}

#[test]
fn a_completed_write_survives_the_sudden_end_of_io() {
    let directory = tempfile::tempdir().unwrap();
    let run = |program: Program, args: &[&str]| program.args(args).directory(directory.path());
    run(Program::new("qemu-img"), &["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]).succeed();
    let commands = ["io", "-c", "write -P 9 0 64k", "-c", "write -z 1M 64k", "-c", "sigraise 9"];
    let _ = run(Program::oxblk(), &[&commands[..], &["a.qcow2"]].concat()).run();
    let read = ["-c", "read -P 9 0 64k", "-c", "read -P 0 1M 64k", "a.qcow2"];
    let reply = run(Program::new("qemu-io"), &read).succeed();
    assert!(!reply.out().contains("failed"), "{}", reply.out());
    run(Program::new("qemu-img"), &["check", "-q", "a.qcow2"]).succeed();
}
