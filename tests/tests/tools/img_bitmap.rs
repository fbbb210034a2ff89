//! `img bitmap`, and bitmaps in `info`, `measure`, `convert` and `check`, compared with qemu-img. Each tool also uses the
//! bitmaps of the other tool.

use std::path::Path;

use oxblk_tests::differential::Differential;
use oxblk_tests::differential::normalise::Rules;
use oxblk_tests::hostile::image::Image;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{self, Img, Io};

fn disk() -> Differential {
    let both = Differential::new().rules(Rules { disk_size: true, ..Rules::default() });
    both.qemu(Img, &["create", "-q", "-f", "raw", "a.raw", "1M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "b.qcow2", "32M"]);
    both
}

fn same_lines(both: &Differential, lines: &[&str]) {
    for line in lines {
        both.same(Img, &line.split(' ').collect::<Vec<_>>());
    }
}

#[test]
fn an_empty_disk_refuses_a_new_bitmap_and_stays_valid() {
    let both = disk();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "empty.qcow2", "0"]);
    let line = ["bitmap", "--add", "empty.qcow2", "b"];
    assert_eq!(both.same_exit_code(Img, &line).code(), 1);
    let program = Program::oxblk().arg("img").args(line).directory(&both.our_directories()[0]);
    let reply = program.run();
    assert!(reply.err().contains("The disk is empty"), "{}", reply.err());
    same_lines(&both, &["info empty.qcow2", "check empty.qcow2"]);
}

#[test]
fn bitmaps_are_changed_and_refused_as_by_qemu() {
    let both = disk();
    same_lines(
        &both,
        &[
            "bitmap --add a.qcow2 b0",
            "bitmap --add a.qcow2 b0",
            "bitmap --add -g 4k a.qcow2 b1",
            "bitmap --add -g 100 a.qcow2 b2",
            "bitmap --add -g 256 a.qcow2 b2",
            "bitmap --add -g 4G a.qcow2 b2",
            "bitmap --add -g 2G a.qcow2 b2",
            "bitmap --add -g 0 a.qcow2 b3",
            "bitmap --add -g x a.qcow2 b3",
            "bitmap --add -g -1 a.qcow2 b3",
            "bitmap --add -g 1k -g 2k a.qcow2 b4",
            "bitmap -g 4k --remove a.qcow2 b1",
            "bitmap a.qcow2 b1",
            "bitmap --add a.qcow2",
            "bitmap --add a.qcow2 b c",
            "bitmap --add",
            "bitmap --foo",
            "bitmap --merge",
            "bitmap -U --add a.qcow2 b5",
            "bitmap --add -b a.qcow2 a.qcow2 b5",
            "bitmap --merge b1 -F qcow2 a.qcow2 b0",
            "bitmap --remove a.qcow2 nope",
            "bitmap --clear a.qcow2 nope",
            "bitmap --enable a.qcow2 nope",
            "bitmap --disable a.qcow2 nope",
            "bitmap --merge nope a.qcow2 b0",
            "bitmap --merge b0 a.qcow2 nope",
            "bitmap --merge b1 a.qcow2 b0",
            "bitmap --disable --disable a.qcow2 b0",
            "info a.qcow2",
            "bitmap --add --disable --merge b0 --clear --enable --remove a.qcow2 b5",
            "bitmap --image-opts -f qcow2 --add a.qcow2 b5",
            "bitmap --image-opts --add driver=qcow2,file.filename=a.qcow2 b5",
            "bitmap --add a.qcow2 ",
            "bitmap --add nofile b",
            "bitmap --remove -f raw a.raw b",
            "bitmap --add --image-opts driver=raw,node-name=n,file.filename=a.raw b",
            "bitmap --add --image-opts driver=qcow2,node-name=n,file.filename=old.qcow2 b",
            "bitmap --object secret,id=s0,data=x --enable a.qcow2 b0",
            "bitmap --add b.qcow2 b",
            "bitmap --merge b1 -b a.qcow2 -F qcow2 b.qcow2 b",
            "bitmap --merge b1 -b a.qcow2 -F raw b.qcow2 b",
            "bitmap --merge b1 -b nofile b.qcow2 b",
            "bitmap --merge nope -b a.qcow2 b.qcow2 b",
            "info --output=json b.qcow2",
            "check a.qcow2",
        ],
    );
    let long = "n".repeat(1024);
    let image = "driver=qcow2,node-name=n,file.filename=a.qcow2";
    both.same(Img, &["bitmap", "--add", "--image-opts", image, &long]);
    both.same(Img, &["bitmap", "--add", "--image-opts", image, &long[1..]]);
    let info = both.same(Img, &["info", "--output=json", "-f", "qcow2", "--image-opts", image]);
    assert_eq!(info.code(), 1);
    both.same_content("a.qcow2");
}

