//! The filter `blklogwrites` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::Img;

const DISK: &str = "driver=blklogwrites,file.driver=raw,file.file.filename=a.raw,\
                    log.driver=raw,log.file.filename=log";

fn images() -> Differential {
    let both = Differential::new();
    both.file("a.raw", &[0; 1 << 16]);
    both.file("log", &[0; 1 << 16]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "64k"]);
    both
}

/// The logs have the same bytes.
fn same_log(both: &Differential) {
    let theirs = std::fs::read(both.qemu_directory().join("log")).expect("a log");
    for directory in both.our_directories() {
        let ours = std::fs::read(directory.join("log")).expect("a log");
        assert!(ours == theirs, "the logs differ");
    }
}

#[test]
fn options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = images();
    let rest = [
        "",
        ",foo=1",
        ",log-sector-size=0",
        ",log-sector-size=16",
        ",log-sector-size=32",
        ",log-sector-size=100",
        ",log-sector-size=4k",
        ",log-sector-size=16M",
        ",log-sector-size=x",
        ",log-sector-size=512,log-append=off,log-super-update-interval=5",
        ",log-super-update-interval=0",
        ",log-super-update-interval=x",
        ",log-append=x",
        ",log-append=on",
        ",log-append=on,log-sector-size=512",
        ",log-append=on,log-super-update-interval=0",
    ];
    let mut disks: Vec<_> = rest.iter().map(|rest| format!("{DISK}{rest}")).collect();
    disks.extend(
        [
            "driver=blklogwrites",
            "driver=blklogwrites,file.filename=a.raw",
            "driver=blklogwrites,log.filename=log",
            "driver=blklogwrites,file.filename=a.raw,log.filename=log",
            "driver=blklogwrites,file.filename=a.raw,log.filename=absent",
            "driver=blklogwrites,file.filename=absent,log.filename=log",
            "driver=blklogwrites,file=x,log=y",
            "driver=blklogwrites,file.filename=a.raw,log=y",
            "driver=blklogwrites,file.driver=qcow2,file.file.filename=a.qcow2,log.filename=log",
        ]
        .map(str::to_owned),
    );
    for disk in &disks {
        both.same(Img, &["info", "--image-opts", disk]);
        both.same(Img, &["info", "--output=json", "--image-opts", disk]);
        both.same(Img, &["map", "--output=json", "--image-opts", disk]);
        both.io(disk, &["length"]);
    }
    both.same(Img, &["check", "--image-opts", DISK]);
    both.same(Img, &["measure", "-O", "qcow2", "--image-opts", DISK]);
    both.io(&format!("{DISK},node-name=n"), &["reopen -r", "write -c 0 64k", "write -zn 0 4k"]);
    for name in [
        "json:{'driver':'blklogwrites','file':{'driver':'file','filename':'a.raw'},\
         'log':{'driver':'file','filename':'log'},'log-append':false}",
        "blklogwrites:a.raw",
    ] {
        both.same(Img, &["info", name]);
    }
}

#[test]
fn the_log_has_the_bytes_of_qemus_log() {
    let both = images();
    let commands = [
        "write -P 1 0 4k",
        "write -P 2 5000 100",
        "flush",
        "write -z 8k 8k",
        "write -zu 32k 4k",
        "flush",
        "read 0 64k",
        "discard 16k 8k",
        "write -P 3 60k 4k",
    ];
    for (disk, then) in [
        (DISK.to_owned(), format!("{DISK},log-append=on")),
        (format!("{DISK},log-sector-size=4096"), format!("{DISK},log-append=on")),
        (
            format!("{DISK},log-super-update-interval=2"),
            format!("{DISK},log-append=on,log-super-update-interval=1"),
        ),
        (format!("{DISK},log-sector-size=64"), DISK.to_owned()),
    ] {
        both.file("log", &[0; 1 << 16]);
        both.io(&disk, &commands);
        same_log(&both);
        both.io(&then, &["write -P 9 1k 512", "discard 0 4k", "flush", "write 4k 4k"]);
        same_log(&both);
        both.same_content("a.raw");
    }
}

#[test]
fn broken_logs_are_refused_as_in_qemu() {
    let both = images();
    both.io(DISK, &["write 0 4k"]);
    let log = std::fs::read(both.qemu_directory().join("log")).expect("a log");
    for (at, byte) in [(0, 1), (8, 2), (24, 100), (25, 0), (27, 1)] {
        let mut log = log.clone();
        log[at] = byte;
        both.file("log", &log);
        both.io(&format!("{DISK},log-append=on"), &["length"]);
    }
}
