//! Images in which a few tables contain a very large number of references to one cluster, and an image with a very long sparse
//! file. The work and the memory that an operation needs must stay bounded.

use std::fs;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{OpenFlags, Preallocation};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::hostile::bounded;
use oxblk_tests::sim_image::{self, assert_sound};

/// An image that a test builds from bytes. Cluster 0 contains the header, cluster 1 the refcount table, and cluster 2 a
/// refcount block with refcounts of 64 bits.
struct Crafted {
    bytes: Vec<u8>,
    cluster: u64,
}

/// The index of the first cluster after the refcount table and the refcount block.
const FREE: u64 = 3;

impl Crafted {
    /// An image of `clusters` clusters of 2^`bits` bytes, with a disk of `size` bytes.
    fn new(bits: u32, clusters: u64, size: u64) -> Self {
        let cluster = 1 << bits;
        let len = usize::try_from(clusters * cluster).expect("a length");
        let mut image = Self { bytes: vec![0; len], cluster };
        image.bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        image.put(20, bits);
        image.put_word(24, size);
        image.put_word(48, cluster);
        image.put(56, 1);
        image.put(96, 6);
        image.put(100, 104);
        image.put_word(cluster, 2 * cluster);
        (0..FREE).for_each(|cluster| image.refer(cluster, 1));
        image
    }