#[test]
fn a_bitmap_too_large_for_its_granularity_is_refused_as_by_qemu() {
    let both = disk();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "big.qcow2", "100T"]);
    let image = "driver=qcow2,node-name=n,file.filename=big.qcow2";
    same_lines(
        &both,
        &[
            &format!("bitmap --add -g 512 --image-opts {image} b"),
            &format!("bitmap --add -g 64k --image-opts {image} b"),
            "info big.qcow2",
            "measure -O qcow2 big.qcow2",
        ],
    );
}

/// Creates an image with an enabled bitmap, a disabled bitmap, and data.
fn with_bitmaps() -> Differential {
    let both = disk();
    both.qemu(Img, &["bitmap", "--add", "a.qcow2", "auto"]);
    both.qemu(Img, &["bitmap", "--add", "--disable", "-g", "4k", "a.qcow2", "off"]);
    both.qemu(Io, &["-c", "write -P 3 1M 2M", "a.qcow2"]);
    both
}

#[test]
fn bitmaps_follow_an_image_through_convert_resize_and_measure_as_with_qemu() {
    let both = with_bitmaps();
    same_lines(
        &both,
        &[
            "measure -O qcow2 a.qcow2",
            "measure --output=json -O qcow2 a.qcow2",
            "measure -O qcow2 -o compat=0.10 a.qcow2",
            "measure -O qcow2 -o cluster_size=4k a.qcow2",
            "measure -O qcow2 b.qcow2",
            "measure -O qcow2 old.qcow2",
            "measure -O raw a.qcow2",
            "convert --bitmaps -O qcow2 a.qcow2 c.qcow2",
            "convert --bitmaps -c -O qcow2 -o cluster_size=4k a.qcow2 d.qcow2",
            "convert --bitmaps -n -O qcow2 a.qcow2 c.qcow2",
            "convert --bitmaps -O qcow2 -o compat=0.10 a.qcow2 e.qcow2",
            "convert --bitmaps -O raw a.qcow2 e.raw",
            "convert --bitmaps -f raw -O qcow2 a.raw e.qcow2",
            "convert --bitmaps -O qcow2 old.qcow2 e.qcow2",
            "convert --bitmaps -O qcow2 a.qcow2 b.qcow2 e.qcow2",
            "convert --skip-broken-bitmaps -O qcow2 a.qcow2 e.qcow2",
            "convert --bitmaps -f raw -O nope a.raw e.qcow2",
            "convert --bitmaps -f raw -O raw -B b.qcow2 a.raw e.qcow2",
            "convert --bitmaps -f raw -O raw -c a.raw e.qcow2",
            "convert --bitmaps -f raw -n -B b.qcow2 --target-is-zero a.raw a.qcow2",
            "resize a.qcow2 100M",
            "resize --shrink a.qcow2 30M",
        ],
    );
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "large.qcow2", "128M"]);
    same_lines(&both, &["convert --bitmaps -n -O qcow2 a.qcow2 large.qcow2"]);
    for image in ["a.qcow2", "c.qcow2", "d.qcow2"] {
        let info = both.same(Img, &["info", "--output=json", image]).out();
        assert_eq!(info.matches("\"granularity\"").count(), 2, "{info}");
        both.same_content(image);
    }
}

