//! Tests of the filter `blklogwrites` on disks in memory, in virtual time: the log is replayed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::{
    Backend, DriverTable, Errno, Gate, Graph, OpenFlags, Options, WriteFlags, ZeroFlags,
};
use oxblk_filters::blklogwrites::BLKLOGWRITES;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, sim, spawn};

use memory::{Contents, add};

static DRIVERS: DriverTable = &[&NULL_CO, &BLKLOGWRITES];

const SIZE: usize = 64 << 10;

/// The graph, the disk, its log, and the node above both.
struct Disks {
    graph: Graph,
    file: Arc<Contents>,
    log: Arc<Contents>,
}

impl Disks {
    fn new(log: usize) -> Self {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let ((file, _), (log, _)) = (add(&graph, "file", SIZE), add(&graph, "log", log));
        Self { graph, file, log }
    }

    async fn open(&self, options: &str) -> Result<Backend, String> {
        let text = format!("driver=blklogwrites,file=file,log=log,discard=unmap{options}");
        let options = Options::from_dotted(&text, None).unwrap();
        let opened = self.graph.open_backend(None, options, OpenFlags::default()).await;
        opened.map_err(|error| error.to_string())
    }
}

async fn write(disk: &Backend, offset: u64, data: Vec<u8>) -> i32 {
    let outcome = disk.write(offset, IoBuf::from(data), WriteFlags::empty()).await;
    outcome.map_or_else(|error| error.raw_errno(), |()| 0)
}

/// An entry of a log.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    offset: usize,
    len: usize,
    flags: u64,
    data: Vec<u8>,
}

const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

fn number(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

/// Reads a log.
fn entries(log: &[u8]) -> Vec<Entry> {
    assert_eq!(&log[..8], b"rhswfsj\0");
    assert_eq!(number(log, 8), 1);
    let sector = usize::try_from(u32::from_le_bytes(log[24..28].try_into().unwrap())).unwrap();
    let mut at = sector;
    let mut entries = Vec::new();
    for _ in 0..number(log, 16) {
        let header = &log[at..at + sector];
        assert!(header[24..].iter().all(|byte| *byte == 0));
        let (offset, len) = (number(header, 0) * sector, number(header, 8) * sector);
        let flags = number(header, 16) as u64;
        at += sector;
        let stored = if flags & DISCARD == 0 { len } else { 0 };
        let data = log[at..at + stored].to_vec();
        at += stored;
        entries.push(Entry { offset, len, flags, data });
    }
    entries
}

/// The disk after these entries. The disks of the tests ignore discards.
fn replay<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    for entry in entries {
        disk[entry.offset..entry.offset + entry.data.len()].copy_from_slice(&entry.data);
    }
    disk
}

#[test]
fn all_changes_are_in_the_log() {
    sim::run(1, async {
        let disks = Disks::new(1 << 20);
        let disk = disks.open("").await.unwrap();
        assert_eq!(write(&disk, 512, vec![1; 1024]).await, 0);
        assert_eq!(write(&disk, 700, vec![2; 100]).await, 0);
        disk.flush().await.unwrap();
        assert_eq!(entries(&disks.log.bytes()).len(), 3);
        disk.write_zeroes(1024, 512, ZeroFlags::empty()).await.unwrap();
        disk.discard(4096, 8192).await.unwrap();
        disks.file.fails_writes.store(Errno::NOSPC, Relaxed);
        assert_eq!(write(&disk, 0, vec![9; 512]).await, Errno::NOSPC);
        disks.file.fails_writes.store(0, Relaxed);
        disk.close().await.unwrap();
        let log = entries(&disks.log.bytes());
        let short: Vec<_> =
            log.iter().map(|entry| (entry.offset, entry.len, entry.flags)).collect();
        assert_eq!(
            short,
            [
                (512, 1024, 0),
                (512, 512, 0),
                (0, 0, FLUSH),
                (1024, 512, 0),
                (4096, 8192, DISCARD),
                (0, 0, FLUSH)
            ]
        );
        assert_eq!(replay(&log), disks.file.bytes());
    });
}

