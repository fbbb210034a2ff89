//! Copy-on-read through a filter while another user of the image writes to it.

use std::time::Duration;

use oxblk_core::{Backend, OpenFlags, Options, WriteFlags};
use oxblk_ring::sim::{self, Disk, Faults};
use oxblk_ring::{IoBuf, IoBufMut, spawn};
use oxblk_tests::formats::named;
use oxblk_tests::model::chain::{self, Image, Tolerance};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 24;

async fn write(disk: &Backend, offset: u64, byte: u8, len: u64) {
    let len = usize::try_from(len).expect("a length");
    let data = IoBuf::from(vec![byte; len]);
    disk.write(offset, data, WriteFlags::empty()).await.expect("a write");
}

async fn read(disk: &Backend, offset: u64, len: u64) -> IoBufMut {
    let len = usize::try_from(len).expect("a length");
    disk.read(offset, IoBufMut::zeroed(len)).await.expect("a read")
}

/// A base with data, and an empty overlay. Their disks have a latency.
async fn images() -> Vec<Image> {
    let mut images = Vec::new();
    for seed in [1, 2] {
        let image = Image { variant: named("qcow2-4k")[0], disk: Disk::new(seed, 0) };
        chain::create(&image, CLUSTERS * CLUSTER).await.expect("an image");
        images.push(image);
    }
    let base = chain::open(&images[..1]).await.expect("the base opens");
    write(&base, 0, 1, CLUSTERS * CLUSTER).await;
    chain::close(base).await.expect("it closes");
    for image in &images {
        let delay = Duration::from_micros(50)..Duration::from_millis(1);
        image.disk.set_faults(Faults { delay, ..Faults::default() });
    }
    images
}

#[test]
fn a_copy_never_replaces_the_data_of_another_user() {
    for seed in 1..=8 {
        sim::run(seed, async move {
            let images = images().await;
            let direct = chain::open(&images).await.expect("it opens");
            let text = "driver=copy-on-read,file=image1";
            let options = Options::from_dotted(text, None).expect("options");
            let graph = direct.graph().clone();
            let opened = graph.open_backend(None, options, OpenFlags::default()).await;
            let copying = opened.expect("the filter opens");
            let tasks: Vec<_> = (0..CLUSTERS)
                .map(|cluster| {
                    let (direct, copying) = (direct.clone(), copying.clone());
                    spawn(async move {
                        let offset = cluster * CLUSTER;
                        let reads = spawn(async move {
                            let data = read(&copying, offset, CLUSTER).await;
                            assert!(data.iter().all(|byte| *byte == 1 || *byte == 2));
                        });
                        oxblk_ring::sleep(Duration::from_micros(cluster * 100)).await;
                        write(&direct, offset + 512, 2, 512).await;
                        reads.await;
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            for cluster in 0..CLUSTERS {
                let data = read(&direct, cluster * CLUSTER, CLUSTER).await;
                let written = data.get(512..1024).expect("a sector");
                assert!(written.iter().all(|byte| *byte == 2), "seed {seed}, cluster {cluster}");
                assert_eq!(data.iter().filter(|byte| **byte == 1).count(), 4096 - 512);
            }
            copying.close().await.expect("it closes");
            chain::close(direct).await.expect("it closes");
            chain::check(&images[1], Tolerance::Clean).await.expect("no fault");
        });
    }
}