fn read(image: &Path) -> Image {
    Image::new(std::fs::read(image).unwrap())
}

fn get32(image: &Image, at: usize) -> u32 {
    u32::from_be_bytes(image.bytes()[at..at + 4].try_into().unwrap())
}

/// Marks the first bitmap of an image as in use.
fn spoil(image: &Path) {
    let mut bytes = read(image);
    let directory = directory_of(&bytes);
    bytes.put32(directory + 12, get32(&bytes, directory + 12) | 1);
    std::fs::write(image, bytes.bytes()).unwrap();
}

/// Returns the offset of the bitmap directory.
fn directory_of(image: &Image) -> usize {
    let mut at = usize::try_from(get32(image, 100)).unwrap();
    while get32(image, at) != 0x2385_2875 {
        at += 8 + usize::try_from(get32(image, at + 4)).unwrap().next_multiple_of(8);
    }
    usize::try_from(image.get64(at + 24)).unwrap()
}

#[test]
fn a_bitmap_in_use_is_refused_and_removed_as_with_qemu() {
    let both = with_bitmaps();
    both.prepare(|directory| spoil(&directory.join("a.qcow2")));
    same_lines(
        &both,
        &[
            "info a.qcow2",
            "check a.qcow2",
            "bitmap --clear a.qcow2 auto",
            "bitmap --enable a.qcow2 auto",
            "bitmap --disable a.qcow2 auto",
            "bitmap --add a.qcow2 auto",
            "bitmap --merge off a.qcow2 auto",
            "bitmap --merge auto a.qcow2 off",
            "resize a.qcow2 200M",
            "measure -O qcow2 a.qcow2",
            "convert --bitmaps -O qcow2 a.qcow2 c.qcow2",
            "convert --bitmaps --skip-broken-bitmaps -O qcow2 a.qcow2 c.qcow2",
            "bitmap --remove a.qcow2 auto",
        ],
    );
    for image in ["a.qcow2", "c.qcow2"] {
        let info = both.same(Img, &["info", "--output=json", image]).out();
        assert_eq!(info.matches("\"granularity\"").count(), 1, "{info}");
        both.same_content(image);
    }
}

/// Returns the dirty ranges of a bitmap as offset and length, read through qemu-nbd. The bitmap must be disabled.
fn dirty(image: &Path, name: &str) -> Vec<(u64, u64)> {
    let map = format!("--map=qemu:dirty-bitmap:{name}");
    let reply = Program::new("nbdinfo")
        .args([&map, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name])
        .arg(image)
        .arg("]")
        .succeed();
    let out = reply.out();
    let numbers = out.lines().map(|line| {
        let mut words = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        [words.next(), words.next(), words.next()].map(Option::unwrap_or_default)
    });
    let mut dirty: Vec<(u64, u64)> = Vec::new();
    for [offset, len, _] in numbers.filter(|[_, _, kind]| *kind == 1) {
        match dirty.last_mut() {
            Some((start, before)) if *start + *before == offset => *before += len,
            _ => dirty.push((offset, len)),
        }
    }
    dirty
}

fn tool(ours: bool, tool: Tool) -> Program {
    match ours {
        true => Program::oxblk().arg(tool.subcommand()),
        false => Program::new(tool.qemu_name()),
    }
}