    fn put(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    fn put_word(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).expect("an offset");
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// Sets the refcount of a cluster.
    fn refer(&mut self, cluster: u64, refcount: u64) {
        self.put_word(2 * self.cluster + 8 * cluster, refcount);
    }

    /// Fills the start of a cluster, and the following clusters if necessary, with `count` copies of `word`.
    fn fill(&mut self, cluster: u64, count: u64, word: u64) {
        (0..count).for_each(|index| self.put_word(cluster * self.cluster + 8 * index, word));
    }

    /// Makes an L1 table in the clusters from `cluster` on. All of its entries refer to the L2 table in the cluster `table`; if
    /// `table` is 0, the entries are unallocated.
    fn name_l1(&mut self, cluster: u64, entries: u32, table: u64) {
        self.put(36, entries);
        self.put_word(40, cluster * self.cluster);
        self.fill(cluster, entries.into(), table * self.cluster);
        let end = cluster + (u64::from(entries) * 8).div_ceil(self.cluster);
        (cluster..end).for_each(|cluster| self.refer(cluster, 1));
    }
}

#[test]
fn a_cluster_with_half_a_billion_references_moves_in_bounded_memory() {
    const ENTRIES: u32 = 1 << 20;
    const TIMES: u64 = 512;
    let table = FREE + 128;
    let data = table + 20;
    let mut image = Crafted::new(16, data + 1, 65_536);
    image.name_l1(FREE, ENTRIES, table);
    image.fill(table, TIMES, data * image.cluster);
    image.refer(table, ENTRIES.into());
    image.refer(data, u64::from(ENTRIES) * TIMES);
    let scratch = tempfile::tempdir().expect("a scratch directory");
    fs::write(scratch.path().join("image"), &image.bytes).expect("the image");
    for (command, text) in
        [("check", "No errors"), ("compact", "moved: 64 KiB"), ("check", "No errors")]
    {
        let reply = bounded(scratch.path(), &["img", command, "image"]);
        assert_eq!(reply.code(), 0, "{command}: {}{}", reply.out(), reply.err());
        assert!(reply.out().contains(text), "{command}: {}", reply.out());
    }
}

/// Fails every read of the disk from the `most`-th on.
fn limit_reads(disk: &Disk, most: u64) {
    let range = None;
    let fail = vec![FailRule { op: FaultOp::Read, nth: Some(most), range, errno: 5, once: false }];
    disk.set_faults(Faults { fail, ..Faults::default() });
}

/// An image with many L1 entries. All L1 entries refer to one L2 table, and the first 8 entries of this table refer to one
/// cluster.
fn one_table_for_all(entries: u32) -> Crafted {
    let table = FREE + (u64::from(entries) * 8).div_ceil(4096);
    let mut image = Crafted::new(12, table + 2, u64::from(entries) << 21);
    image.name_l1(FREE, entries, table);
    image.fill(table, 8, (table + 1) * image.cluster);
    image.refer(table, entries.into());
    image.refer(table + 1, u64::from(entries) * 8);
    image
}

#[test]
fn an_l2_table_to_which_many_entries_refer_is_read_once() {
    let image = one_table_for_all(20_000);
    let disk = Disk::from_bytes(1, &image.bytes);
    limit_reads(&disk, 300);
    sim::run(1, async {
        assert_sound(&disk, false, "before").await;
        let open = || async { sim_image::open(&disk, false).await.expect("an image") };
        let image = open().await;
        image.create_snapshot(&SnapshotInfo::default()).await.expect("a snapshot");
        image.close().await.expect("a close");
        assert_sound(&disk, false, "with a snapshot").await;
        let image = open().await;
        image.apply_snapshot("1").await.expect("the snapshot");
        image.delete_snapshot("1").await.expect("the snapshot");
        image.close().await.expect("a close");
        assert_sound(&disk, false, "without the snapshot").await;
        let image = open().await;
        image.resize(1 << 22, Preallocation::Off).await.expect("a smaller disk");
        image.close().await.expect("a close");
        assert_sound(&disk, false, "smaller").await;
    });
}

/// An image with `count` snapshots. The L1 tables of all snapshots begin at the same offset. Each L1 table has one entry less
/// than the L1 table of the previous snapshot. All entries refer to the same L2 table.
fn stacked_snapshots(count: u32) -> Crafted {
    const ENTRIES: u32 = 4096;
    let l1 = FREE + 1;
    let (list, table) = (l1 + 8, l1 + 8 + u64::from(count).div_ceil(64));
    let mut image = Crafted::new(12, table + 1, 1 << 21);
    image.name_l1(FREE, 1, 0);
    image.refer(table, u64::from(count) * u64::from(ENTRIES) - u64::from(count * (count - 1) / 2));
    image.fill(l1, ENTRIES.into(), table * image.cluster);
    image.put(60, count);
    image.put_word(64, list * image.cluster);
    (list..table).for_each(|cluster| image.refer(cluster, 1));
    for number in 0..count {
        let at = list * image.cluster + 64 * u64::from(number);
        image.put_word(at, l1 * image.cluster);
        let offset = usize::try_from(at).expect("an offset");
        image.put(offset + 8, ENTRIES - number);
        // The entry has an identifier of 4 bytes, no name, and 16 bytes of extra data.
        image.put(offset + 12, 4 << 16);
        image.put(offset + 36, 16);
        image.put_word(at + 48, 1 << 21);
        let digits = format!("{:04}", number + 1);
        image.bytes[offset + 56..offset + 60].copy_from_slice(digits.as_bytes());
    }
    for cluster in 0..8 {
        let first_absent = (cluster + 1) * 512;
        let users = (0..count).filter(|number| u64::from(ENTRIES - number) > first_absent - 512);
        image.refer(l1 + cluster, u64::try_from(users.count()).expect("a number"));
    }
    image
}

#[test]
fn overlapping_l1_tables_of_snapshots_are_read_once() {
    let image = stacked_snapshots(400);
    let disk = Disk::from_bytes(1, &image.bytes);
    limit_reads(&disk, 900);
    sim::run(1, async {
        assert_sound(&disk, false, "before").await;
        let options = "driver=qcow2,overlap-check=all";
        let opened = sim_image::open_with(options, &disk, OpenFlags::default()).await;
        let image = opened.expect("an image");
        image.close().await.expect("a close");
    });
}

#[test]
fn a_refcount_table_that_would_be_too_large_is_refused_before_clusters_are_allocated() {
    let mut image = Crafted::new(9, 8, 512);
    image.name_l1(FREE, 1, 0);
    // The second entry of the refcount table is invalid, so the repair must rebuild the refcounts. The check cannot know all
    // references: the header has no bitmaps extension, but an autoclear bit says that the image has bitmaps.
    image.put_word(88, 1);
    image.put_word(512 + 8, 513);
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    fs::write(&path, &image.bytes).expect("the image");
    let file = fs::File::options().write(true).open(&path).expect("the image");
    file.set_len(8 << 40).expect("a sparse file");
    let reply = bounded(scratch.path(), &["img", "check", "-r", "all", "image"]);
    let output = reply.out() + &reply.err();
    assert!(output.contains("would be too large"), "{output}");
}

#[test]
fn a_rebuild_that_needs_a_refcount_table_of_too_many_entries_leaks_nothing() {
    // The refcounts of this many clusters need a refcount table of the largest size.
    const MOST: u64 = (8 << 20) / 8 * 64;
    let mut image = Crafted::new(9, 8, 512);
    image.name_l1(FREE, 1, FREE + 1);
    image.refer(FREE + 1, 1);
    // The last cluster of the file has no refcount block. The new table would be placed behind it.
    image.put_word((FREE + 1) * 512, 1 << 63 | (MOST - 1) << 9);
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    fs::write(&path, &image.bytes).expect("the image");
    let file = fs::File::options().write(true).open(&path).expect("the image");
    file.set_len(MOST << 9).expect("a sparse file");
    let reply = bounded(scratch.path(), &["img", "check", "-r", "all", "image"]);
    let told = reply.out() + &reply.err();
    assert!(told.contains("would be too large"), "{told}");
    assert!(!told.contains("Repairing cluster"), "{told}");
    let left = bounded(scratch.path(), &["img", "check", "image"]);
    assert!(!left.err().contains("Leaked") && !left.out().contains("Leaked"), "{}", left.out());
}

#[test]
fn a_luks_header_that_seems_very_long_does_not_prolong_a_repair() {
    let luks = FREE + 1;
    for length in [1 << 20, 1 << 42, 1 << 48, 1 << 62, u64::MAX] {
        let mut image = Crafted::new(9, luks + 2, 512);
        image.name_l1(FREE, 1, 0);
        // The encryption method is LUKS, and the header extension contains the offset and the length of the LUKS header.
        image.put(32, 2);
        image.put_word(104, 0x0537_be77_0000_0010);
        image.put_word(112, luks * image.cluster);
        image.put_word(120, length);
        image.put_word(luks * image.cluster, 0x4c55_4b53_babe_0001);
        // Without a refcount block, the refcounts are rebuilt. The snapshot table has an entry without extra data.
        image.put_word(image.cluster, 0);
        image.put(60, 1);
        image.put_word(64, (luks + 1) * image.cluster);
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let path = scratch.path().join("image");
        fs::write(&path, &image.bytes).expect("the image");
        let reply = bounded(scratch.path(), &["img", "check", "-r", "all", "image"]);
        let told = reply.out() + &reply.err();
        assert!(told.contains("Rebuilding refcount structure"), "{length:#x}: {told}");
        let len = fs::metadata(&path).expect("the image").len();
        assert!(len < 1 << 28, "{length:#x}: the file has {len} bytes");
    }
}

#[test]
fn l2_tables_on_each_other_are_repaired_in_bounded_memory() {
    const ENTRIES: u32 = 4096;
    let table = FREE + 1;
    let mut image = Crafted::new(16, table + 33, u64::from(ENTRIES) << 29);
    image.name_l1(FREE, ENTRIES, 0);
    for index in 0..u64::from(ENTRIES) {
        let entry = 1 << 63 | (table * image.cluster + 512 * index);
        image.put_word(FREE * image.cluster + 8 * index, entry);
    }
    // The tables contain zero clusters whose host offset is not aligned. The image is marked dirty (incompatible feature bit
    // 0).
    image.fill(table, 33 * 8192, 0x201);
    image.put(76, 1);
    let scratch = tempfile::tempdir().expect("a scratch directory");
    fs::write(scratch.path().join("image"), &image.bytes).expect("the image");
    let reply = bounded(scratch.path(), &["io", "-c", "read 0 512", "image"]);
    assert_eq!(reply.code(), 1, "{}", reply.out());
    assert!(reply.err().contains("Could not repair dirty image"), "{}", reply.err());
}

#[test]
fn a_shared_l1_table_is_not_read_once_for_each_of_its_clusters() {
    const ENTRIES: u32 = 100 * 512;
    let table = FREE + 101;
    let mut image = Crafted::new(12, table + 1, u64::from(ENTRIES) << 21);
    image.name_l1(FREE, ENTRIES, table);
    // Add a snapshot that shares the active L1 table. The snapshot has an id of one byte and 16 bytes of extra data.
    let list = (FREE + 100) * image.cluster;
    image.put(60, 1);
    image.put_word(64, list);
    image.put_word(list, FREE * image.cluster);
    image.put_word(list + 8, u64::from(ENTRIES) << 32 | 1 << 16);
    image.put_word(list + 32, 16);
    image.put_word(list + 48, u64::from(ENTRIES) << 21);
    image.put_word(list + 56, u64::from(b'1') << 56);
    (FREE..FREE + 100).for_each(|cluster| image.refer(cluster, 2));
    image.refer(FREE + 100, 1);
    image.refer(table, 2 * u64::from(ENTRIES));
    image.put(76, 1);
    let disk = Disk::from_bytes(1, &image.bytes);
    limit_reads(&disk, 60);
    sim::run(1, async {
        // The open repairs the image.
        let image = sim_image::open(&disk, false).await.expect("an image");
        image.close().await.expect("a close");
    });
}
