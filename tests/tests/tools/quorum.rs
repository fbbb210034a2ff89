//! The driver `quorum` on the command line, in comparison with QEMU.

use oxblk_tests::differential::Differential;
use oxblk_tests::program::Tool::{Img, Io};

fn images() -> Differential {
    let both = Differential::new();
    for name in ["a.raw", "b.raw", "c.raw"] {
        both.file(name, &[7; 1 << 16]);
    }
    both.file("short.raw", &[7; 1 << 15]);
    for (image, backing) in [("a.qcow2", "a.raw"), ("b.qcow2", "b.raw")] {
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", image]);
    }
    both
}

/// The options of a raw child.
fn raw(at: usize, name: &str) -> String {
    format!("children.{at}.driver=raw,children.{at}.file.filename={name}")
}

fn quorum(threshold: u32, rest: &str, names: &[&str]) -> String {
    let children: Vec<_> = names.iter().enumerate().map(|(at, name)| raw(at, name)).collect();
    format!("driver=quorum,vote-threshold={threshold}{rest},{}", children.join(","))
}

/// A raw child above blkdebug, whose requests of a type fail.
fn failing(at: usize, name: &str, io: &str, errno: u32) -> String {
    let rule = format!("children.{at}.inject-error.0");
    format!(
        "children.{at}.driver=blkdebug,children.{at}.image.driver=raw,\
         children.{at}.image.file.filename={name},{rule}.event=none,{rule}.iotype={io},\
         {rule}.errno={errno}"
    )
}

#[test]
fn options_are_accepted_refused_and_shown_as_in_qemu() {
    let both = images();
    let (two, three) = (["a.raw", "b.raw"], ["a.raw", "b.raw", "c.raw"]);
    let null = |at: usize| format!("children.{at}.driver=null-co,children.{at}.size=64k");
    let mut disks = vec![
        "driver=quorum".to_owned(),
        "driver=quorum,vote-threshold=2".to_owned(),
        format!("driver=quorum,{}", raw(0, "a.raw")),
        format!("driver=quorum,vote-threshold=2,{},{}", raw(0, "a.raw"), raw(2, "b.raw")),
        format!("driver=quorum,vote-threshold=2,{},{}", raw(1, "a.raw"), raw(2, "b.raw")),
        format!("driver=quorum,vote-threshold=2,{},{}", raw(1, "a.raw"), raw(0, "b.raw")),
        format!("driver=quorum,vote-threshold=2,{},children.x=1", raw(0, "a.raw")),
        format!("driver=quorum,vote-threshold=1,{},{}", null(0), null(1)),
        format!("driver=quorum,vote-threshold=1,{},read-only=on", raw(0, "a.raw")),
        format!("driver=quorum,vote-threshold=1,{},children.0.read-only=on", raw(0, "a.raw")),
        format!("driver=quorum,vote-threshold=1,{},{},children.0.x=1", null(0), null(1)),
        format!("driver=raw,file.driver=quorum,file.vote-threshold=1,file.{}", null(0)),
        "driver=quorum,vote-threshold=1,children=x".to_owned(),
        "driver=quorum,children.0=x".to_owned(),
        "driver=quorum,vote-threshold=1,children.0=x".to_owned(),
        "driver=quorum,vote-threshold=2,children.0=x,children.1=y".to_owned(),
        "driver=quorum,vote-threshold=1,children.0.file.filename=a.qcow2".to_owned(),
        "driver=quorum,vote-threshold=1,children.0.filename=a.qcow2".to_owned(),
        "driver=quorum,vote-threshold=1,children.0.file.filename=absent".to_owned(),
        "driver=quorum,vote-threshold=1,children.0.driver=absent".to_owned(),
        quorum(1, "", &["a.raw", "short.raw"]),
        quorum(1, "", &["short.raw", "a.raw"]),
        quorum(2, "", &["a.raw", "a.raw"]),
    ];
    for (threshold, rest) in [
        (0, ""),
        (1, ""),
        (2, ""),
        (3, ""),
        (4, ""),
        (2, ",blkverify=on"),
        (1, ",blkverify=on"),
        (2, ",blkverify=x"),
        (2, ",rewrite-corrupted=on"),
        (2, ",rewrite-corrupted=x"),
        (2, ",rewrite-corrupted=on,blkverify=on"),
        (2, ",read-pattern=quorum"),
        (2, ",read-pattern=fifo,node-name=n,rewrite-corrupted=on,blkverify=on"),
        (2, ",read-pattern=x"),
        (2, ",foo=1"),
        (2, ",filename=a.raw"),
    ] {
        disks.push(quorum(threshold, rest, &two));
        disks.push(quorum(threshold, rest, &three));
    }
    for threshold in ["x", "-1", "1k", "9999999999", "", "1.0"] {
        disks.push(format!("driver=quorum,vote-threshold={threshold},{}", raw(0, "a.raw")));
    }
    for disk in &disks {
        both.same(Img, &["info", "--image-opts", disk]);
        both.same(Img, &["info", "--output=json", "--image-opts", disk]);
        both.io(disk, &["info", "length"]);
    }
    for name in [
        "json:{'driver':'quorum','vote-threshold':2,'children':[]}",
        "json:{'driver':'quorum','vote-threshold':2,'children':{}}",
        "json:{'driver':'quorum','vote-threshold':2,'children':1}",
        "json:{'driver':'quorum','vote-threshold':1,'read-pattern':'fifo',\
         'children':[{'driver':'null-co'},{'driver':'null-co','size':1073741824}]}",
        "json:{'driver':'quorum','vote-threshold':'1','rewrite-corrupted':false,\
         'children':{'0':{'driver':'null-co'},'1':{'driver':'null-co'}}}",
        "json:{'driver':'quorum','vote-threshold':1,'rewrite-corrupted':true,\
         'children':[{'driver':'raw','file':{'driver':'file','filename':'a.raw'}}]}",
        "json:{'driver':'raw','file':{'driver':'quorum','vote-threshold':1,\
         'children':[{'driver':'quorum','vote-threshold':1,\
         'children':[{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}]}]}}",
        "quorum:a.raw",
    ] {
        both.same(Img, &["info", name]);
        both.same(Img, &["info", "--output=json", name]);
    }
    both.same(Img, &["info", "-f", "quorum", "a.raw"]);
}

