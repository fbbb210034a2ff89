//! Single reads with copy-on-read, and prefetches.

use oxblk_core::{ErrorKind, ReadFlags, StatusFlags, Want};

use super::*;

/// An empty image above a base that has the byte 5 in its first half and ends there.
async fn overlay(disk: &Disk, base: &Disk) -> Backend {
    create(disk).await;
    let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
    let _file = file(&graph, disk);
    let below = FileDriver::from_ring_file(File::sim(base), base.len());
    let _base = graph.add_node(Some("base"), &FILE, Box::new(below), OpenFlags::default()).unwrap();
    let options = options("driver=qcow2,file=file,backing=base");
    graph.open_backend(None, options, OpenFlags::default()).await.unwrap()
}

/// Whether the image itself has the cluster.
async fn has(image: &Backend, cluster: u64) -> bool {
    let node = image.node().unwrap();
    let edge = Attachment::new(&node, "test", "root", Permissions::NONE).unwrap();
    let status = edge.block_status(cluster * CLUSTER as u64, 1, Want::Allocation).await.unwrap();
    status.flags.contains(StatusFlags::ALLOCATED)
}

#[test]
fn a_read_with_the_flag_copies_what_it_reads_and_other_reads_do_not() {
    let (disk, base) = (Disk::new(1, 0), Disk::from_bytes(2, &[5; 8 * CLUSTER]));
    sim::run(1, async {
        let image = overlay(&disk, &base).await;
        let at = 2 * CLUSTER as u64 + 100;
        let read = image.read_with(at, IoBufMut::new(CLUSTER), ReadFlags::empty()).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 5) && !has(&image, 2).await);
        let flags = ReadFlags::COPY_ON_READ;
        let read = image.read_with(at, IoBufMut::new(CLUSTER), flags).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 5));
        let copied = [has(&image, 1).await, has(&image, 2).await, has(&image, 3).await];
        assert_eq!((copied, has(&image, 4).await), ([false, true, true], false));
        // Nothing is stored past the end of the base.
        let tail = image.read_with(8 * CLUSTER as u64, IoBufMut::new(CLUSTER), flags).await;
        assert!(tail.unwrap().iter().all(|byte| *byte == 0) && !has(&image, 8).await);
        image.close().await.unwrap();
    });
}

#[test]
fn a_prefetch_copies_its_range_and_reports_errors_of_the_base() {
    let (disk, base) = (Disk::new(1, 0), Disk::from_bytes(2, &[5; 8 * CLUSTER]));
    sim::run(1, async {
        let image = overlay(&disk, &base).await;
        write(&image, 1, 9).await;
        image.prefetch(0, 3 * CLUSTER as u64).await.unwrap();
        assert!(has(&image, 0).await && has(&image, 2).await && !has(&image, 3).await);
        let bytes = (byte(&image, 0).await, byte(&image, 1).await, byte(&image, 2).await);
        assert_eq!(bytes, (5, 9, 5));
        base.set_faults(bad_sectors(4 * CLUSTER as u64..4 * CLUSTER as u64 + 512));
        let failed = image.prefetch(0, SIZE).await.unwrap_err();
        assert_eq!(failed.raw_errno(), Errno::IO);
        base.set_faults(Faults::default());
        image.prefetch(0, SIZE).await.unwrap();
        assert!(has(&image, 7).await && !has(&image, 8).await);
        let outside = image.prefetch(SIZE, 1).await.unwrap_err();
        assert_eq!(outside.kind(), ErrorKind::OutOfRange);
        image.close().await.unwrap();
    });
}

#[test]
fn copies_of_single_reads_never_replace_newer_data() {
    for seed in 0..40 {
        let (disk, base) = (Disk::new(seed, 0), Disk::from_bytes(2, &[5; 16 * CLUSTER]));
        sim::run(seed, async {
            let image = overlay(&disk, &base).await;
            let keeps_tracking = seed % 2 == 0;
            let tracking = match keeps_tracking {
                true => Some(image.track_requests().await.unwrap()),
                false => None,
            };
            let mut tasks = Vec::new();
            for cluster in 0..16_u64 {
                let (writer, reader) = (image.clone(), image.clone());
                tasks.push(oxblk_ring::spawn(async move {
                    for byte in 10..14 {
                        let part = IoBufMut::filled(CLUSTER / 2, byte).freeze();
                        let at = cluster * CLUSTER as u64 + 512;
                        writer.write(at, part, WriteFlags::empty()).await.unwrap();
                        let read = writer.read(at, IoBufMut::new(CLUSTER / 2)).await.unwrap();
                        assert!(read.iter().all(|found| *found == byte), "seed {seed}");
                    }
                }));
                tasks.push(oxblk_ring::spawn(async move {
                    let at = cluster * CLUSTER as u64;
                    match cluster % 2 {
                        0 => reader.prefetch(at, CLUSTER as u64).await.unwrap(),
                        _ => {
                            let buf = IoBufMut::new(CLUSTER);
                            let read = reader.read_with(at, buf, ReadFlags::COPY_ON_READ).await;
                            assert_eq!(read.unwrap()[0], 5);
                        }
                    }
                }));
            }
            for task in tasks {
                task.await;
            }
            drop(tracking);
            for cluster in 0..16 {
                assert!(has(&image, cluster).await);
                let at = cluster * CLUSTER as u64;
                let read = image.read(at, IoBufMut::new(CLUSTER)).await.unwrap();
                let (head, rest) = read.split_at(512);
                let (middle, tail) = rest.split_at(CLUSTER / 2);
                assert!(middle.iter().all(|byte| *byte == 13), "seed {seed}");
                assert!(head.iter().chain(tail).all(|byte| *byte == 5), "seed {seed}");
            }
            image.close().await.unwrap();
        });
        sim::run(seed, assert_sound(&disk, false, "after copies"));
    }
}

#[test]
fn a_copy_needs_the_permission_to_write_unchanged_data() {
    let (disk, base) = (Disk::new(1, 0), Disk::from_bytes(2, &[5; 8 * CLUSTER]));
    sim::run(1, async {
        let image = overlay(&disk, &base).await;
        let node = image.node().unwrap();
        let graph = image.graph().clone();
        for (perm, outcome) in [
            (Perm::CONSISTENT_READ, Err(ErrorKind::Denied)),
            (Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED, Ok(())),
        ] {
            let user =
                Backend::new(&graph, "user", node.clone(), Permissions::sharing_all(perm)).unwrap();
            let copied = user.prefetch(0, CLUSTER as u64).await;
            assert_eq!(copied.map_err(|error| error.kind()), outcome);
            user.close().await.unwrap();
        }
        image.close().await.unwrap();
    });
}