#[test]
fn each_tool_continues_the_bitmaps_of_the_other_at_every_granularity() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    for (number, options) in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=2M"].into_iter().enumerate()
    {
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        Program::new("qemu-img").args(create).arg(&image).arg("8M").succeed();
        let bits: Vec<u32> = (9..=31).skip(number).step_by(3).collect();
        let granularities: Vec<u64> = bits.iter().map(|bits| 1 << bits).collect();
        for (index, granularity) in granularities.iter().enumerate() {
            let add = format!("bitmap --add -g {granularity}");
            let words: Vec<&str> = add.split(' ').collect();
            let name = format!("b{granularity}");
            tool(index % 2 == 0, Img).args(words).arg(&image).arg(name).succeed();
        }
        for (ours, command) in [
            (true, "write -P 1 0 1000"),
            (false, "write -P 2 1M 40k"),
            (true, "write -z 2M 64k"),
            (false, "discard 3M 1M"),
            (true, "discard 6M 1M"),
        ] {
            tool(ours, Io).args(["-c", command]).arg(&image).succeed();
        }
        let written: [(u64, u64); 5] = [
            (0, 1000),
            (1 << 20, 40 << 10),
            (2 << 20, 64 << 10),
            (3 << 20, 1 << 20),
            (6 << 20, 1 << 20),
        ];
        for granularity in granularities {
            let name = format!("b{granularity}");
            tool(granularity % 3 == 1, Img)
                .args(["bitmap", "--disable"])
                .arg(&image)
                .arg(&name)
                .succeed();
            let granules = (8_u64 << 20).div_ceil(granularity);
            let wanted: Vec<bool> = (0..granules)
                .map(|granule| {
                    let (start, end) = (granule * granularity, (granule + 1) * granularity);
                    written.iter().any(|(offset, len)| *offset < end && start < offset + len)
                })
                .collect();
            let found = dirty(&image, &name);
            let found: Vec<bool> = (0..granules)
                .map(|granule| {
                    let at = granule * granularity;
                    found.iter().any(|(offset, len)| (*offset..offset + len).contains(&at))
                })
                .collect();
            assert!(found == wanted, "{options}: {name}");
        }
        Program::new("qemu-img").arg("check").arg(&image).succeed();
    }
}

#[test]
fn both_tools_use_a_hundred_bitmaps_and_one_of_many_clusters() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    Program::new("qemu-img").args(create).arg(&image).arg("256M").succeed();
    for number in 0..100 {
        let name = format!("bitmap number {number}");
        tool(number % 10 != 0, Img).args(["bitmap", "--add"]).arg(&image).arg(name).succeed();
    }
    // 128 clusters of bitmap data need a bitmap table of two clusters.
    tool(true, Img).args(["bitmap", "--add", "-g", "512"]).arg(&image).arg("fine").succeed();
    tool(true, Io)
        .args(["-c", "write 0 64k", "-c", "write 100M 64k", "-c", "write 255M 1M"])
        .arg(&image)
        .succeed();
    tool(false, Io).args(["-c", "write 200M 512"]).arg(&image).succeed();
    tool(true, Img).args(["bitmap", "--disable"]).arg(&image).arg("fine").succeed();
    let mib = |count: u64| count << 20;
    let wanted = [(0, 65536), (mib(100), 65536), (mib(200), 512), (mib(255), mib(1))];
    assert_eq!(dirty(&image, "fine"), wanted);
    let ours = tool(true, Img).args(["info", "--output=json"]).arg(&image).succeed().out();
    let theirs = tool(false, Img).args(["info", "--output=json"]).arg(&image).succeed().out();
    assert_eq!(ours, theirs);
    assert_eq!(ours.matches("\"granularity\"").count(), 101);
    for number in 0..100 {
        let name = format!("bitmap number {number}");
        tool(number % 2 == 0, Img).args(["bitmap", "--remove"]).arg(&image).arg(name).succeed();
    }
    Program::new("qemu-img").arg("check").arg(&image).succeed();
    tool(true, Img).args(["check", "-q"]).arg(&image).succeed();
    assert_eq!(dirty(&image, "fine"), wanted);
}

