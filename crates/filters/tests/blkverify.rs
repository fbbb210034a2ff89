//! Tests of the filter `blkverify` on disks in memory, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{
    Backend, DriverTable, Errno, Gate, Graph, OpenFlags, Options, Preallocation, WriteFlags,
    ZeroFlags,
};
use oxblk_filters::blkverify::BLKVERIFY;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, sim, spawn};

use memory::{Contents, add};

static DRIVERS: DriverTable = &[&NULL_CO, &BLKVERIFY];

const SIZE: usize = 64 << 10;

/// A blkverify node above two disks in memory: the raw copy, and the image under test.
async fn open() -> (Backend, Arc<Contents>, Arc<Contents>) {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let (raw, _) = add(&graph, "raw", SIZE);
    let (test, _) = add(&graph, "test", SIZE);
    let options = Options::from_dotted("driver=blkverify,raw=raw,test=test", None).unwrap();
    let disk = graph.open_backend(None, options, OpenFlags::default()).await.unwrap();
    (disk, raw, test)
}

async fn write(disk: &Backend, offset: u64, data: Vec<u8>) -> Result<(), String> {
    let written = disk.write(offset, IoBuf::from(data), WriteFlags::empty()).await;
    written.map_err(|error| error.to_string())
}

async fn read(disk: &Backend, offset: u64, len: usize) -> Result<Vec<u8>, String> {
    let data = disk.read(offset, IoBufMut::new(len)).await;
    data.map(|data| data.to_vec()).map_err(|error| error.to_string())
}

#[test]
fn both_children_get_each_change() {
    sim::run(1, async {
        let (disk, raw, test) = open().await;
        write(&disk, 1000, vec![1; 3000]).await.unwrap();
        disk.write_zeroes(2048, 512, ZeroFlags::empty()).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(raw.bytes(), test.bytes());
        assert_eq!(&raw.bytes()[1998..2052], [&[1; 50][..], &[0; 4]].concat());
        assert_eq!((raw.flushes.load(Relaxed), test.flushes.load(Relaxed)), (1, 1));
        let refused = disk.resize(1 << 20, Preallocation::Off).await;
        assert!(refused.is_err(), "the disks in memory have a fixed size");
        disk.close().await.unwrap();
    });
}

#[test]
fn differences_fail_requests() {
    sim::run(2, async {
        let (disk, raw, test) = open().await;
        test.data.lock().unwrap()[700] = 1;
        let refused = read(&disk, 512, 512).await.unwrap_err();
        assert_eq!(refused, "blkverify: read offset=512 bytes=512 contents mismatch at offset 700");
        assert_eq!(read(&disk, 1024, 512).await, Ok(vec![0; 512]));
        raw.fails_reads.store(Errno::NOSPC, Relaxed);
        let refused = read(&disk, 1024, 512).await.unwrap_err();
        assert_eq!(refused, "blkverify: read offset=1024 bytes=512 return value mismatch 0 != -28");
        // If both children fail in the same way, there is no difference.
        test.fails_reads.store(Errno::NOSPC, Relaxed);
        assert_eq!(read(&disk, 1024, 512).await.unwrap_err(), "No space left on device");
        test.fails_writes.store(Errno::IO, Relaxed);
        let refused = write(&disk, 0, vec![1; 512]).await.unwrap_err();
        assert_eq!(refused, "blkverify: write offset=0 bytes=512 return value mismatch -5 != 0");
        drop(disk.close().await);
    });
}

#[test]
fn requests_that_overlap_cause_no_difference() {
    for seed in 1..=20 {
        sim::run(seed, async move {
            let (disk, raw, test) = open().await;
            raw.delay(seed);
            test.delay(seed + 1);
            let mut tasks = Vec::new();
            for number in 0..48_u8 {
                let disk = disk.clone();
                tasks.push(spawn(async move {
                    let offset = u64::from(number % 7) * 512;
                    if number % 3 == 0 {
                        read(&disk, 0, 8192).await.map(drop)
                    } else {
                        write(&disk, offset, vec![number; 2048]).await
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
            assert_eq!(raw.bytes(), test.bytes());
            disk.close().await.unwrap();
        });
    }
}
