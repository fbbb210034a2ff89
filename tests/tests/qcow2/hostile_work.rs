//! Images in which few bytes stand for very many references: the work and the memory of every operation are bounded by
//! the size of the file.

use std::fs;

use oxblk_tests::hostile::bounded;

/// An image that is written byte by byte. Cluster 0 holds the header, cluster 1 the refcount table, cluster 2 a refcount
/// block with refcounts of 64 bits.
struct Crafted {
    bytes: Vec<u8>,
    cluster: u64,
}

/// The first cluster behind the refcount structures.
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

    /// Sets a refcount.
    fn refer(&mut self, cluster: u64, refcount: u64) {
        self.put_word(2 * self.cluster + 8 * cluster, refcount);
    }

    /// Fills `count` words from a cluster on.
    fn fill(&mut self, cluster: u64, count: u64, word: u64) {
        (0..count).for_each(|index| self.put_word(cluster * self.cluster + 8 * index, word));
    }

    /// Makes an L1 table whose entries all name the L2 table in one cluster.
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
