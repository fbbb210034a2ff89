//! An image on storage that cannot grow, such as a block device.

use std::sync::Arc;

use oxblk_core::{
    Backend, DriverTable, Errno, Graph, OpenFlags, Options, Perm, Permissions, WriteFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk};
use oxblk_tests::sim_disk::{self, Pace, Part, SimFactory};
use oxblk_tests::sim_image;

static DRIVERS: DriverTable = &[QCOW2, &SimFactory];

const CLUSTER: u64 = 4096;
/// The size of the storage, in bytes. The guest disk is larger.
const STORAGE: u64 = 1 << 20;

async fn open(disk: &Disk) -> Backend {
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let part = (disk, Part::First(STORAGE));
    graph
        .keep_open(sim_disk::add_part(&graph, "disk", part, false, Pace::AtOnce).unwrap())
        .unwrap();
    let options = Options::from_dotted("driver=qcow2,file=disk", None).unwrap();
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let node = graph.open(options, flags).await.unwrap();
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap()
}

async fn write(image: &Backend, cluster: u64) -> Result<(), i32> {
    let data = IoBuf::from(vec![7; usize::try_from(CLUSTER).unwrap()]);
    let written = image.write(cluster * CLUSTER, data, WriteFlags::empty()).await;
    written.map_err(|error| error.raw_errno())
}

/// Writes clusters from `first` on until the storage is full. Returns the number of clusters that were written.
async fn fill(image: &Backend, first: u64) -> u64 {
    for cluster in first.. {
        match write(image, cluster).await {
            Ok(()) => {}
            Err(errno) => {
                assert_eq!(errno, Errno::NOSPC);
                return cluster - first;
            }
        }
    }
    0
}

fn new_image() -> Disk {
    let mut bytes = sim_image::new(1, "cluster_size=4k", 8 << 20).bytes();
    bytes.resize(usize::try_from(STORAGE).unwrap(), 0);
    Disk::from_bytes(1, &bytes)
}

#[test]
fn discarded_space_is_reused_on_full_storage_without_a_flush() {
    sim::run(1, async {
        let disk = new_image();
        let image = open(&disk).await;
        let filled = fill(&image, 0).await;
        assert!(filled > STORAGE / CLUSTER * 9 / 10, "only {filled} clusters fit");
        let half = filled / 2;
        image.discard(0, half * CLUSTER).await.unwrap();
        for cluster in 0..half {
            assert_eq!(
                write(&image, filled + cluster).await,
                Ok(()),
                "cluster {cluster} of {half}"
            );
        }
        image.close().await.unwrap();
        sim_image::assert_sound(&disk, false, "closed").await;
    });
}

#[test]
fn discarded_space_is_reused_after_a_full_image_was_opened_again() {
    sim::run(1, async {
        let disk = new_image();
        let image = open(&disk).await;
        let filled = fill(&image, 0).await;
        image.close().await.unwrap();
        let image = open(&disk).await;
        // Discard every second cluster, so that no two freed clusters are adjacent.
        for cluster in (0..filled).step_by(2) {
            image.discard(cluster * CLUSTER, CLUSTER).await.unwrap();
        }
        let freed = filled.div_ceil(2);
        for cluster in 0..freed {
            assert_eq!(
                write(&image, filled + cluster).await,
                Ok(()),
                "cluster {cluster} of {freed}"
            );
        }
        image.close().await.unwrap();
        sim_image::assert_sound(&disk, false, "closed").await;
    });
}
