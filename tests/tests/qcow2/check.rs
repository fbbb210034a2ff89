//! The consistency check finds the same faults as `qemu-img check` in sound and in damaged images, and reports the faults with
//! the same text.

use std::cell::RefCell;
use std::path::Path;

use oxblk_core::check::{CheckReport, Finding, Fix};
use oxblk_core::{DriverTable, Error, Graph, OpenFlags, Options, Result};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::FILE;
use oxblk_ring::block_on;
use oxblk_tests::differential::Differential;
use oxblk_tests::hostile::image::Image;
use oxblk_tests::panic_text;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::Img;

static DRIVERS: DriverTable = &[QCOW2, &FILE];

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const FAR: u64 = 1 << 40;

/// Checks an image. Returns the report and the printed lines.
fn check_ours(path: &Path) -> (Result<CheckReport>, Vec<String>) {
    check_or_repair(path, Fix::Nothing)
}

fn check_or_repair(path: &Path, fix: Fix) -> (Result<CheckReport>, Vec<String>) {
    let said = RefCell::new(Vec::new());
    let report = block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let options = Options::from_dotted("driver=qcow2", None)?;
        let flags =
            OpenFlags { check: true, read_only: fix == Fix::Nothing, ..OpenFlags::default() };
        let backend = graph.open_backend(path.to_str(), options, flags).await?;
        let node = backend.node()?;
        let report_finding = |finding: Finding| {
            said.borrow_mut().extend(finding.text.lines().map(str::to_owned));
        };
        let report = match node.driver().check() {
            Some(check) => check.check(fix, &report_finding).await,
            None => Err(Error::unsupported("no check")),
        };
        backend.close().await?;
        report
    });
    (report, said.into_inner())
}

/// Returns a number of `qemu-img check --output=json`, or 0 if the output does not contain the number.
fn number(json: &str, name: &str) -> u64 {
    let key = format!("\"{name}\": ");
    json.split_once(&key).map_or(0, |(_, rest)| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    })
}

/// Compares the results of oxblk's and QEMU's checks of an image.
fn compare(path: &Path, what: &str) {
    let theirs = Program::new("qemu-img").args(["check", "--output=json"]).arg(path).run();
    let json = theirs.out();
    let (report, said) = check_ours(path);
    let theirs_said = theirs.err();
    if json.is_empty() {
        // QEMU stopped before it counted the references.
        let error = report.expect_err(&format!("{what}: {theirs_said}"));
        let mut all: Vec<String> = said;
        all.push(format!("Check failed: {error}"));
        let lines: Vec<&str> =
            theirs_said.lines().map(|line| line.trim_start_matches("qemu-img: ")).collect();
        assert_eq!(all, lines, "{what}");
        return;
    }
    let lines: Vec<&str> =
        theirs_said.lines().filter(|line| *line != "qemu-img: Check failed").collect();
    assert_eq!(said, lines, "{what}");
    let report = report.expect(what);
    let expected = CheckReport {
        check_errors: number(&json, "check-errors"),
        corruptions: number(&json, "corruptions"),
        leaks: number(&json, "leaks"),
        corruptions_fixed: 0,
        leaks_fixed: 0,
        image_end_offset: number(&json, "image-end-offset"),
        total_clusters: number(&json, "total-clusters"),
        allocated_clusters: number(&json, "allocated-clusters"),
        fragmented_clusters: number(&json, "fragmented-clusters"),
        compressed_clusters: number(&json, "compressed-clusters"),
    };
    assert_eq!(report, expected, "{what}");
}

