//! Transfers between files and memory that others may change.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::common::{graph, open_file, pattern, read, write};
use oxblk_core::{Backend, OpenFlags, Perm, Permissions, WriteFlags};
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::{File, ForeignOwner, ForeignVec, ForeignVecMut, block_on, sim, spawn, yield_now};
use sim::Faults;

type Words = Arc<Vec<AtomicU64>>;

/// Memory of `bytes` bytes whose start is aligned to 512 bytes, with the offset of this start.
fn words(bytes: usize) -> (Words, usize) {
    let words: Words = Arc::new((0..bytes / 8 + 64).map(|_| AtomicU64::new(0)).collect());
    let base = words.as_ptr().addr();
    let start = base.next_multiple_of(512) - base;
    (words, start)
}

fn ranges(words: &Words, ranges: &[(usize, usize)]) -> Vec<(*mut u8, usize)> {
    assert!(ranges.iter().all(|(at, len)| at + len <= words.len() * 8));
    let base = words.as_ptr().cast::<u8>().cast_mut();
    ranges.iter().map(|(at, len)| (base.wrapping_add(*at), *len)).collect()
}

fn target(words: &Words, parts: &[(usize, usize)]) -> ForeignVecMut {
    // SAFETY: the ranges lie in the words, which the owner keeps and which are atomics.
    unsafe { ForeignVecMut::new(Arc::clone(words) as ForeignOwner, ranges(words, parts)) }
}

fn source(words: &Words, parts: &[(usize, usize)]) -> ForeignVec {
    let ranges = ranges(words, parts).into_iter().map(|(base, len)| (base.cast_const(), len));
    // SAFETY: as above.
    unsafe { ForeignVec::new(Arc::clone(words) as ForeignOwner, ranges) }
}

#[test]
fn the_host_scatters_and_gathers_aligned_and_misaligned_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for (direct, aio) in [("off", "threads"), ("off", "io_uring"), ("on", "io_uring")] {
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        block_on(async {
            let options = format!(",cache.direct={direct},aio={aio}");
            // Not every file system supports direct I/O.
            let Ok(disk) = open_file(&path, &options).await else { return };
            let (words, start) = words(16384);
            for (offset, parts) in [
                (4096, vec![(start, 4096), (start + 8192, 4096)]),
                (8192, vec![(start + 512, 512), (start, 512), (start + 4096, 1024)]),
                (700, vec![(start + 3, 1000), (start + 2001, 77), (start + 5000, 3)]),
                (0, vec![(start + 1, 4096)]),
            ] {
                let data = pattern(parts.iter().map(|(_, len)| len).sum(), 7);
                target(&words, &parts).copy_from(&data);
                let flags = if offset == 0 { WriteFlags::FUA } else { WriteFlags::empty() };
                disk.write_from(offset, source(&words, &parts), flags).await.unwrap();
                assert!(read(&disk, offset, data.len()).await == data);
                target(&words, &parts).zero();
                disk.read_into(offset, target(&words, &parts)).await.unwrap();
                assert!(*source(&words, &parts).to_buf() == *data);
            }
            disk.flush().await.unwrap();
            disk.close().await.unwrap();
            assert_eq!(Arc::strong_count(&words), 1);
        });
    }
}

fn simulated(disk: &sim::Disk, alignment: u32) -> Backend {
    let graph = graph();
    let driver = FileDriver::from_ring_file(File::sim(disk), disk.len()).with_alignment(alignment);
    let node = graph.add_node(None, &FILE, Box::new(driver), OpenFlags::default()).unwrap();
    let taken = Perm::CONSISTENT_READ | Perm::WRITE;
    Backend::new(&graph, "", node, Permissions::sharing_all(taken)).unwrap()
}

#[test]
fn short_transfers_are_completed() {
    for seed in 0..40 {
        let disk = sim::Disk::new(seed, 1 << 20);
        disk.set_faults(Faults { short_reads: 0.5, short_writes: 0.5, ..Faults::default() });
        sim::run(seed, async {
            let backend = simulated(&disk, if seed % 2 == 0 { 1 } else { 512 });
            let (words, start) = words(65536);
            let parts = [(start, 20480), (start + 32768, 4096)];
            let data = pattern(24576, 3);
            target(&words, &parts).copy_from(&data);
            let flags = WriteFlags::empty();
            backend.write_from(8192, source(&words, &parts), flags).await.unwrap();
            assert!(read(&backend, 8192, data.len()).await == data);
            target(&words, &parts).zero();
            backend.read_into(8192, target(&words, &parts)).await.unwrap();
            assert!(*source(&words, &parts).to_buf() == *data);
        });
    }
}

#[test]
fn dropped_requests_keep_the_memory_until_the_host_has_completed_them() {
    for seed in 0..20 {
        let disk = sim::Disk::new(seed, 1 << 20);
        let (words, start) = words(8192);
        sim::run(seed, async {
            let backend = simulated(&disk, 1);
            write(&backend, 0, &pattern(4096, 1)).await;
            let (reader, memory) = (backend.clone(), target(&words, &[(start, 4096)]));
            let read = spawn(async move { reader.read_into(0, memory).await });
            let (writer, memory) = (backend.clone(), source(&words, &[(start, 4096)]));
            let flags = WriteFlags::empty();
            let write = spawn(async move { writer.write_from(8192, memory, flags).await });
            for _ in 0..seed % 3 {
                yield_now().await;
            }
            let is_done = read.is_finished() && write.is_finished();
            drop((read, write));
            yield_now().await;
            // A task that was dropped before its first poll has started no operation.
            if seed % 3 == 2 && !is_done {
                assert!(Arc::strong_count(&words) > 1, "an operation is in flight");
            }
            let node = backend.node().unwrap();
            backend.close().await.unwrap();
            drop(node);
            assert_eq!(Arc::strong_count(&words), 1);
        });
    }
}
