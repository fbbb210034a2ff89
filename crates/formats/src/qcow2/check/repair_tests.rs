//! Repairs of broken images on a simulated disk: complete repairs, repairs interrupted by a power cut, and repairs on a full
//! disk.

use std::cell::RefCell;

use oxblk_core::check::{CheckReport, Finding, Fix};
use oxblk_core::{Attachment, DriverTable, Graph, OpenFlags, Perm, Permissions, Result};
use oxblk_protocols::file::{self, FileDriver};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_ring::{File, IoBufMut};

use super::check;
use super::tests::{BLOCK, CLUSTER, DATA, Image, L1, L2, SNAPSHOTS, TABLE, offset};
use crate::qcow2::layout::{Header, L1Entry, L2Entry, refcount_get, refcount_set};

static DRIVERS: DriverTable = &[&file::FILE];

type Fault = (&'static str, fn(&mut Image));

/// The faults to repair. None of them changes the guest's data.
const FAULTS: &[Fault] = &[
    ("a refcount too low", |image| image.set_refcount(7, 0)),
    ("no refcounts at all", |image| (0..8).for_each(|cluster| image.set_refcount(cluster, 0))),
    ("no refcount block", |image| image.put(TABLE, 0)),
    ("a refcount block that is not aligned", |image| image.put(TABLE, offset(BLOCK) | 0x200)),
    ("a block past the end", |image| image.put(TABLE, 1 << 40)),
    ("reserved bits in the table", |image| image.put(TABLE, offset(BLOCK) | 1)),
    ("a block that two entries share", |image| image.put(TABLE + 8, offset(BLOCK))),
    ("data in the cluster of the refcount block", |image| {
        // Add a guest cluster whose L2 entry refers to the cluster of the refcount block.
        image.put(L2 + 24, L2Entry::data(offset(BLOCK)).0);
    }),
    ("leaked clusters", |image| {
        image.bytes.resize(10 * CLUSTER, 0x5a);
        image.set_refcount(8, 1);
        image.set_refcount(9, 1);
    }),
    ("a refcount too high, and an entry without the copied flag", |image| {
        if image.can_count_to(2) {
            image.set_refcount(5, 2);
        }
        image.put(L2, offset(DATA));
    }),
    ("entries without the copied flag", |image| {
        image.put(L1, offset(L2));
        image.put(L2, offset(DATA));
    }),
    ("a snapshot table with too much extra data", |image| {
        image.with_snapshot();
        image.put(SNAPSHOTS + 32, 2000);
        image.put_snapshot_name(2000);
    }),
    ("a snapshot table with an entry that is incomplete", |image| {
        image.with_snapshot();
        image.put(SNAPSHOTS + 32, 0);
        image.put_snapshot_name(0);
    }),
    ("a dirty image", |image| {
        image.bytes[79] = 1;
        image.set_refcount(5, 0);
        image.set_refcount(6, 0);
    }),
];

fn image(fault: Fault, order: u32) -> Image {
    let mut image = Image::good(order);
    image.bytes[DATA..8 * CLUSTER].fill(0xda);
    (fault.1)(&mut image);
    image
}

fn checked(disk: &Disk, fix: Fix) -> Result<CheckReport> {
    checked_with(disk, fix, &|_| ())
}

/// Checks the image, and reports findings to `report_finding`.
fn checked_with(disk: &Disk, fix: Fix, report_finding: &dyn Fn(Finding)) -> Result<CheckReport> {
    sim::run(1, async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let driver = FileDriver::from_ring_file(File::sim(disk), disk.len());
        let flags = OpenFlags::default();
        let node = graph.add_node(None, &file::FILE, Box::new(driver), flags)?;
        let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let permissions = Permissions::sharing_all(taken);
        let edge = Attachment::new(&node, "the test", "file", permissions)?;
        let head = edge.read(0, IoBufMut::new(CLUSTER)).await?;
        let header = Header::parse(&head, edge.size())?;
        let report = check(&edge, &header, fix, report_finding).await;
        drop(edge);
        report
    })
}

/// Asserts that the image has no fault and that its data is unchanged.
fn assert_whole(disk: &Disk, what: &str) {
    let report = checked(disk, Fix::Nothing).unwrap();
    let faults = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(faults, (0, 0, 0), "{what}");
    let bytes = disk.bytes();
    assert!(bytes[DATA..8 * CLUSTER].iter().all(|byte| *byte == 0xda), "{what}: data lost");
    assert_eq!(bytes[79], 0, "{what}: still dirty");
}