#[test]
fn commands_treat_a_quorum_as_in_qemu() {
    let both = images();
    let raws = quorum(2, "", &["a.raw", "b.raw"]);
    let overlays = "driver=quorum,vote-threshold=2,children.0.driver=qcow2,\
                    children.0.file.filename=a.qcow2,children.1.driver=qcow2,\
                    children.1.file.filename=b.qcow2";
    for disk in [&raws[..], overlays] {
        let commands = [
            "write -P 3 8k 4k",
            "write -z 16k 8k",
            "write -zn 28k 8k",
            "write -zu 40k 8k",
            "write -c 0 64k",
            "discard 8k 4k",
            "read -P 3 8k 4k",
            "read -P 0 16k 8k",
            "write -P 9 100 300",
            "read -P 9 100 300",
            "flush",
            "alloc 0 64k",
            "map",
            "truncate 128k",
            "read 60k 8k",
            "write 65000 1000",
        ];
        both.io(disk, &commands);
        both.io(&format!("{disk},discard=unmap"), &["discard 0 64k", "read -P 9 100 300"]);
        both.io(&format!("{disk},read-only=on"), &["length"]);
        for words in [
            &["map"][..],
            &["map", "--output=json"],
            &["check"],
            &["snapshot", "-l"],
            &["measure", "-O", "qcow2"],
            &["commit"],
        ] {
            both.same(Img, &[words, &["--image-opts", disk]].concat());
        }
        both.same(Img, &["resize", "--image-opts", disk, "128k"]);
        both.same(Img, &["convert", "-O", "raw", "--image-opts", disk, "copy"]);
        both.same_content("copy");
        both.same(
            Img,
            &[
                "convert",
                "-n",
                "--image-opts",
                "--target-image-opts",
                "driver=raw,file.filename=c.raw",
                disk,
            ],
        );
        both.same(Img, &["compare", "--image-opts", disk, "driver=raw,file.filename=copy"]);
        let named = format!("{disk},node-name=q");
        both.same(Io, &["--image-opts", &named, "-c", "reopen -r"]);
    }
    for name in ["a.raw", "b.raw", "c.raw", "a.qcow2", "b.qcow2"] {
        both.same_content(name);
    }
}