/// A fault in a bitmap directory, in an image with two bitmaps.
type Fault = (&'static str, fn(&mut Image, usize));

const BROKEN: &[Fault] = &[
    ("reserved flag", |image, entry| image.put32(entry + 12, 0x22)),
    ("unknown type", |image, entry| image.put(entry + 16, &[2])),
    ("granularity of 256 bytes", |image, entry| image.put(entry + 17, &[8])),
    ("granularity of 2^63 bytes", |image, entry| image.put(entry + 17, &[63])),
    ("table unaligned", |image, entry| image.put64(entry, image.get64(entry) + 8)),
    ("table at 0", |image, entry| image.put64(entry, 0)),
    ("table past the end", |image, entry| image.put64(entry, 1 << 40)),
    ("table over the directory", |image, entry| image.put64(entry, entry as u64)),
    ("table over the L1 table", |image, entry| image.put64(entry, image.get64(40))),
    ("table without entries", |image, entry| image.put32(entry + 8, 0)),
    ("table of 2^32 - 1 entries", |image, entry| image.put32(entry + 8, u32::MAX)),
    ("table too long", |image, entry| image.put32(entry + 8, get32(image, entry + 8) + 1)),
    ("table entry with reserved bits", |image, entry| put_in_table(image, entry, 2)),
    ("table entry unaligned", |image, entry| put_in_table(image, entry, 0x200)),
    ("table entry past the end", |image, entry| put_in_table(image, entry, 1 << 40)),
    ("table entry that is an offset and all ones", |image, entry| {
        put_in_table(image, entry, 0x3_0001);
    }),
    ("a name given twice", |image, entry| image.put(entry + 32 + 24, b"b0")),
    ("in use, and the table past the end", |image, entry| {
        image.put32(entry + 12, 3);
        image.put64(entry, 1 << 40);
    }),
    ("in use, and a wild table entry", |image, entry| {
        image.put32(entry + 12, 3);
        put_in_table(image, entry, u64::MAX);
    }),
];

fn put_in_table(image: &mut Image, entry: usize, value: u64) {
    let table = usize::try_from(image.get64(entry)).unwrap();
    image.put64(table, value);
}

/// Creates an image with the bitmaps `b0` and `b1`. Both bitmaps have dirty bits.
fn two_bitmaps(path: &Path) -> Image {
    Program::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("8M").succeed();
    for name in ["b0", "b1"] {
        Program::new("qemu-img").args(["bitmap", "--add"]).arg(path).arg(name).succeed();
    }
    Program::new("qemu-io").args(["-c", "write -P 5 1M 1M"]).arg(path).succeed();
    read(path)
}

#[test]
fn a_broken_bitmap_can_be_listed_removed_and_repaired_without_data_loss() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let good = two_bitmaps(&path);
    let img = |args: &[&str]| tool(true, Img).args(args).arg(&path);
    for (name, fault) in BROKEN {
        let mut image = good.clone();
        let entry = directory_of(&image);
        fault(&mut image, entry);
        let spoiled = || std::fs::write(&path, image.bytes()).unwrap();
        spoiled();
        let info = img(&["info"]).succeed().out();
        assert!(info.contains("in-use"), "{name}: {info}");
        assert_eq!(img(&["check"]).run().code(), 2, "{name}");
        let refused = img(&["bitmap", "--clear"]).arg("b0").run();
        assert!(refused.err().contains("Bitmap 'b0' is inconsistent and cannot be used"), "{name}");
        // The image can be written to, and the bitmap can be removed.
        let io = ["-c", "write -P 6 4M 64k", "-c", "read -P 5 1M 1M"];
        let reply = tool(true, Io).args(io).arg(&path).succeed();
        assert!(!reply.out().contains("failed"), "{name}: {}", reply.out());
        img(&["bitmap", "--remove"]).arg("b0").succeed();
        let left = img(&["check"]).run();
        assert!(matches!(left.code(), 0 | 3), "{name}: {}{}", left.out(), left.err());
        if left.code() == 3 {
            img(&["check", "-r", "leaks"]).succeed();
        }
        Program::new("qemu-img").arg("check").arg(&path).succeed();
        assert!(!img(&["info"]).succeed().out().contains("b0"), "{name}");
        // A repair also removes the bitmap.
        spoiled();
        img(&["check", "-r", "all"]).succeed();
        Program::new("qemu-img").arg("check").arg(&path).succeed();
        let info = Program::new("qemu-img").arg("info").arg(&path).succeed().out();
        assert!(!info.contains("b0"), "{name}: {info}");
        let reply = tool(false, Io).args(["-c", "read -P 5 1M 1M"]).arg(&path).succeed();
        assert!(!reply.out().contains("failed"), "{name}: {}", reply.out());
    }
}