#[test]
fn every_fault_is_repaired_at_every_refcount_width() {
    for fault in FAULTS {
        for order in 0..=6 {
            let disk = Disk::from_bytes(1, &image(*fault, order).bytes);
            let what = format!("{}, order {order}", fault.0);
            let report = checked(&disk, Fix::All).unwrap();
            assert!(report.corruptions_fixed + report.leaks_fixed > 0, "{what}");
            let left = (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(left, (0, 0, 0), "{what}");
            assert_whole(&disk, &what);
        }
    }
}

#[test]
fn a_repair_interrupted_by_a_power_cut_can_be_repeated() {
    for fault in FAULTS {
        let disk = Disk::from_bytes(1, &image(*fault, 4).bytes);
        disk.keep_moments(1, usize::MAX);
        checked(&disk, Fix::All).unwrap();
        let moments = disk.moments();
        assert!(!moments.is_empty());
        for (clusters_to_move, moment) in moments {
            let any = (0..8).map(|seed| moment.after_power_loss(seed));
            let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
            for found in any.chain(ends) {
                let what = format!("{}, power cut at {clusters_to_move}", fault.0);
                checked(&found, Fix::All).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_whole(&found, &what);
            }
        }
    }
}

#[test]
fn a_repair_of_leaks_alone_does_not_change_corruptions() {
    for fault in FAULTS {
        let disk = Disk::from_bytes(1, &image(*fault, 4).bytes);
        // An image with an unreadable snapshot table cannot be checked.
        let Ok(before) = checked(&disk, Fix::Nothing) else { continue };
        match checked(&disk, Fix::Leaks) {
            // `Fix::Leaks` does not rebuild refcounts that cannot be repaired in place.
            Err(error) => assert_eq!(error.to_string(), "Input/output error", "{}", fault.0),
            Ok(report) => {
                let after = checked(&disk, Fix::Nothing).unwrap();
                assert_eq!(after.leaks, 0, "{}", fault.0);
                assert_eq!(report.leaks_fixed, before.leaks, "{}", fault.0);
                assert!(after.corruptions <= before.corruptions, "{}", fault.0);
            }
        }
    }
}

#[test]
fn refcounts_are_rebuilt_inside_the_file_if_the_disk_is_full() {
    let mut image = image(("no refcount block", |image| image.put(TABLE, 0)), 4);
    // Add two clusters without references: one for the new table, one for the new block.
    image.bytes.resize(10 * CLUSTER, 0);
    let disk = Disk::from_bytes(1, &image.bytes);
    let rule = FailRule {
        op: FaultOp::Write,
        nth: None,
        range: Some(offset(10 * CLUSTER)..u64::MAX),
        errno: 28,
        once: false,
    };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!(report.corruptions, 0);
    assert_eq!(disk.len(), offset(10 * CLUSTER));
    assert_whole(&disk, "a full disk");
}

#[test]
fn a_full_disk_does_not_prevent_repairs_that_need_no_space() {
    // The offset of the first block is past the end of the file. The second block is valid and has a refcount that is
    // too low.
    let mut bytes = vec![0_u8; 300 * 512];
    let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    put(0, 0x5146_49fb_0000_0003);
    put(16, 9);
    put(24, 1 << 20);
    put(32, 32);
    put(40, 512);
    put(48, 1024);
    put(56, 1 << 32);
    put(96, (6 << 32) | 104);
    put(1024, 1 << 40);
    put(1024 + 8, 1536);
    put(512, L1Entry::new(2048).0);
    put(2048, L2Entry::data(offset(100 * 512)).0);
    let disk = Disk::from_bytes(1, &bytes);
    let range = Some(offset(300 * 512)..u64::MAX);
    let full = FailRule { op: FaultOp::Write, nth: None, range, errno: 28, once: false };
    // Writes to free clusters inside the file fail as well.
    let inside = FailRule { range: Some(2560..51_200), ..full.clone() };
    disk.set_faults(Faults { fail: vec![full, inside], ..Faults::default() });
    let report = checked(&disk, Fix::All).unwrap();
    assert!(report.check_errors > 0, "the full disk was not reported");
    let block = &disk.bytes()[1536..2048];
    assert_eq!(
        refcount_get(block, 100 - 64, 6),
        Some(1),
        "the refcount was not raised although this needs no space"
    );
    disk.set_faults(Faults::default());
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
}

#[test]
fn no_refcount_is_lowered_while_some_references_may_be_unknown() {
    let mut image = image(("a refcount too low", |image| image.set_refcount(7, 0)), 4);
    // Add a second L2 table, in a cluster that cannot be read.
    image.bytes.resize(10 * CLUSTER, 0);
    image.bytes[39] = 2;
    image.put(L1 + 8, L1Entry::new(offset(8 * CLUSTER)).0);
    image.set_refcount(8, 1);
    // The unreadable table may refer to this cluster.
    image.set_refcount(9, 1);
    let disk = Disk::from_bytes(1, &image.bytes);
    let range = Some(offset(8 * CLUSTER)..offset(9 * CLUSTER));
    let rule = FailRule { op: FaultOp::Read, nth: None, range, errno: 5, once: false };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    assert_eq!((report.leaks, report.leaks_fixed, report.check_errors), (1, 0, 1));
    disk.set_faults(Faults::default());
    let report = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 1));
}

