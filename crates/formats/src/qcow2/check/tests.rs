//! Checks of images that the tests build from bytes: a valid image, and broken variants of this image.

use std::cell::RefCell;

use oxblk_core::check::{CheckReport, Finding, Fix};
use oxblk_core::{Attachment, DriverTable, Graph, OpenFlags, Options, Perm, Permissions};
use oxblk_protocols::file;
use oxblk_ring::{IoBufMut, block_on};

use super::check;
use crate::qcow2::layout::{Geometry, Header, L1Entry, L2Entry, refcount_max, refcount_set};

static DRIVERS: DriverTable = &[&file::FILE];

pub(super) const CLUSTER: usize = 4096;
pub(super) const TABLE: usize = CLUSTER;
pub(super) const BLOCK: usize = 2 * CLUSTER;
pub(super) const L1: usize = 3 * CLUSTER;
pub(super) const L2: usize = 4 * CLUSTER;
pub(super) const DATA: usize = 5 * CLUSTER;
/// Offset of the snapshot table, in images that have one.
pub(super) const SNAPSHOTS: usize = 8 * CLUSTER;
const COPIED: u64 = 1 << 63;

pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    order: u32,
}

impl Image {
    /// A valid image: header, refcount table and block, L1 and L2 table, two data clusters, and a cluster with compressed data.
    pub(super) fn good(order: u32) -> Self {
        let mut image = Self { bytes: vec![0; 8 * CLUSTER], order };
        image.put(0, 0x5146_49fb_0000_0003);
        image.bytes[23] = 12;
        image.put(24, 1 << 20);
        image.bytes[39] = 1;
        image.put(40, offset(L1));
        image.put(48, offset(TABLE));
        image.bytes[59] = 1;
        image.bytes[99] = u8::try_from(order).unwrap();
        image.bytes[103] = 104;
        image.put(TABLE, offset(BLOCK));
        (0..8).for_each(|cluster| image.set_refcount(cluster, 1));
        image.put(L1, L1Entry::new(offset(L2)).0);
        image.put(L2, L2Entry::data(offset(DATA)).0);
        image.put(L2 + 8, L2Entry::data(offset(DATA + CLUSTER)).0);
        let geometry = Geometry {
            cluster_bits: 12,
            refcount_order: order,
            extended_l2: false,
            data_file: false,
        };
        let packed = L2Entry::compressed(geometry, offset(DATA + 2 * CLUSTER), 700).unwrap();
        image.put(L2 + 16, packed.0);
        image
    }

    /// Adds a snapshot with an empty L1 table.
    pub(super) fn with_snapshot(&mut self) {
        self.bytes.resize(SNAPSHOTS + 2 * CLUSTER, 0);
        (8..10).for_each(|cluster| self.set_refcount(cluster, 1));
        self.bytes[63] = 1;
        self.put(64, offset(SNAPSHOTS));
        self.put(SNAPSHOTS, offset(SNAPSHOTS + CLUSTER));
        self.put(SNAPSHOTS + 8, 1 << 32 | 1 << 16 | 4);
        self.put(SNAPSHOTS + 32, 16);
        self.put(SNAPSHOTS + 48, 1 << 20);
        self.put_snapshot_name(16);
    }

    /// Writes the id and the name of the snapshot behind `extra` bytes of extra data.
    pub(super) fn put_snapshot_name(&mut self, extra: usize) {
        let at = SNAPSHOTS + 40 + extra;
        self.bytes[at..at + 5].copy_from_slice(b"1name");
    }

    pub(super) fn put(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(super) fn can_count_to(&self, count: u64) -> bool {
        refcount_max(self.order) >= count
    }

    pub(super) fn set_refcount(&mut self, cluster: u64, value: u64) {
        refcount_set(&mut self.bytes[BLOCK..BLOCK + CLUSTER], cluster, self.order, value).unwrap();
    }

    fn check(&self) -> (CheckReport, Vec<String>) {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(scratch.path(), &self.bytes).unwrap();
        block_on(async {
            let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let name = scratch.path().to_str().unwrap();
            let node = graph.open_protocol(name, Options::new(), flags).await.unwrap();
            let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ);
            let edge = Attachment::new(&node, "the test", "file", permissions).unwrap();
            let head = edge.read(0, IoBufMut::new(CLUSTER)).await.unwrap();
            let header = Header::parse(&head, edge.size()).unwrap();
            let said = RefCell::new(Vec::new());
            let report_finding = |finding: Finding| said.borrow_mut().push(finding.text);
            let report = check(&edge, &header, Fix::Nothing, &report_finding).await.unwrap();
            drop(edge);
            graph.release(node).await.unwrap();
            (report, said.into_inner())
        })
    }