/// `bitmap --remove` cannot remove such a bitmap, and QEMU refuses to write to an image that has one.
#[test]
fn a_repair_removes_a_bitmap_whose_name_begins_with_a_zero_byte() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let mut image = two_bitmaps(&path);
    let entry = directory_of(&image);
    image.put(entry + 24, &[0]);
    std::fs::write(&path, image.bytes()).unwrap();
    let img = |args: &[&str]| tool(true, Img).args(args).arg(&path);
    let found = img(&["check"]).run();
    assert_eq!(found.code(), 2);
    assert!(found.err().contains("Bitmap '' doesn't satisfy the constraints"), "{}", found.err());
    img(&["check", "-r", "all"]).succeed();
    let io = ["-c", "write -P 6 4M 64k", "-c", "read -P 5 1M 1M"];
    let reply = Program::new("qemu-io").args(io).arg(&path).succeed();
    assert!(!reply.out().contains("failed"), "{}", reply.out());
    Program::new("qemu-img").arg("check").arg(&path).succeed();
    let info = img(&["info"]).succeed().out();
    assert!(info.contains("name: b1") && !info.contains("name: \n"), "{info}");
}

/// The error for a directory that cannot be read, and the change that causes it. The parameters of the change are the offsets
/// of the extension and of the directory.
type Unwalkable = (&'static str, fn(&mut Image, usize, usize));

const UNWALKABLE: &[Unwalkable] = &[
    ("Less bitmaps found", |image, at, _| image.put32(at, 3)),
    ("More bitmaps found", |image, at, _| image.put32(at, 1)),
    ("found bitmaps extension with zero bitmaps", |image, at, _| image.put32(at, 0)),
    ("exceeding the QEMU supported maximum", |image, at, _| image.put32(at, 70_000)),
    ("Reserved field is not zero", |image, at, _| image.put32(at + 4, 1)),
    ("bitmap directory size is zero", |image, at, _| image.put64(at + 8, 0)),
    ("exceeds the maximum supported size", |image, at, _| image.put64(at + 8, 1 << 40)),
    ("invalid bitmap directory offset", |image, at, _| image.put64(at + 16, 8)),
    ("Broken bitmap directory", |image, at, _| image.put64(at + 16, 1 << 40)),
    ("Broken bitmap directory", |image, at, _| {
        image.put32(at, 1);
        image.put64(at + 8, image.get64(at + 8) - 16);
    }),
    ("Broken bitmap directory", |image, _, entry| image.put32(entry + 20, u32::MAX)),
    ("Broken bitmap directory", |image, _, entry| image.put32(entry + 16, u32::MAX)),
];

#[test]
fn an_unreadable_bitmap_directory_does_not_prevent_a_repair() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let good = two_bitmaps(&path);
    let extension = |image: &Image| {
        let directory = directory_of(image) as u64;
        (0..4096).step_by(8).find(|at| image.get64(*at) == directory && *at > 104).unwrap() - 16
    };
    for (said, fault) in UNWALKABLE {
        let mut image = good.clone();
        let places = (extension(&image), directory_of(&image));
        fault(&mut image, places.0, places.1);
        // The image has another fault as well.
        let table = usize::try_from(image.get64(48)).unwrap();
        let block = usize::try_from(image.get64(table)).unwrap();
        image.put(block + 2 * 5, &[0, 0]);
        std::fs::write(&path, image.bytes()).unwrap();
        let img = |args: &[&str]| tool(true, Img).args(args).arg(&path);
        for args in [&["info"][..], &["bitmap", "--remove"], &["map"]] {
            let program = img(args);
            let reply = if args.len() > 1 { program.arg("b0").run() } else { program.run() };
            assert_eq!(reply.code(), 1, "{said}: {args:?}");
            assert!(reply.err().contains(said), "{said}: {}", reply.err());
            assert_eq!(reply.err().lines().count(), 1, "{said}");
        }
        let found = img(&["check"]).run();
        assert!(found.code() == 2 && found.err().contains(said), "{said}: {}", found.err());
        // The first repair removes the directory but frees no cluster, because clusters of bitmaps may be in use. The second
        // repair frees the clusters of the bitmaps as leaks.
        img(&["check", "-r", "all"]).run();
        img(&["check", "-r", "all"]).run();
        Program::new("qemu-img").arg("check").arg(&path).succeed();
        img(&["check", "-q"]).succeed();
        let reply = tool(false, Io).args(["-c", "read -P 5 1M 1M"]).arg(&path).succeed();
        assert!(!reply.out().contains("failed"), "{said}: {}", reply.out());
    }
}

