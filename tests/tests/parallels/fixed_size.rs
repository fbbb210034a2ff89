//! An image on storage that cannot grow, such as a block device.

use std::sync::Arc;

use oxblk_core::{
    Backend, DriverTable, Errno, Graph, OpenFlags, Options, Perm, Permissions, WriteFlags,
};
use oxblk_formats::parallels::PARALLELS;
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk};
use oxblk_tests::program::Program;
use oxblk_tests::sim_disk::{self, Pace, Part, SimFactory};
use oxblk_tests::sim_image::check_sound;

static DRIVERS: DriverTable = &[PARALLELS, &SimFactory];

const CLUSTER: u64 = 64 << 10;

async fn open(disk: &Disk, storage: u64) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let part = (disk, Part::First(storage));
    graph
        .keep_open(sim_disk::add_part(&graph, "disk", part, false, Pace::AtOnce).unwrap())
        .unwrap();
    let options = Options::from_dotted("driver=parallels,file=disk", None).unwrap();
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let node = graph.open(options, flags).await.unwrap();
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap()
}

async fn write(image: &Backend, cluster: u64) -> Result<(), i32> {
    let data = IoBuf::from(vec![7; 512]);
    let written = image.write(cluster * CLUSTER, data, WriteFlags::empty()).await;
    written.map_err(|error| error.raw_errno())
}

/// Writes clusters from `first` on until the storage is full. Returns the number of clusters that were written.
async fn fill(image: &Backend, first: u64) -> u64 {
    for cluster in first.. {
        if let Err(errno) = write(image, cluster).await {
            assert_eq!(errno, Errno::NOSPC);
            return cluster - first;
        }
    }
    0
}

/// An empty image on storage of this size in bytes.
fn new_image(storage: u64) -> Disk {
    let scratch = tempfile::tempdir().unwrap();
    let create = ["create", "-q", "-f", "parallels", "-o", "cluster_size=64k", "image", "64M"];
    Program::new("qemu-img").args(create).directory(scratch.path()).succeed();
    let mut bytes = std::fs::read(scratch.path().join("image")).unwrap();
    bytes.resize(usize::try_from(storage).unwrap(), 0);
    Disk::from_bytes(1, &bytes)
}

#[test]
fn a_few_discarded_clusters_are_reused_on_full_storage_without_a_flush() {
    sim::run(1, async {
        let storage = 2 << 20;
        let disk = new_image(storage);
        let image = open(&disk, storage).await;
        let filled = fill(&image, 0).await;
        assert!(filled > storage / CLUSTER * 9 / 10, "only {filled} clusters fit");
        for round in 0..3 {
            image.discard(round * 4 * CLUSTER, 4 * CLUSTER).await.unwrap();
            let reused = fill(&image, filled + round * 4).await;
            assert_eq!(reused, 4, "round {round}");
        }
        image.close().await.unwrap();
        let image = open(&disk, storage).await;
        // The check reports the unused end of the storage as leaked.
        check_sound(&image, true, "closed").await;
        image.close().await.unwrap();
    });
}

#[test]
fn clusters_that_were_discarded_before_the_storage_became_full_are_reused() {
    sim::run(1, async {
        let storage = 20 << 20;
        let disk = new_image(storage);
        let image = open(&disk, storage).await;
        for cluster in 0..8 {
            write(&image, cluster).await.unwrap();
        }
        image.discard(0, 8 * CLUSTER).await.unwrap();
        let clusters = (storage - CLUSTER) / CLUSTER;
        let filled = fill(&image, 8).await;
        assert!(filled >= clusters, "only {filled} of {clusters} clusters are used");
        image.close().await.unwrap();
        let image = open(&disk, storage).await;
        // The check reports the unused end of the storage as leaked.
        check_sound(&image, true, "closed").await;
        image.close().await.unwrap();
    });
}