    /// Checks the valid image after `fault` has changed it.
    fn spoiled(fault: impl FnOnce(&mut Self)) -> (CheckReport, Vec<String>) {
        let mut image = Self::good(4);
        fault(&mut image);
        image.check()
    }
}

pub(super) fn offset(at: usize) -> u64 {
    u64::try_from(at).unwrap()
}

#[test]
fn a_good_image_has_no_errors_at_any_refcount_width() {
    for order in 0..=6 {
        let (report, said) = Image::good(order).check();
        assert_eq!(said, Vec::<String>::new(), "order {order}");
        let expected = CheckReport {
            image_end_offset: 8 * offset(CLUSTER),
            total_clusters: 256,
            allocated_clusters: 3,
            fragmented_clusters: 1,
            compressed_clusters: 1,
            ..CheckReport::default()
        };
        assert_eq!(report, expected, "order {order}");
    }
}

#[test]
fn a_refcount_that_is_too_high_is_a_leak_and_contradicts_the_copied_flag() {
    let (report, said) = Image::spoiled(|image| image.set_refcount(5, 2));
    assert_eq!((report.leaks, report.corruptions), (1, 1));
    let expected = [
        "Leaked cluster 5 refcount=2 reference=1",
        "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000005000 refcount=2",
    ];
    assert_eq!(said, expected);
}

#[test]
fn a_refcount_that_is_too_low_is_a_corruption() {
    let (report, said) = Image::spoiled(|image| image.set_refcount(7, 0));
    assert_eq!((report.leaks, report.corruptions), (0, 1));
    assert_eq!(said, ["ERROR cluster 7 refcount=0 reference=1"]);
}

#[test]
fn entries_of_a_table_with_several_references_count_several_times() {
    let (report, said) = Image::spoiled(|image| {
        image.bytes[39] = 3;
        image.put(L1 + 8, L1Entry::new(offset(L2)).0);
        image.put(L1 + 16, L1Entry::new(offset(L2)).0);
        (4..8).for_each(|cluster| image.set_refcount(cluster, 3));
    });
    // The refcounts are correct. The copied flags of the entries are wrong.
    assert_eq!(report.leaks, 0);
    let tables =
        said.iter().filter(|line| line.starts_with("ERROR OFLAG_COPIED L2 cluster")).count();
    let data =
        said.iter().filter(|line| line.starts_with("ERROR OFLAG_COPIED data cluster")).count();
    assert_eq!((tables, data, said.len()), (3, 2, 5));
}

#[test]
fn references_past_the_end_of_the_file_are_reported_and_not_counted() {
    let (report, said) = Image::spoiled(|image| image.put(L2, L2Entry::data(1 << 50).0));
    assert_eq!(report.leaks, 1);
    assert_eq!(
        said[0],
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
         offset 0x4000000000000 size 0x1000"
    );
}

#[test]
fn each_kind_of_broken_entry_has_its_own_message() {
    let first = |fault: fn(&mut Image)| Image::spoiled(fault).1.into_iter().next().unwrap();
    assert_eq!(
        first(|image| image.put(L2, COPIED | 0x5002)),
        "ERROR found l2 entry with reserved bits set: 8000000000005002"
    );
    assert_eq!(
        first(|image| image.put(L2, COPIED | 0x5200)),
        "ERROR offset=5200: Data cluster is not properly aligned; L2 entry corrupted."
    );
    assert_eq!(
        first(|image| image.put(L1, COPIED | 0x4001)),
        "ERROR found L1 entry with reserved bits set: 8000000000004001"
    );
    assert_eq!(
        first(|image| image.put(L1, COPIED | 0x4200)),
        "ERROR l2_offset=4200: Table is not cluster aligned; L1 entry corrupted"
    );
    assert_eq!(
        first(|image| image.put(TABLE, 0x2001)),
        "ERROR refcount table entry 0 has reserved bits set"
    );
    assert_eq!(
        first(|image| image.put(TABLE + 8, 1 << 40)),
        "ERROR refcount block 1 is outside image"
    );
}

#[test]
fn unreadable_refcounts_count_as_check_errors() {
    let (report, said) = Image::spoiled(|image| image.put(TABLE, offset(BLOCK) | 0x200));
    assert_eq!((report.corruptions, report.check_errors), (1, 8));
    assert_eq!(said.last().unwrap(), "Can't get refcount for cluster 7: Input/output error");
}

#[test]
fn a_refcount_block_that_two_table_entries_share_is_reported() {
    let (_, said) = Image::spoiled(|image| image.put(TABLE + 8, offset(BLOCK)));
    assert_eq!(
        said,
        ["ERROR refcount block 1 refcount=2", "ERROR cluster 2 refcount=1 reference=2"]
    );
}