#[test]
fn bitmaps_outdated_by_an_unaware_program_are_dropped_and_can_be_recreated() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let mut image = two_bitmaps(&path);
    image.put64(88, 0);
    std::fs::write(&path, image.bytes()).unwrap();
    let img = |args: &[&str]| tool(true, Img).args(args).arg(&path);
    assert!(!img(&["info"]).succeed().out().contains("bitmaps"));
    assert_eq!(img(&["check"]).run().code(), 3);
    img(&["bitmap", "--add"]).arg("b0").succeed();
    img(&["check", "-r", "leaks"]).succeed();
    let info = Program::new("qemu-img").args(["info"]).arg(&path).succeed();
    assert!(info.out().contains("name: b0") && !info.out().contains("name: b1"), "{}", info.out());
    assert!(info.err().is_empty(), "{}", info.err());
    Program::new("qemu-img").arg("check").arg(&path).succeed();
}

#[test]
fn bitmaps_can_be_changed_while_the_backing_file_is_missing() {
    let both = disk();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "a.raw", "over", "1M"]);
    both.prepare(|directory| std::fs::remove_file(directory.join("a.raw")).unwrap());
    same_lines(
        &both,
        &["bitmap --add over b", "bitmap --disable over b", "bitmap --remove over b"],
    );
}

#[test]
fn a_bitmap_is_merged_from_an_overlay_into_its_own_backing_file() {
    let both = disk();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "b.qcow2", "over", "32M"]);
    both.qemu(Img, &["bitmap", "--add", "over", "b"]);
    both.qemu(Io, &["-c", "write -q 1M 64k", "over"]);
    same_lines(
        &both,
        &["bitmap --add --merge b -b over -F qcow2 b.qcow2 b", "info b.qcow2", "check b.qcow2"],
    );
}

#[test]
fn one_command_removes_all_bitmaps_of_an_image() {
    let both = disk();
    both.qemu(Img, &["bitmap", "--add", "a.qcow2", "one"]);
    both.qemu(Img, &["bitmap", "--add", "--disable", "a.qcow2", "two"]);
    for directory in both.our_directories() {
        let img = |args: &[&str]| {
            let words: Vec<&str> = ["img"].iter().chain(args).copied().collect();
            Program::oxblk().args(words).directory(&directory)
        };
        assert_eq!(img(&["bitmap", "--remove-all", "a.qcow2", "one"]).run().code(), 1);
        img(&["bitmap", "--remove-all", "a.qcow2"]).succeed();
        assert!(!img(&["info", "a.qcow2"]).succeed().out().contains("bitmaps"));
        img(&["bitmap", "--remove-all", "--add", "a.qcow2", "three"]).succeed();
        assert!(img(&["info", "a.qcow2"]).succeed().out().contains("three"));
    }
}