#[test]
fn a_rebuild_with_unknown_references_does_not_lower_refcounts() {
    let mut image = image(("reserved bits", |image| image.put(TABLE, offset(BLOCK) | 1)), 4);
    image.bytes.resize(10 * CLUSTER, 0);
    image.bytes[39] = 2;
    image.put(L1 + 8, L1Entry::new(offset(8 * CLUSTER)).0);
    image.set_refcount(8, 1);
    image.set_refcount(9, 1);
    // Cluster 9 has no known reference, but the unreadable table may refer to it.
    let disk = Disk::from_bytes(1, &image.bytes);
    let range = Some(offset(8 * CLUSTER)..offset(9 * CLUSTER));
    let rule = FailRule { op: FaultOp::Read, nth: None, range, errno: 5, once: false };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!(report.corruptions, 0);
    assert_eq!(report.check_errors, 1);
    disk.set_faults(Faults::default());
    let report = checked(&disk, Fix::Nothing).unwrap();
    // The leaks are the old refcount table, the old refcount block, and cluster 9. Cluster 9 has no reference.
    assert_eq!((report.corruptions, report.leaks), (0, 3));
}

/// Makes the header refer to a LUKS header in the first data cluster. The cluster contains none, so the repair raises the
/// refcount of this cluster and changes no table.
fn put_wrong_luks_header(image: &mut Image) {
    image.bytes[35] = 2;
    image.put(104, 0x0537_be77_0000_0010);
    image.put(112, offset(DATA));
    image.put(120, 512);
}

#[test]
fn a_refused_repair_of_tables_is_reported_as_a_fault_that_stays() {
    let mut image = Image::good(4);
    image.with_snapshot();
    put_wrong_luks_header(&mut image);
    // Add a second L1 entry, with the copied flag and without an offset.
    image.bytes[39] = 2;
    image.put(L1 + 8, 1 << 63);
    // Remove the extra data of the snapshot table entry.
    image.put(SNAPSHOTS + 32, 0);
    image.put_snapshot_name(0);
    let disk = Disk::from_bytes(1, &image.bytes);
    let texts = RefCell::new(Vec::new());
    let report_finding = |finding: Finding| texts.borrow_mut().push(finding.to_string());
    let report = checked_with(&disk, Fix::All, &report_finding).unwrap();
    let texts = texts.into_inner();
    let has = |text: &str| texts.iter().any(|line| line == text);
    assert!(has("ERROR L1 entry 1 has flags but no offset: 8000000000000000"), "{texts:?}");
    assert!(has("ERROR snapshot table entry 0 is incomplete"), "{texts:?}");
    let told = |texts: &[String]| texts.iter().any(|line| line.contains("Copy the disk"));
    assert!(!told(&texts), "the repair has fixed a refcount: {texts:?}");
    let repairs: Vec<_> = texts.iter().filter(|text| text.contains("Repairing")).collect();
    assert_eq!(repairs, ["Repairing cluster 5 refcount=1 reference=2"]);
    assert_eq!(report.corruptions_fixed, 1);
    let left = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!(report.corruptions, left.corruptions, "{texts:?}");
    assert_eq!(disk.bytes()[L1 + 8], 0x80, "the table was changed");
    let texts = RefCell::new(Vec::new());
    let report_finding = |finding: Finding| texts.borrow_mut().push(finding.to_string());
    let report = checked_with(&disk, Fix::All, &report_finding).unwrap();
    assert_eq!(report.corruptions_fixed, 0);
    assert!(told(&texts.into_inner()), "the next repair can do nothing");
}