/// Creates an image with data, zeroes, compressed clusters, a snapshot, and writes after the snapshot.
fn make(directory: &Path, options: &str) -> std::path::PathBuf {
    let run = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(directory).succeed();
    };
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        create.extend(["-o", options]);
    }
    create.extend(["a.qcow2", "64M"]);
    run("qemu-img", &create);
    let narrow = options.contains("refcount_bits=1");
    let mut writes = vec!["-c", "write -P 1 0 256k", "-c", "write -P 3 2M 64k"];
    let plain = options.contains("cluster_size=2M") || options.contains("preallocation");
    if !narrow && !plain {
        writes.extend(["-c", "write -c -P 2 512k 64k", "-c", "write -c -P 2 576k 64k"]);
    }
    if !options.contains("compat=0.10") {
        writes.extend(["-c", "write -z 1M 64k"]);
    }
    writes.push("a.qcow2");
    run("qemu-io", &writes);
    if !narrow {
        run("qemu-img", &["snapshot", "-c", "one", "a.qcow2"]);
        run("qemu-io", &["-c", "write -P 4 64k 64k", "a.qcow2"]);
        run("qemu-img", &["snapshot", "-c", "two", "a.qcow2"]);
    }
    run("qemu-io", &["-c", "write -P 4 40M 1M", "a.qcow2"]);
    directory.join("a.qcow2")
}

#[test]
fn sound_images_pass_the_check_with_the_same_figures_as_qemus() {
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2M,refcount_bits=2",
        "refcount_bits=1",
        "refcount_bits=8,lazy_refcounts=on",
        "refcount_bits=32",
        "preallocation=metadata",
        "compression_type=zstd",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let image = make(scratch.path(), options);
        compare(&image, options);
    }
}

#[test]
fn clusters_of_persistent_bitmaps_are_not_leaks() {
    let scratch = tempfile::tempdir().unwrap();
    let image = make(scratch.path(), "");
    let bitmap = |args: &[&str]| {
        Program::new("qemu-img").arg("bitmap").args(args).arg(&image).arg("b").succeed();
    };
    bitmap(&["--add", "-g", "64k"]);
    Program::new("qemu-io").args(["-c", "write -P 9 10M 4M"]).arg(&image).succeed();
    compare(&image, "bitmap");
    let (report, said) = check_ours(&image);
    assert_eq!((report.unwrap().leaks, said), (0, vec![]));
}

/// The offsets of the structures in an image of [`make`].
struct Places {
    l1: usize,
    l2: usize,
    refcount_table: usize,
    refcount_block: usize,
    snapshots: usize,
}

fn at(offset: u64) -> usize {
    usize::try_from(offset & 0x00ff_ffff_ffff_fe00).unwrap()
}

impl Places {
    fn of(image: &Image) -> Self {
        let (l1, refcount_table) = (at(image.get64(40)), at(image.get64(48)));
        Self {
            l1,
            l2: at(image.get64(l1)),
            refcount_table,
            refcount_block: at(image.get64(refcount_table)),
            snapshots: at(image.get64(64)),
        }
    }

    /// Returns the offset of the two bytes of a cluster's refcount.
    fn refcount(&self, offset: usize) -> usize {
        self.refcount_block + 2 * (offset >> 16)
    }
}