#[test]
fn a_log_is_continued_and_an_invalid_log_refused() {
    sim::run(2, async {
        let disks = Disks::new(1 << 20);
        let append = ",log-append=on";
        assert_eq!(disks.open(append).await.unwrap_err(), "Invalid log superblock magic");
        let disk = disks.open(",log-sector-size=4096,log-super-update-interval=1").await.unwrap();
        assert_eq!(write(&disk, 100, vec![1; 8000]).await, 0);
        assert_eq!(entries(&disks.log.bytes()).len(), 1);
        disk.discard(4096, 8192).await.unwrap();
        disk.close().await.unwrap();
        let disk = disks.open(append).await.unwrap();
        assert_eq!(write(&disk, 9000, vec![2; 10]).await, 0);
        disk.close().await.unwrap();
        let log = entries(&disks.log.bytes());
        assert_eq!(log.len(), 5);
        assert_eq!((log[3].offset, log[3].len), (8192, 4096));
        assert_eq!(replay(&log), disks.file.bytes());

        let valid = disks.log.bytes();
        for (at, bytes, message) in [
            (0, &b"x"[..], "Invalid log superblock magic"),
            (8, &[2], "Unsupported log version 2"),
            (24, &[100, 0], "Invalid log sector size 100"),
            (24, &[0; 4], "Invalid log sector size 0"),
            (16, &[255; 8], "The log ends before entry 252"),
            (4096 + 8, &[255; 8], "File too large"),
            (
                4096 + 8,
                &[255, 255, 255, 255, 255, 255, 255, 0],
                "The log is too long: File too large",
            ),
            (4096 + 8, &[255, 255, 0, 0], "The log ends before entry 1"),
        ] {
            disks.log.data.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(disks.open(append).await.unwrap_err(), message);
            disks.log.data.lock().unwrap().copy_from_slice(&valid);
        }
        assert!(disks.graph.node("file").is_some_and(|node| !node.has_parents()));
    });
}

#[test]
fn a_full_log_fails_writes_and_stays_valid() {
    sim::run(3, async {
        let disks = Disks::new(4096);
        let disk = disks.open("").await.unwrap();
        assert_eq!(write(&disk, 0, vec![1; 1024]).await, 0);
        assert_eq!(write(&disk, 0, vec![2; 2048]).await, Errno::NOSPC);
        assert_eq!(write(&disk, 8192, vec![3; 512]).await, 0);
        disk.flush().await.unwrap();
        drop(disk.close().await);
        let log = entries(&disks.log.bytes());
        assert_eq!(log.iter().map(|entry| entry.offset).collect::<Vec<_>>(), [0, 8192, 0]);
    });
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Concurrent requests that overlap. The replayed log has the contents of the disk. Up to the entry of a flush, the log contains all
/// writes that had completed before the flush began.
fn replays(seed: u64) {
    sim::run(seed, async move {
        let disks = Disks::new(4 << 20);
        let disk = disks.open(",log-super-update-interval=7").await.unwrap();
        disks.file.delay(seed);
        disks.log.delay(seed + 1);
        // For each flush, the writes that had completed before. Each write has data of its own.
        let (done, flushes) =
            (Rc::new(RefCell::new(Vec::new())), Rc::new(RefCell::new(Vec::new())));
        let mut tasks = Vec::new();
        for worker in 0..4_u64 {
            let (disk, done, flushes) = (disk.clone(), Rc::clone(&done), Rc::clone(&flushes));
            tasks.push(spawn(async move {
                let mut random = Random(seed * 31 + worker);
                for round in 0..40_u64 {
                    let offset = random.below(16) * 512;
                    let number = worker * 40 + round + 1;
                    match random.below(8) {
                        0 => {
                            let before = done.borrow().clone();
                            disk.flush().await.unwrap();
                            flushes.borrow_mut().push(before);
                        }
                        1 => disk.write_zeroes(offset, 2048, ZeroFlags::empty()).await.unwrap(),
                        2 => {
                            disk.read(offset, IoBufMut::new(100)).await.unwrap();
                        }
                        _ => {
                            let data = number.to_le_bytes().repeat(128);
                            assert_eq!(write(&disk, offset, data).await, 0);
                            done.borrow_mut().push(number);
                        }
                    }
                }
            }));
        }
        for task in tasks {
            task.await;
        }
        disk.close().await.unwrap();
        let log = entries(&disks.log.bytes());
        assert!(replay(&log) == disks.file.bytes(), "the log differs from the disk");
        let written = |entries: &[Entry]| -> Vec<u64> {
            entries
                .iter()
                .filter(|e| !e.data.is_empty())
                .map(|e| number(&e.data, 0) as u64)
                .collect()
        };
        let last = log.iter().rposition(|entry| entry.flags == FLUSH).unwrap();
        let all = written(&log[..last]);
        for before in flushes.borrow().iter() {
            assert!(before.iter().all(|number| all.contains(number)));
        }
    });
}

#[test]
fn a_replay_gives_the_contents_of_the_disk() {
    for seed in 1..=20 {
        replays(seed);
    }
}