#[test]
fn incomplete_snapshot_entries_after_the_first_ten_have_one_line() {
    let mut image = Image::good(4);
    image.with_snapshot();
    image.put(SNAPSHOTS + 32, 0);
    image.put_snapshot_name(0);
    let entry = image.bytes[SNAPSHOTS..SNAPSHOTS + 48].to_vec();
    for index in 1..15 {
        image.bytes[SNAPSHOTS + index * 48..][..48].copy_from_slice(&entry);
    }
    image.set_refcount(9, 15);
    image.bytes[60..64].copy_from_slice(&15_u32.to_be_bytes());
    for (fix, word) in [(Fix::Nothing, "ERROR"), (Fix::All, "Repairing")] {
        let disk = Disk::from_bytes(1, &image.bytes);
        let texts = RefCell::new(Vec::new());
        let report_finding = |finding: Finding| texts.borrow_mut().push(finding.to_string());
        let report = checked_with(&disk, fix, &report_finding).unwrap();
        let texts = texts.into_inner();
        let lines = texts.iter().filter(|line| line.ends_with("incomplete")).count();
        assert_eq!(lines, 11, "{texts:?}");
        let last = format!("{word} 5 more snapshot table entries are incomplete");
        assert!(texts.contains(&last), "{texts:?}");
        assert!(report.corruptions + report.corruptions_fixed >= 15, "{report:?}");
    }
}

#[test]
fn an_entry_that_is_not_changed_counts_as_a_corruption_that_stays() {
    let mut image = Image::good(4);
    // Set a reserved bit of an L2 entry, and clear its copied flag.
    image.put(L2 + 8, offset(DATA + CLUSTER) | 2);
    let disk = Disk::from_bytes(1, &image.bytes);
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0));
    let left = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!(left.corruptions, 2);
}

/// Rebuilds refcounts while flushes fail: the `nth` flush only, or this flush and all later ones.
fn rebuild_with_failing_flush(nth: u64, once: bool) -> (Disk, Result<CheckReport>) {
    let image = image(("no refcount block", |image| image.put(TABLE, 0)), 4);
    let disk = Disk::from_bytes(1, &image.bytes);
    let rule = FailRule { op: FaultOp::Sync, nth: Some(nth), range: None, errno: 5, once };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let outcome = checked(&disk, Fix::All);
    disk.set_faults(Faults::default());
    (disk, outcome)
}

#[test]
fn after_a_failed_rebuild_the_header_refers_to_the_old_refcount_table() {
    // The flush of the new structures, and the flush of the header.
    for nth in [1, 2] {
        let (disk, outcome) = rebuild_with_failing_flush(nth, true);
        assert!(outcome.map_or(true, |report| report.check_errors > 0), "flush {nth}");
        assert_eq!(disk.bytes()[48..56], offset(TABLE).to_be_bytes(), "flush {nth}");
        checked(&disk, Fix::All).unwrap();
        assert_whole(&disk, &format!("flush {nth}"));
        // The old value in the header cannot be flushed, so nothing more is written.
        let (disk, outcome) = rebuild_with_failing_flush(nth, false);
        assert!(outcome.is_err(), "all flushes from {nth}: {outcome:?}");
        checked(&disk, Fix::All).unwrap();
        assert_whole(&disk, &format!("all flushes from {nth}"));
    }
}

#[test]
fn an_image_with_wrong_copied_flags_stays_marked_dirty() {
    let mut image = Image::good(4);
    put_wrong_luks_header(&mut image);
    image.bytes[79] = 1;
    let disk = Disk::from_bytes(1, &image.bytes);
    let report = checked(&disk, Fix::All).unwrap();
    let left = checked(&disk, Fix::Nothing).unwrap();
    assert!(left.corruptions > 0, "the copied flags are right: {left:?}");
    assert!(report.corruptions > 0, "the repair does not report the flags: {report:?}");
    assert_eq!(disk.bytes()[79], 1, "the image is marked clean");
}