type Fault = (&'static str, fn(&mut Image, &Places));

const TABLE_FAULTS: &[Fault] = &[
    ("refcount 0", |i, p| {
        let data = at(i.get64(p.l2));
        i.put(p.refcount(data), &[0, 0]);
    }),
    ("refcount 9", |i, p| {
        let data = at(i.get64(p.l2));
        i.put(p.refcount(data), &[0, 9]);
    }),
    ("reference gone", |i, p| i.put64(p.l2 + 16, 0)),
    ("copied missing", |i, p| i.put64(p.l2 + 8, i.get64(p.l2 + 8) & !COPIED)),
    ("copied wrong", |i, p| i.put64(p.l2 + 16, i.get64(p.l2 + 16) | COPIED)),
    ("L1 copied missing", |i, p| i.put64(p.l1, i.get64(p.l1) & !COPIED)),
    ("L1 reserved", |i, p| i.put64(p.l1, i.get64(p.l1) | 4)),
    ("L1 past the end", |i, p| i.put64(p.l1, COPIED | FAR)),
    ("L1 unaligned", |i, p| i.put64(p.l1, i.get64(p.l1) | 0x200)),
    ("L1 to refcounts", |i, p| i.put64(p.l1, COPIED | p.refcount_block as u64)),
    ("L2 reserved low", |i, p| i.put64(p.l2, i.get64(p.l2) | 2)),
    ("L2 reserved high", |i, p| i.put64(p.l2, i.get64(p.l2) | 1 << 57)),
    ("L2 reserved on nothing", |i, p| i.put64(p.l2 + 800, 1 << 57)),
    ("L2 unaligned", |i, p| i.put64(p.l2 + 8, i.get64(p.l2 + 8) | 0x200)),
    ("L2 zero unaligned", |i, p| i.put64(p.l2 + 8, i.get64(p.l2 + 8) | 0x201)),
    ("L2 past the end", |i, p| i.put64(p.l2 + 8, COPIED | FAR)),
    ("L2 far past the end", |i, p| i.put64(p.l2 + 8, COPIED | 1 << 55)),
    ("L2 to the L1 table", |i, p| i.put64(p.l2 + 8, COPIED | p.l1 as u64)),
    ("L2 to itself", |i, p| i.put64(p.l2 + 8, COPIED | p.l2 as u64)),
    ("L2 behind the virtual end", |i, p| i.put64(p.l2 + 8 * 8191, COPIED | 0x5_0000)),
    ("compressed and copied", |i, p| i.put64(p.l2 + 64, i.get64(p.l2 + 64) | COPIED)),
    ("compressed past the end", |i, p| i.put64(p.l2 + 64, COMPRESSED | FAR)),
    ("compressed all set", |i, p| i.put64(p.l2 + 64, COMPRESSED | (COMPRESSED - 1))),
    ("compressed twice", |i, p| i.put64(p.l2 + 64, i.get64(p.l2 + 72))),
];

const REFCOUNT_FAULTS: &[Fault] = &[
    ("refcount table reserved", |i, p| i.put64(p.refcount_table, i.get64(p.refcount_table) | 4)),
    ("refcount block unaligned", |i, p| {
        i.put64(p.refcount_table, i.get64(p.refcount_table) | 0x200);
    }),
    ("refcount block past the end", |i, p| i.put64(p.refcount_table, FAR)),
    ("second block past the end", |i, p| i.put64(p.refcount_table + 8, FAR)),
    ("second block is the first", |i, p| {
        i.put64(p.refcount_table + 8, i.get64(p.refcount_table));
    }),
    ("no refcount block", |i, p| i.put64(p.refcount_table, 0)),
    ("no refcount table", |i, _| i.put32(56, 0)),
    ("refcount table elsewhere", |i, p| i.put64(48, p.l2 as u64)),
    ("refcount of the block too high", |i, p| i.put(p.refcount(p.refcount_block), &[0, 2])),
    ("refcount of the block 0", |i, p| i.put(p.refcount(p.refcount_block), &[0, 0])),
    ("refcount of the header 0", |i, p| i.put(p.refcount(0), &[0, 0])),
    ("refcounts behind the end", |i, p| i.put(p.refcount(0x1000_0000), &[0, 3])),
    ("L1 past the end", |i, _| i.put64(40, FAR)),
    ("cut off", |i, p| i.truncate(p.l2)),
    ("cut off in the L2 table", |i, p| i.truncate(p.l2 + 0x80)),
    ("dirty and corrupt", |i, _| i.put64(72, 3)),
    ("larger disk", |i, _| i.put64(24, 1 << 29)),
];

const SNAPSHOT_FAULTS: &[Fault] = &[
    ("refcount of the snapshot table 0", |i, p| i.put(p.refcount(p.snapshots), &[0, 0])),
    ("snapshot L1 past the end", |i, p| i.put64(p.snapshots, FAR)),
    ("snapshot L1 unaligned", |i, p| i.put64(p.snapshots, 0x200)),
    ("snapshot L1 too large", |i, p| i.put32(p.snapshots + 8, 1 << 23)),
    ("snapshot without extra data", |i, p| i.put32(p.snapshots + 36, 0)),
    ("snapshot with too much extra data", |i, p| i.put32(p.snapshots + 36, 2000)),
    ("snapshots that are not there", |i, _| i.put32(60, 5)),
    ("snapshot table past the end", |i, _| i.put64(64, FAR)),
    ("many snapshots on data", |i, _| {
        i.put32(60, 200);
        i.put64(64, 0x5_0000);
    }),
    ("snapshots more than can be", |i, _| i.put32(60, 65_536 + 77)),
    ("snapshot table unaligned", |i, p| i.put64(64, p.snapshots as u64 + 8)),
];

/// Faults of the snapshot table whose repair loses no snapshot. oxblk and QEMU report the same repairs.
const REPAIRED_SNAPSHOT_FAULTS: &[Fault] = &[
    ("snapshots with too much extra data", |i, p| {
        let mut table = Vec::new();
        let mut at = p.snapshots;
        for _ in 0..2 {
            let mut entry = i.bytes()[at..at + 72].to_vec();
            assert_eq!(entry[36..40], [0, 0, 0, 24], "the layout has changed");
            let names = entry.split_off(64);
            entry[36..40].copy_from_slice(&2000_u32.to_be_bytes());
            entry.resize(2040, 0);
            table.extend([entry, names].concat());
            at += 72;
        }
        i.put(p.snapshots, &table);
    }),
    ("one snapshot more", |i, _| i.put32(60, 3)),
];

/// Faults that hide snapshots.
const LOST_SNAPSHOT_FAULTS: &[Fault] = &[
    ("snapshot with too much extra data", |i, p| i.put32(p.snapshots + 36, 2000)),
    ("snapshot with far too much extra data", |i, p| i.put32(p.snapshots + 36, u32::MAX)),
    ("snapshot L1 past the end", |i, p| i.put64(p.snapshots, FAR)),
    ("snapshot L1 unaligned", |i, p| i.put64(p.snapshots, 0x200)),
    ("snapshot L1 too large", |i, p| i.put32(p.snapshots + 8, 1 << 23)),
    ("snapshot L1 of no entries", |i, p| i.put32(p.snapshots + 8, 0)),
    ("snapshot L1 of the other snapshot", |i, p| i.put64(p.snapshots, i.get64(p.snapshots + 72))),
    ("snapshot table past the end", |i, _| i.put64(64, FAR)),
    ("snapshot table elsewhere", |i, p| i.put64(64, p.l1 as u64)),
    ("many snapshots on data", |i, _| {
        i.put32(60, 200);
        i.put64(64, 0x5_0000);
    }),
    ("one snapshot less", |i, _| i.put32(60, 1)),
    ("no snapshots", |i, _| i.put32(60, 0)),
];

fn damaged(faults: &[Fault]) {
    let scratch = tempfile::tempdir().unwrap();
    let good = std::fs::read(make(scratch.path(), "")).unwrap();
    let mut failures = Vec::new();
    for (name, spoil) in faults {
        let mut image = Image::new(good.clone());
        let places = Places::of(&image);
        spoil(&mut image, &places);
        let path = scratch.path().join("bad.qcow2");
        std::fs::write(&path, image.bytes()).unwrap();
        let outcome = std::panic::catch_unwind(|| compare(&path, name));
        failures.extend(outcome.err().map(|panic| panic_text(&*panic)));
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Classifies an image by `qemu-img check`: sound, leaking, or worse.
fn state_of(path: &Path) -> u8 {
    match Program::new("qemu-img").arg("check").arg(path).run().code() {
        0 => 0,
        3 => 1,
        _ => 2,
    }
}

/// Repairs an image with each fault. oxblk's repair must leave no worse faults than qemu-img's repair. If both repaired images
/// are sound, their contents must be the same.
fn repaired(faults: &[Fault]) {
    let scratch = tempfile::tempdir().unwrap();
    let good = std::fs::read(make(scratch.path(), "")).unwrap();
    let mut failures = Vec::new();
    for (name, spoil) in faults {
        let mut image = Image::new(good.clone());
        let places = Places::of(&image);
        spoil(&mut image, &places);
        let [ours, theirs] = ["ours.qcow2", "theirs.qcow2"].map(|name| scratch.path().join(name));
        for path in [&ours, &theirs] {
            std::fs::write(path, image.bytes()).unwrap();
        }
        Program::new("qemu-img").args(["check", "-r", "all"]).arg(&theirs).run();
        let (report, said) = check_or_repair(&ours, Fix::All);
        let (left, right) = (state_of(&ours), state_of(&theirs));
        if left > right {
            failures.push(format!("{name}: {left}, not {right}: {report:?}\n{}", said.join("\n")));
        }
        if (left, right) == (0, 0) {
            let compared = Program::new("qemu-img").arg("compare").arg(&ours).arg(&theirs).run();
            if compared.code() != 0 {
                failures.push(format!("{name}: another content: {}", compared.out()));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn faults_of_tables_that_qemu_repairs_are_repaired() {
    repaired(TABLE_FAULTS);
}

#[test]
fn faults_of_refcounts_that_qemu_repairs_are_repaired() {
    repaired(REFCOUNT_FAULTS);
}

/// QEMU frees the clusters of snapshots that it does not find. oxblk does not free them.
#[test]
fn faults_of_snapshot_tables_that_qemu_repairs_are_repaired_unless_snapshots_are_lost() {
    let lost = |name: &str| LOST_SNAPSHOT_FAULTS.iter().any(|fault| fault.0 == name);
    let faults: Vec<Fault> =
        SNAPSHOT_FAULTS.iter().copied().filter(|fault| !lost(fault.0)).collect();
    repaired(&faults);
}

#[test]
fn a_repair_frees_no_clusters_of_hidden_snapshots() {
    let scratch = tempfile::tempdir().unwrap();
    let good = std::fs::read(make(scratch.path(), "")).unwrap();
    let path = scratch.path().join("bad.qcow2");
    for (name, spoil) in LOST_SNAPSHOT_FAULTS {
        let mut image = Image::new(good.clone());
        let places = Places::of(&image);
        spoil(&mut image, &places);
        for fix in [Fix::Leaks, Fix::All] {
            std::fs::write(&path, image.bytes()).unwrap();
            let _ = check_or_repair(&path, fix);
            // Revert the fault.
            let mut now = std::fs::read(&path).unwrap();
            now[..112].copy_from_slice(&good[..112]);
            let table = places.snapshots..places.snapshots + 144;
            now[table.clone()].copy_from_slice(&good[table]);
            std::fs::write(&path, &now).unwrap();
            let state = state_of(&path);
            assert!(state <= 1, "{name}, {fix:?}: clusters in use were freed");
        }
    }
}

#[test]
fn the_repair_of_snapshot_tables_is_reported_as_by_qemu() {
    let scratch = tempfile::tempdir().unwrap();
    let good = std::fs::read(make(scratch.path(), "")).unwrap();
    let mut failures = Vec::new();
    for (name, spoil) in REPAIRED_SNAPSHOT_FAULTS {
        let mut image = Image::new(good.clone());
        let places = Places::of(&image);
        spoil(&mut image, &places);
        for fix in ["leaks", "all"] {
            let both = Differential::new();
            both.file("a.qcow2", image.bytes());
            let compare = || {
                both.same(Img, &["check", "-r", fix, "a.qcow2"]);
                if fix == "all" {
                    both.same(Img, &["snapshot", "-l", "a.qcow2"]);
                }
            };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(compare));
            let failed = outcome.err().map(|panic| format!("{name}: {}", panic_text(&*panic)));
            failures.extend(failed);
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_repaired_when_it_is_opened_for_writing() {
    let scratch = tempfile::tempdir().unwrap();
    let path = make(scratch.path(), "lazy_refcounts=on");
    let mut image = Image::new(std::fs::read(&path).unwrap());
    let places = Places::of(&image);
    let data = at(image.get64(places.l2));
    image.put(places.refcount(data), &[0, 0]);
    image.put64(72, 1);
    std::fs::write(&path, image.bytes()).unwrap();
    let read = ["-r", "-c", "read -P 1 0 64k"];
    Program::oxblk().arg("io").args(read).arg(&path).succeed();
    assert_eq!(
        Image::new(std::fs::read(&path).unwrap()).get64(72),
        1,
        "a reader changed the image"
    );
    let write = ["-c", "write -P 7 20M 1M", "-c", "read -P 1 0 64k"];
    Program::oxblk().arg("io").args(write).arg(&path).succeed();
    assert_eq!(Image::new(std::fs::read(&path).unwrap()).get64(72), 0);
    Program::new("qemu-img").arg("check").arg(&path).succeed();
    Program::new("qemu-io").args(["-c", "read -P 7 20M 1M"]).arg(&path).succeed();
}

#[test]
fn damaged_l1_and_l2_tables_are_reported_as_by_qemu() {
    damaged(TABLE_FAULTS);
}

#[test]
fn damaged_refcounts_are_reported_as_by_qemu() {
    damaged(REFCOUNT_FAULTS);
}

#[test]
fn damaged_snapshot_tables_are_reported_as_by_qemu() {
    damaged(SNAPSHOT_FAULTS);
}

#[test]
fn more_references_than_a_refcount_can_count_are_reported_as_overflows() {
    let scratch = tempfile::tempdir().unwrap();
    let path = make(scratch.path(), "refcount_bits=1");
    let mut image = Image::new(std::fs::read(&path).unwrap());
    let places = Places::of(&image);
    image.put64(places.l2 + 8, image.get64(places.l2));
    std::fs::write(&path, image.bytes()).unwrap();
    compare(&path, "overflow");
}

#[test]
fn an_empty_huge_sparse_file_is_checked_quickly() {
    let scratch = tempfile::tempdir().unwrap();
    let path = make(scratch.path(), "cluster_size=512");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 << 40).unwrap();
    let (report, said) = check_ours(&path);
    assert_eq!((report.unwrap().corruptions, said.len()), (0, 0));
}

#[test]
fn a_repair_of_a_cut_off_image_does_not_overwrite_its_l1_table() {
    for len in [196_608, 93_038, 70_000] {
        let directory = tempfile::tempdir().unwrap();
        let run = |program: Program, line: &str| {
            program.args(line.split(' ')).directory(directory.path()).run()
        };
        let create = "create -q -f qcow2 disk 10M";
        assert_eq!(run(Program::new("qemu-img"), create).code(), 0);
        let write = ["-c", "write -P 1 0 1M", "disk"];
        Program::new("qemu-io").args(write).directory(directory.path()).succeed();
        // The L1 table is at 192 KiB.
        let path = directory.path().join("disk");
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        // The first repair makes the file longer. Then the file contains the L1 table, and the next repair counts the clusters
        // of this table.
        for _ in 0..3 {
            run(Program::oxblk().arg("img"), "check -r all disk");
        }
        let check = run(Program::oxblk().arg("img"), "check disk");
        assert_eq!(check.code(), 0, "{len}: {}{}", check.out(), check.err());
        assert_eq!(run(Program::new("qemu-img"), "check -q disk").code(), 0, "{len}");
        // The remainder of the file is lost, so the disk reads as zeroes.
        let read = Program::oxblk().args(["io", "-c", "read -P 0 0 10M", "disk"]);
        let read = read.directory(directory.path()).run();
        assert_eq!(read.code(), 0, "{len}: {}", read.err());
    }
}
