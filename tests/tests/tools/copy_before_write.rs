//! The filter `copy-before-write` and the driver `snapshot-access` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

const FILE: &str = "file.driver=file,file.filename=a.raw";
const TARGET: &str = "target.driver=file,target.filename=t.raw";

fn images() -> Differential {
    let both = Differential::new();
    both.file("a.raw", &[7; 1 << 19]);
    both.file("t.raw", &[0; 1 << 19]);
    both.file("long.raw", &[0; 1 << 20]);
    for (image, size) in [("t.qcow2", "512k"), ("s.qcow2", "1M")] {
        both.qemu(Img, &["create", "-q", "-f", "qcow2", image, size]);
    }
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "a.raw", "over.qcow2"]);
    both
}

/// A copy-before-write node with these children and further options.
fn filter(rest: &str) -> String {
    format!("driver=copy-before-write,{rest}")
}

/// The options of a copy-before-write node below a snapshot-access node.
fn access(rest: &str) -> String {
    let below: Vec<_> = rest.split(',').map(|option| format!("file.{option}")).collect();
    format!("driver=snapshot-access,file.driver=copy-before-write,{}", below.join(","))
}

fn io(both: &Differential, disk: &str, commands: &[&str]) {
    // Messages about a reopen contain the node-name.
    both.io(&format!("{disk},node-name=cbw"), commands);
}

#[test]
fn options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = images();
    let rest = [
        "",
        ",foo=1",
        ",on-cbw-error=foo",
        ",on-cbw-error=",
        ",on-cbw-error=break-guest-write",
        ",on-cbw-error=break-snapshot",
        ",cbw-timeout=x",
        ",cbw-timeout=",
        ",cbw-timeout=-1",
        ",cbw-timeout=1k",
        ",cbw-timeout=1.5",
        ",cbw-timeout=0x10",
        ",cbw-timeout=4294967295",
        ",cbw-timeout=4294967296",
        ",min-cluster-size=0",
        ",min-cluster-size=3",
        ",min-cluster-size=1k",
        ",min-cluster-size=100000",
        ",min-cluster-size=0x20000",
        ",min-cluster-size=2G",
        ",min-cluster-size=8E",
        ",min-cluster-size=16E",
        ",min-cluster-size=-1",
        ",min-cluster-size=x",
        ",min-cluster-size=",
        ",bitmap=x",
        ",bitmap=",
        ",bitmap.node=n",
        ",bitmap.name=b",
        ",bitmap.x=1",
        ",bitmap.node=n,bitmap.name=b",
        ",bitmap.node=n,bitmap.name=b,bitmap.x=1",
        ",bitmap.node=n,bitmap.name=b,min-cluster-size=3",
        ",foo=1,on-cbw-error=x",
        ",read-only=on",
        ",auto-read-only=on",
        ",file.read-only=on",
        ",target.read-only=on",
        ",discard=unmap",
        ",file.foo=1",
    ];
    let mut disks: Vec<_> =
        rest.iter().map(|rest| filter(&format!("{FILE},{TARGET}{rest}"))).collect();
    disks.extend(
        [
            "",
            FILE,
            TARGET,
            "file.filename=a.raw",
            "file.filename=a.raw,target.filename=t.raw",
            "file.filename=a.raw,target.driver=raw,target.file.filename=t.raw",
            "file.filename=a.raw,target=x",
            "file.filename=a.raw,target=",
            "file.filename=a.raw,target=x,min-cluster-size=3",
            "file=x,target=y",
            "file.filename=absent,target=x",
            "file.filename=a.raw,target.driver=file,target.filename=absent",
            "file.filename=a.raw,target.driver=file,target.filename=absent,foo=1",
            "file.filename=a.raw,target.driver=file,target.filename=a.raw",
            "file.filename=a.raw,target.driver=file,target.filename=long.raw",
            "file.driver=foo,file.filename=a.raw,target.driver=file,target.filename=t.raw",
            "file.driver=raw,file.file.filename=a.raw,target.driver=file,target.filename=t.raw",
            "file.driver=qcow2,file.file.filename=s.qcow2,target.driver=file,target.filename=t.raw",
            "file.filename=a.raw,target.driver=qcow2,target.file.driver=file,\
             target.file.filename=t.qcow2",
        ]
        .map(|rest| filter(rest).trim_end_matches(',').to_owned()),
    );
    for disk in &disks {
        io(&both, disk, &["length"]);
        both.same(Img, &["info", "--image-opts", disk]);
    }
    for name in ["copy-before-write:a.raw", "snapshot-access:a.raw"] {
        both.same(Img, &["info", name]);
    }
    for format in ["copy-before-write", "snapshot-access"] {
        both.same(Img, &["info", "-f", format, "a.raw"]);
        both.same(Io, &["-f", format, "-c", "length", "a.raw"]);
    }
}

#[test]
fn the_tools_show_the_nodes_as_qemu_does() {
    let both = images();
    let writable = format!("{FILE},{TARGET},file.read-only=off,target.read-only=off");
    for disk in [filter(&writable), access(&writable)] {
        for words in [
            &["info"][..],
            &["info", "--output=json"],
            &["map"],
            &["map", "--output=json"],
            &["measure", "-O", "qcow2"],
            &["check"],
        ] {
            let mut words = words.to_vec();
            words.extend(["--image-opts", &disk]);
            both.same(Img, &words);
        }
        both.same(Img, &["convert", "-O", "raw", "--image-opts", &disk, "copy"]);
        both.same_content("copy");
    }
    let name = "json:{'driver':'copy-before-write','cbw-timeout':5,'min-cluster-size':131072,\
                'file':{'driver':'file','filename':'a.raw','read-only':false},\
                'target':{'driver':'file','filename':'t.raw','read-only':false}}";
    both.same(Img, &["info", name]);
    both.same(Img, &["info", "--output=json", name]);
}