#[test]
fn more_refcounts_than_one_block_holds_are_rebuilt() {
    // With 512-byte clusters and 64-bit refcounts, a block contains 64 refcounts.
    let mut bytes = vec![0_u8; 300 * 512];
    let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    put(0, 0x5146_49fb_0000_0003);
    put(16, 9);
    put(24, 1 << 20);
    put(32, 32);
    put(40, 512);
    put(48, 1024);
    put(56, 1 << 32);
    put(96, (6 << 32) | 104);
    put(512, L1Entry::new(1536).0);
    for entry in 0..64 {
        put(1536 + 8 * entry, L2Entry::data(offset((200 + entry) * 512)).0);
    }
    let mut block = vec![0; 512];
    refcount_set(&mut block, 0, 6, 1).unwrap();
    let disk = Disk::from_bytes(1, &bytes);
    let before = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!(before.corruptions, 3 + 1 + 64 + 65);
    let report = checked(&disk, Fix::All).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
    let after = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!((after.corruptions, after.leaks, after.allocated_clusters), (0, 0, 64));
}

/// An image that has lost its last cluster: an L2 entry refers to the first cluster behind the end of the file.
fn cut_off(fault: impl FnOnce(&mut Image)) -> Disk {
    let mut image = Image::good(4);
    image.with_snapshot();
    image.put(L2 + 24, L2Entry::data(offset(image.bytes.len())).0);
    fault(&mut image);
    Disk::from_bytes(1, &image.bytes)
}

#[test]
fn a_new_snapshot_table_is_not_placed_on_a_lost_cluster() {
    let disk = cut_off(|image| {
        image.put(SNAPSHOTS + 32, 0);
        image.put_snapshot_name(0);
    });
    let lost = disk.len();
    checked(&disk, Fix::All).unwrap();
    let table = u64::from_be_bytes(disk.bytes()[64..72].try_into().unwrap());
    assert!(table > lost, "the table is at {table:#x}");
    let left = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!((left.corruptions, left.leaks), (0, 0));
}

#[test]
fn a_rebuild_gives_refcounts_to_lost_clusters_that_the_file_contains_again() {
    let disk = cut_off(|image| image.put(TABLE, 0));
    let report = checked(&disk, Fix::All).unwrap();
    assert!(report.corruptions > 0, "data was lost");
    let left = checked(&disk, Fix::Nothing).unwrap();
    assert_eq!((left.corruptions, left.leaks), (0, 0));
}

/// An image whose snapshot table has an entry without extra data. If `leaks`, the file ends with a leaked cluster.
fn incomplete_snapshots(leaks: bool) -> Disk {
    let mut image = image(("", |_| ()), 4);
    image.with_snapshot();
    image.put(SNAPSHOTS + 32, 0);
    image.put_snapshot_name(0);
    if leaks {
        image.bytes.resize(11 * CLUSTER, 0);
        image.set_refcount(10, 1);
    }
    Disk::from_bytes(1, &image.bytes)
}

/// A failing write of the fields of the header that contain the location of the snapshot table.
fn failing_snapshot_fields(once: bool) -> FailRule {
    FailRule { op: FaultOp::Write, nth: Some(1), range: Some(60..72), errno: 5, once }
}

#[test]
fn a_snapshot_table_that_the_header_could_not_name_is_reported_as_not_repaired() {
    for leaks in [false, true] {
        for has_effect in [false, true] {
            let disk = incomplete_snapshots(leaks);
            let (rules, mut faults) = (vec![failing_snapshot_fields(true)], Faults::default());
            let fail = if has_effect { &mut faults.fail_late } else { &mut faults.fail };
            *fail = rules;
            disk.set_faults(faults);
            let report = checked(&disk, Fix::All).unwrap();
            let what = format!("leaks: {leaks}, has effect: {has_effect}, {report:?}");
            disk.set_faults(Faults::default());
            assert_eq!(disk.bytes()[64..72], offset(SNAPSHOTS).to_be_bytes(), "{what}");
            assert_eq!((report.corruptions, report.check_errors), (1, 1), "{what}");
            assert_eq!((report.leaks, report.leaks_fixed), (0, u64::from(leaks)), "{what}");
            let left = checked(&disk, Fix::Nothing).unwrap();
            assert_eq!((left.corruptions, left.leaks), (1, 0), "{what}");
            checked(&disk, Fix::All).unwrap();
            assert_whole(&disk, &what);
        }
    }
}

#[test]
fn a_repair_ends_if_the_location_of_the_snapshot_table_on_disk_is_unknown() {
    let disk = incomplete_snapshots(true);
    let fail_late = vec![failing_snapshot_fields(false)];
    disk.set_faults(Faults { fail_late, ..Faults::default() });
    checked(&disk, Fix::All).unwrap_err();
    disk.set_faults(Faults::default());
    checked(&disk, Fix::All).unwrap();
    assert_whole(&disk, "after the second repair");
}
