//! The filter `blkverify` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

fn images() -> Differential {
    let both = Differential::new();
    both.file("a.raw", &[0; 1 << 16]);
    both.file("b.raw", &[0; 1 << 16]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "64k"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "b.qcow2", "64k"]);
    both
}

#[test]
fn file_names_and_options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = images();
    for name in [
        "blkverify:a.raw:a.qcow2",
        "blkverify:a.raw:b.raw",
        "blkverify:a.raw",
        "blkverify:",
        "blkverify::",
        "blkverify:absent:a.qcow2",
        "blkverify:a.raw:absent",
        "json:{'driver':'blkverify','raw':{'driver':'file','filename':'a.raw'},\
         'test':{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}}",
        "json:{'driver':'blkverify','raw':{'driver':'qcow2','file':{'driver':'file',\
         'filename':'b.qcow2'}},'test':{'driver':'raw','file':{'driver':'file',\
         'filename':'a.raw'}}}",
        "json:{'driver':'blkverify','raw':{'driver':'file','filename':'a.raw'},\
         'test':{'driver':'null-co','size':65536,'read-zeroes':true}}",
    ] {
        both.same(Img, &["info", name]);
        both.same(Img, &["info", "--output=json", name]);
        both.same(Img, &["map", "--output=json", name]);
    }
    for disk in [
        "driver=blkverify",
        "driver=blkverify,raw.filename=a.raw",
        "driver=blkverify,test.filename=a.raw",
        "driver=blkverify,raw.filename=a.raw,test.filename=a.qcow2",
        "driver=blkverify,raw.filename=a.raw,test.file.filename=a.qcow2",
        "driver=blkverify,raw.filename=a.raw,test.driver=qcow2,test.file.filename=a.qcow2,foo=1",
        "driver=blkverify,raw.filename=a.raw,test.driver=qcow2,test.file.filename=a.qcow2,\
         file.driver=null-co",
        "driver=blkverify,x-raw=a.raw,x-image=a.qcow2",
        "driver=blkverify,raw=x,test=y",
        "driver=blkverify,raw.filename=a.raw,raw.read-only=on,test.file.filename=a.qcow2",
    ] {
        both.same(Img, &["info", "--image-opts", disk]);
        both.same(Img, &["measure", "-O", "qcow2", "--image-opts", disk]);
        both.io(disk, &["length", "read 0 64k"]);
    }
}

#[test]
fn requests_reach_both_children_as_in_qemu() {
    let both = images();
    let disk = "driver=blkverify,node-name=v,raw.driver=file,raw.filename=a.raw,\
                test.driver=qcow2,test.file.filename=a.qcow2";
    let commands = [
        "write -P 1 0 4k",
        "write -P 2 5000 100",
        "read -P 2 5000 100",
        "flush",
        "discard 0 4k",
        "read -P 1 0 4k",
        "write -c 0 64k",
        "alloc 0 64k",
        "reopen -r",
    ];
    both.io(disk, &commands);
    both.same(Img, &["check", "--image-opts", disk]);
    both.same(Img, &["convert", "-O", "raw", "--image-opts", disk, "copy"]);
    both.same_content("copy");
    both.same_content("a.raw");
    both.same_content("a.qcow2");
}

#[test]
fn a_difference_fails_the_request_with_the_text_of_qemu() {
    let both = images();
    both.qemu(Io, &["-f", "raw", "-c", "write -P 9 8k 4k", "a.raw"]);
    let fault = "test.driver=blkdebug,test.image.driver=raw,test.image.file.filename=b.raw,\
                 test.inject-error.0.event=none,test.inject-error.0.errno=28,\
                 test.inject-error.0.iotype";
    for (disk, command, text) in [
        (
            "raw.filename=a.raw,test.file.filename=a.qcow2".to_owned(),
            "read 9000 100",
            "blkverify: read offset=9000 bytes=100 contents mismatch at offset 9000",
        ),
        (
            format!("raw.filename=a.raw,{fault}=read"),
            "read 0 4k",
            "blkverify: read offset=0 bytes=4096 return value mismatch -28 != 0",
        ),
        (
            format!("raw.filename=a.raw,{fault}=write"),
            "write 0 4k",
            "blkverify: write offset=0 bytes=4096 return value mismatch -28 != 0",
        ),
    ] {
        let disk = format!("driver=blkverify,{disk}");
        let words = ["--image-opts", &disk, "-c", command];
        let theirs = both.same_exit_code(Io, &words);
        let ours = Program::oxblk().arg("io").args(words).directory(&both.our_directories()[0]);
        for reply in [theirs, ours.run()] {
            assert!(reply.err().contains(text), "{disk}: {}", reply.err());
        }
    }
}