#[test]
fn children_vote_as_in_qemu() {
    let names = ["a.raw", "b.raw", "c.raw"];
    let rewrite = ",rewrite-corrupted=on";
    for (patterns, threshold, rest) in [
        ([1, 1, 2], 2, ""),
        ([2, 1, 1], 2, rewrite),
        ([1, 2, 1], 1, rewrite),
        ([1, 2, 1], 3, rewrite),
        ([1, 2, 3], 1, rewrite),
        ([1, 2, 3], 2, rewrite),
        ([1, 2, 3], 1, ""),
        ([1, 2, 3], 3, ",read-pattern=fifo"),
    ] {
        let both = Differential::new();
        for (name, pattern) in names.into_iter().zip(patterns) {
            let mut data = vec![7; 1 << 16];
            data[8 << 10..24 << 10].fill(pattern);
            both.file(name, &data);
        }
        let disk = quorum(threshold, rest, &names);
        both.io(&disk, &["read -v 8k 16", "read -v 9000 16", "read -P 7 0 8k"]);
        both.io(&disk, &["read 0 32k", "write -P 5 12k 4k", "read 8k 8k", "map"]);
        names.into_iter().for_each(|name| both.same_content(name));
    }
}

#[test]
fn failures_of_children_are_counted_as_in_qemu() {
    let commands = [
        "write -P 5 0 4k",
        "write -z 8k 4k",
        "read 0 4k",
        "read -P 7 16k 16k",
        "alloc 0 64k",
        "map",
    ];
    let both = images();
    for (io_type, rests) in [
        ("read", &["", ",read-pattern=fifo", ",rewrite-corrupted=on"][..]),
        ("write", &[""]),
        ("write-zeroes", &[""]),
        ("block-status", &[""]),
    ] {
        for rest in rests {
            for (threshold, errors) in [
                (2, [0, 0, 28]),
                (3, [0, 0, 28]),
                (1, [28, 0, 5]),
                (2, [28, 0, 5]),
                (1, [28, 5, 28]),
                (2, [28, 5, 12]),
            ] {
                let children = ["a.raw", "b.raw", "c.raw"].into_iter().zip(errors).enumerate();
                let children: Vec<_> = children
                    .map(|(at, (name, errno))| match errno {
                        0 => raw(at, name),
                        errno => failing(at, name, io_type, errno),
                    })
                    .collect();
                let children = children.join(",");
                let disk = format!("driver=quorum,vote-threshold={threshold}{rest},{children}");
                both.file("a.raw", &[7; 1 << 16]);
                both.file("b.raw", &[7; 1 << 16]);
                both.file("c.raw", &[7; 1 << 16]);
                both.io(&disk, &commands);
            }
        }
    }
}

#[test]
fn an_image_in_a_quorum_of_files_grows_as_in_qemu() {
    for (format, name) in [
        ("qcow2", "blkverify"),
        ("qcow2", "quorum"),
        ("qed", "quorum"),
        ("vdi", "quorum"),
        ("parallels", "quorum"),
        ("vpc", "quorum"),
    ] {
        let both = Differential::new();
        both.made_once(Img, &["create", "-q", "-f", format, "a", "4M"]);
        both.prepare(|directory| {
            std::fs::copy(directory.join("a"), directory.join("b")).expect("a copy");
        });
        let children = match name {
            "quorum" => {
                "file.vote-threshold=2,file.children.0.driver=file,\
                 file.children.0.filename=a,file.children.1.driver=file,\
                 file.children.1.filename=b"
            }
            _ => {
                "file.raw.driver=file,file.raw.filename=a,\
                 file.test.driver=file,file.test.filename=b"
            }
        };
        let disk = format!("driver={format},file.driver={name},{children}");
        both.io(&disk, &["write -P 3 0 200k", "write -P 4 512k 64k", "read -P 3 0 200k"]);
        // QEMU preallocates 128 MiB for Parallels images, and a quorum cannot be truncated. QEMU does not check VPC images.
        if !["parallels", "vpc"].contains(&format) {
            both.same(Img, &["check", "--image-opts", &disk]);
        }
        both.same(Img, &["compare", "-f", format, "-F", format, "a", "b"]);
    }
}