#[test]
fn requests_are_answered_as_in_qemu() {
    let both = images();
    let commands = [
        "write -P 1 0 4k",
        "read -P 1 0 4k",
        "read -P 7 4k 60k",
        "discard 64k 64k",
        "write -z 128k 64k",
        "write -zu 192k 4k",
        "write -c 0 64k",
        "flush",
        "alloc 0 512k",
        "reopen -r",
        "write -P 2 500k 4k",
    ];
    io(&both, &filter(&format!("{FILE},{TARGET}")), &commands);
    both.same_content("a.raw");
    both.same_content("t.raw");
    both.file("a.raw", &[7; 1 << 19]);
    let over = "target.driver=qcow2,target.file.driver=file,target.file.filename=over.qcow2,\
                target.backing=base,file.node-name=base";
    io(&both, &filter(&format!("{FILE},{over}")), &commands);
    both.same_content("a.raw");
    // The overlay contains the old data of the clusters that changed.
    both.same(Img, &["map", "--output=json", "over.qcow2"]);
    both.same_content("over.qcow2");
}

#[test]
fn copies_have_the_clusters_and_the_zeroes_of_qemu() {
    for (cluster, rest) in [("4k", ""), ("64k", ""), ("2M", ""), ("64k", ",min-cluster-size=256k")]
    {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "s.qcow2", "4M"]);
        let fill = ["-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -z 1M 256k", "s.qcow2"];
        both.qemu(Io, &fill);
        let option = format!("cluster_size={cluster}");
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", &option, "t.qcow2", "4M"]);
        let disk = filter(&format!(
            "discard=unmap,file.driver=qcow2,file.file.filename=s.qcow2,target.driver=qcow2,\
             target.file.driver=file,target.file.filename=t.qcow2{rest}"
        ));
        io(
            &both,
            &disk,
            &[
                "write -P 1 4k 4k",
                "write -P 1 60k 8k",
                "write -P 1 1M 1",
                "discard 2M 4k",
                "discard 512k 128k",
                "write -z 3M 4k",
                "write -P 2 4095k 1k",
                "read -P 2 4095k 1k",
            ],
        );
        both.same_content("t.qcow2");
        both.same_content("s.qcow2");
        let map = both.same(Img, &["map", "t.qcow2"]);
        assert!(map.out().contains("t.qcow2"), "{cluster}");
    }
}

#[test]
fn a_failed_copy_fails_the_write_or_breaks_the_snapshot_as_in_qemu() {
    for (policy, request) in [
        ("break-guest-write", "read"),
        ("break-guest-write", "write"),
        ("break-snapshot", "read"),
        ("break-snapshot", "write"),
    ] {
        let both = images();
        let fault = |child: &str, name: &str| {
            let rule = format!("{child}.inject-error.0");
            format!(
                "{child}.driver=blkdebug,{child}.image.driver=file,{child}.image.filename={name},\
                 {rule}.event=none,{rule}.iotype={request},{rule}.errno=28,{rule}.once=on"
            )
        };
        let children = match request {
            "read" => format!("{},{TARGET}", fault("file", "a.raw")),
            _ => format!("{FILE},{}", fault("target", "t.raw")),
        };
        let disk = filter(&format!("{children},on-cbw-error={policy}"));
        let commands =
            ["write -P 1 0 4k", "write -P 2 0 4k", "write -P 3 128k 4k", "read -P 3 128k 4k"];
        io(&both, &disk, &commands);
        both.same_content("a.raw");
        both.same_content("t.raw");
    }
}

#[test]
fn a_snapshot_is_read_and_discarded_as_in_qemu() {
    let both = images();
    let disk = access(&format!("{FILE},{TARGET}"));
    io(
        &both,
        &disk,
        &[
            "length",
            "map",
            "read -P 7 0 512k",
            "alloc 0 512k",
            "write 0 4k",
            "write -z 0 64k",
            "write -c 0 64k",
            "aio_write 0 4k",
            "flush",
            "truncate 1M",
            "discard 60k 100k",
            "read -P 7 0 64k",
            "read -P 7 64k 4k",
            "read -P 7 60k 8k",
            "read -P 7 128k 4k",
            "alloc 0 512k",
            "map",
            "discard 448k 64k",
            "read 508k 4k",
            "discard 0 512k",
            "read 0 4k",
            "reopen -r",
            "reopen -w",
        ],
    );
    for disk in [
        "driver=snapshot-access",
        "driver=snapshot-access,file=x",
        "driver=snapshot-access,file.filename=a.raw",
        "driver=snapshot-access,file.driver=raw,file.file.filename=a.raw",
        &format!("{disk},foo=1"),
        &format!("{disk},read-only=on"),
        &format!("{disk},discard=unmap"),
    ] {
        let commands =
            ["length", "read -P 7 0 4k", "alloc 0 4k", "discard 0 64k", "read 0 4k", "write 0 4k"];
        io(&both, disk, &commands);
        both.same(Img, &["info", "--image-opts", disk]);
    }
    both.same_content("a.raw");
    both.same_content("t.raw");
}
