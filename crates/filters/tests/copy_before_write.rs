//! Tests of `copy-before-write` and `snapshot-access` on disks in memory, in virtual time and on I/O threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oxblk_core::{
    Backend, DriverTable, Errno, Gate, Graph, Node, OpenFlags, Options, Perm, Permissions, Want,
    WriteFlags, ZeroFlags,
};
use oxblk_filters::copy_before_write::COPY_BEFORE_WRITE;
use oxblk_filters::snapshot_access::SNAPSHOT_ACCESS;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{Config, IoBuf, IoBufMut, IoThread, RangeLock, now, perturb, sim, sleep, spawn};

use memory::{Contents, add};

static DRIVERS: DriverTable = &[&NULL_CO, &COPY_BEFORE_WRITE, &SNAPSHOT_ACCESS];

const CLUSTER: usize = 64 << 10;
/// The last cluster is not complete.
const SIZE: usize = 16 * CLUSTER - 512;

/// The contents of the disk at the point in time.
fn old_byte(at: usize) -> u8 {
    u8::try_from(at / 512 % 251).unwrap() | 1
}

fn old_bytes() -> Vec<u8> {
    (0..SIZE).map(old_byte).collect()
}

/// A disk, the target, the filter above both, and the snapshot.
struct Disks {
    graph: Graph,
    file: Arc<Contents>,
    target: Arc<Contents>,
    disk: Backend,
    snapshot: Backend,
}

fn graph() -> (Graph, Arc<Contents>, Arc<Contents>) {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let ((file, _), (target, _)) = (add(&graph, "file", SIZE), add(&graph, "target", SIZE));
    file.data.lock().unwrap().copy_from_slice(&old_bytes());
    (graph, file, target)
}

async fn node(graph: &Graph, text: &str) -> Arc<Node> {
    let options = Options::from_dotted(text, None).unwrap();
    graph.open(options, OpenFlags { unmap: true, ..OpenFlags::default() }).await.unwrap()
}

fn backend(graph: &Graph, node: &Arc<Node>) -> Backend {
    let taken = Perm::CONSISTENT_READ | Perm::WRITE;
    Backend::new(graph, "", Arc::clone(node), Permissions::sharing_all(taken)).unwrap()
}

impl Disks {
    async fn open(options: &str) -> Self {
        let (graph, file, target) = graph();
        Self::open_in(graph, file, target, options).await
    }

    async fn open_in(
        graph: Graph,
        file: Arc<Contents>,
        target: Arc<Contents>,
        options: &str,
    ) -> Self {
        let text =
            format!("driver=copy-before-write,node-name=cbw,file=file,target=target{options}");
        let filter = node(&graph, &text).await;
        let access = node(&graph, "driver=snapshot-access,node-name=snap,file=cbw").await;
        let (disk, snapshot) = (backend(&graph, &filter), backend(&graph, &access));
        Self { graph, file, target, disk, snapshot }
    }

    async fn close(self) {
        self.snapshot.close().await.unwrap();
        self.disk.close().await.unwrap();
        for name in ["file", "target"] {
            let node = self.graph.node(name).unwrap();
            assert!(!node.has_parents());
            self.graph.allow_close(node).await.unwrap();
        }
        assert!(self.graph.nodes().is_empty());
    }
}

async fn write(disk: &Backend, offset: usize, data: Vec<u8>) -> i32 {
    let outcome = disk.write(offset as u64, IoBuf::from(data), WriteFlags::empty()).await;
    outcome.map_or_else(|error| error.raw_errno(), |()| 0)
}

/// Reads a range. Returns the errno if the read fails.
async fn read(disk: &Backend, offset: usize, len: usize) -> Result<Vec<u8>, i32> {
    let read = disk.read(offset as u64, IoBufMut::new(len)).await;
    read.map(|data| data.to_vec()).map_err(|error| error.raw_errno())
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % bound as u64).unwrap()
    }

    /// A range of at most `most` bytes, in units of sectors.
    fn range(&mut self, most: usize) -> std::ops::Range<usize> {
        let start = self.below(SIZE / 512) * 512;
        let len = (1 + self.below(most / 512)) * 512;
        start..(start + len).min(SIZE)
    }
}

#[test]
fn the_snapshot_keeps_the_data_of_all_changes() {
    sim::run(1, async {
        let disks = Disks::open("").await;
        assert_eq!(write(&disks.disk, 100, vec![0; 10]).await, 0);
        disks.disk.write_zeroes(CLUSTER as u64, 3 * 512, ZeroFlags::empty()).await.unwrap();
        assert_eq!(write(&disks.disk, 5 * CLUSTER - 1, vec![0; 2]).await, 0);
        assert_eq!(write(&disks.disk, SIZE - 1, vec![0]).await, 0);
        let mut expected = vec![0; SIZE];
        for cluster in [0, 1, 4, 5, 15] {
            let (start, end) = (cluster * CLUSTER, ((cluster + 1) * CLUSTER).min(SIZE));
            expected[start..end].copy_from_slice(&old_bytes()[start..end]);
        }
        assert!(disks.target.bytes() == expected, "the target has other data");
        let copies = disks.target.writes.load(Relaxed);
        // Clusters are copied once. A cluster that was copied is written without the driver.
        assert_eq!(write(&disks.disk, 0, vec![1; CLUSTER]).await, 0);
        assert_eq!(disks.target.writes.load(Relaxed), copies);
        assert!(read(&disks.snapshot, 0, SIZE).await.unwrap() == old_bytes());
        assert_eq!(read(&disks.disk, SIZE - 1, 1).await.unwrap(), [0]);
        let status = disks.snapshot.block_status(0, SIZE as u64, Want::Precise).await.unwrap();
        assert!(status.status.len > 0 && !status.status.is_zero());
        disks.close().await;
    });
}

#[test]
fn discarded_clusters_are_neither_copied_nor_accessible() {
    sim::run(2, async {
        let disks = Disks::open("").await;
        let cluster = CLUSTER as u64;
        disks.snapshot.discard(cluster - 512, 2 * cluster).await.unwrap();
        disks.snapshot.discard(15 * cluster, cluster - 512).await.unwrap();
        assert_eq!(write(&disks.disk, 0, vec![1; SIZE]).await, 0);
        let target = disks.target.bytes();
        for (number, data) in target.chunks(CLUSTER).enumerate() {
            let is_copied = data.iter().any(|byte| *byte != 0);
            assert_eq!(is_copied, ![1, 15].contains(&number), "cluster {number}");
        }
        for (start, len, errno) in [
            (0, CLUSTER, 0),
            (CLUSTER - 1, 2, Errno::ACCES),
            (2 * CLUSTER - 1, 2, Errno::ACCES),
            (2 * CLUSTER, 13 * CLUSTER, 0),
            (SIZE - 1, 1, Errno::ACCES),
            (0, SIZE, Errno::ACCES),
        ] {
            let outcome = read(&disks.snapshot, start, len).await;
            assert_eq!(outcome.as_ref().err().copied().unwrap_or(0), errno, "{start} {len}");
            assert!(outcome.is_err() || outcome.unwrap() == old_bytes()[start..start + len]);
        }
        let refused = write(&disks.snapshot, 0, vec![1]).await;
        assert_eq!(refused, Errno::OPNOTSUPP);
        disks.close().await;
    });
}

#[test]
fn a_bitmap_selects_the_data_of_the_snapshot() {
    sim::run(3, async {
        let (graph, file, target) = graph();
        let node = graph.node("file").unwrap();
        let bitmap = graph.add_bitmap(&node, "b", Some(4096)).await.unwrap();
        bitmap.mark(3 * CLUSTER as u64 + 5000, 1);
        let options = ",bitmap.node=file,bitmap.name=b";
        let disks = Disks::open_in(graph.clone(), file, target, options).await;
        // Later changes of the bitmap have no effect.
        bitmap.mark(0, SIZE as u64);
        assert_eq!(write(&disks.disk, 0, vec![1; SIZE]).await, 0);
        assert_eq!(disks.target.writes.load(Relaxed), 1);
        let read_back = read(&disks.snapshot, 3 * CLUSTER, CLUSTER).await.unwrap();
        assert!(read_back == old_bytes()[3 * CLUSTER..4 * CLUSTER]);
        assert_eq!(read(&disks.snapshot, 3 * CLUSTER - 1, 2).await, Err(Errno::ACCES));
        assert_eq!(read(&disks.snapshot, 0, 512).await, Err(Errno::ACCES));
        disks.close().await;
    });
}

/// What the tasks of a random test know.
struct Model {
    /// The contents that the disk must have.
    disk: RefCell<Vec<u8>>,
    /// The requests of the guest that overlap run one after the other.
    ranges: RangeLock,
    /// The size of the clusters of the filter in bytes: a multiple of [`CLUSTER`].
    cluster: usize,
    /// The parts of [`CLUSTER`] bytes that the user of the snapshot has discarded. `None` while a discard is in progress.
    discarded: RefCell<Vec<Option<bool>>>,
    is_over: std::cell::Cell<bool>,
}

async fn guest(disk: Backend, model: Rc<Model>, mut random: Random, requests: usize) {
    for _ in 0..requests {
        let range = random.range(3 * CLUSTER);
        let (start, len) = (range.start as u64, range.len() as u64);
        let _guard = model.ranges.lock(start..start + len).await;
        match random.below(4) {
            0 => {
                disk.write_zeroes(start, len, ZeroFlags::empty()).await.unwrap();
                model.disk.borrow_mut()[range].fill(0);
            }
            1 => {
                let found = read(&disk, range.start, range.len()).await.unwrap();
                assert!(found == model.disk.borrow()[range], "the guest reads other data");
            }
            _ => {
                let data = vec![u8::try_from(random.below(256)).unwrap(); range.len()];
                assert_eq!(write(&disk, range.start, data.clone()).await, 0);
                model.disk.borrow_mut()[range].copy_from_slice(&data);
            }
        }
    }
}

/// Reads the snapshot until the guest has ended, and discards a few clusters.
async fn reader(snapshot: Backend, model: Rc<Model>, mut random: Random) {
    let old = old_bytes();
    while !model.is_over.get() {
        // Virtual time passes only while all tasks wait.
        sleep(Duration::from_micros(20)).await;
        let range = random.range(4 * CLUSTER);
        let parts = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
        if random.below(12) == 0 {
            let start = range.start - range.start % model.cluster;
            let end = (start + model.cluster).min(SIZE);
            let parts = start / CLUSTER..end.div_ceil(CLUSTER);
            model.discarded.borrow_mut()[parts.clone()].fill(None);
            snapshot.discard(start as u64, (end - start) as u64).await.unwrap();
            model.discarded.borrow_mut()[parts].fill(Some(true));
            continue;
        }
        let before = model.discarded.borrow()[parts.clone()].to_vec();
        match read(&snapshot, range.start, range.len()).await {
            Ok(data) => {
                assert!(!before.contains(&Some(true)), "discarded data was read");
                assert!(data == old[range.clone()], "the snapshot has changed at {range:?}");
            }
            Err(errno) => {
                let after = model.discarded.borrow()[parts].to_vec();
                let is_gone = |state: &Option<bool>| *state != Some(false);
                assert_eq!(errno, Errno::ACCES);
                assert!(after.iter().any(is_gone), "the snapshot is not accessible");
            }
        }
    }
}

/// Four tasks write while one or two read the snapshot. Copies, reads and writes end in any order.
fn concurrent(seed: u64, options: &str, readers: u64, cluster: usize) {
    sim::run(seed, async move {
        let disks = Disks::open(options).await;
        disks.file.delay(seed * 2 + 1);
        disks.target.delay(seed * 2 + 2);
        let model = Rc::new(Model {
            disk: RefCell::new(old_bytes()),
            ranges: RangeLock::new(),
            cluster,
            discarded: RefCell::new(vec![Some(false); SIZE.div_ceil(CLUSTER)]),
            is_over: std::cell::Cell::new(false),
        });
        let guests: Vec<_> = (0..4)
            .map(|number| {
                let random = Random(seed * 101 + number);
                spawn(guest(disks.disk.clone(), Rc::clone(&model), random, 25))
            })
            .collect();
        let reading: Vec<_> = (0..readers)
            .map(|number| {
                let random = Random(seed * 211 + number);
                spawn(reader(disks.snapshot.clone(), Rc::clone(&model), random))
            })
            .collect();
        for task in guests {
            task.await;
        }
        model.is_over.set(true);
        for task in reading {
            task.await;
        }
        assert!(disks.file.bytes() == *model.disk.borrow(), "the disk has other data");
        let old = old_bytes();
        let discarded = model.discarded.take();
        for (number, state) in discarded.iter().enumerate() {
            let range = number * CLUSTER..((number + 1) * CLUSTER).min(SIZE);
            match read(&disks.snapshot, range.start, range.len()).await {
                Ok(data) => assert!(data == old[range], "the snapshot has changed"),
                Err(_) => assert_ne!(*state, Some(false)),
            }
        }
        disks.close().await;
    });
}

#[test]
fn the_snapshot_equals_the_point_in_time_in_every_order_of_completions() {
    for seed in 1..=80 {
        concurrent(seed, "", 1 + seed % 2, CLUSTER);
    }
    for seed in 200..=215 {
        concurrent(seed, ",min-cluster-size=256k", 1, 4 * CLUSTER);
        concurrent(seed, ",cbw-timeout=100", 1, CLUSTER);
    }
}

/// Writes to all clusters, with a fault at the request `number` of the disk or of the target. Returns false if there was no fault.
fn with_fault(policy: &str, in_target: bool, number: u64) -> bool {
    let policy = policy.to_owned();
    sim::run(number, async move {
        let disks = Disks::open(&format!(",on-cbw-error={policy}")).await;
        let breaks_snapshot = policy == "break-snapshot";
        let failing = match in_target {
            true => &disks.target.failing_write,
            false => &disks.file.failing_read,
        };
        failing.store(number, Relaxed);
        let mut model = old_bytes();
        let mut failures = 0;
        // Parts of clusters, several clusters, the same clusters again.
        for (start, len) in [(0, 512), (0, CLUSTER), (CLUSTER - 512, 3 * CLUSTER), (9 * CLUSTER, 7)]
            .into_iter()
            .chain([(0, SIZE)])
        {
            let data = vec![u8::try_from(start % 255).unwrap(); len];
            match write(&disks.disk, start, data.clone()).await {
                0 => model[start..start + len].copy_from_slice(&data),
                errno => {
                    assert_eq!(errno, Errno::IO);
                    failures += 1;
                }
            }
        }
        assert!(disks.file.bytes() == model, "the disk has other data");
        let had_fault = match in_target {
            true => disks.target.writes.load(Relaxed) >= number,
            false => disks.file.reads.load(Relaxed) >= number,
        };
        let snapshot = read(&disks.snapshot, 0, SIZE).await;
        if breaks_snapshot {
            assert_eq!(failures, 0);
            match had_fault {
                true => assert_eq!(snapshot, Err(Errno::ACCES)),
                false => assert!(snapshot == Ok(old_bytes())),
            }
        } else {
            assert_eq!(failures, usize::from(had_fault));
            assert!(snapshot == Ok(old_bytes()), "the snapshot has changed");
            if had_fault {
                // The same write succeeds later.
                assert_eq!(write(&disks.disk, 0, vec![3; SIZE]).await, 0);
                assert!(read(&disks.snapshot, 0, SIZE).await == Ok(old_bytes()));
            }
        }
        disks.close().await;
        had_fault
    })
}

#[test]
fn a_fault_of_any_request_fails_one_write_or_the_snapshot() {
    for policy in ["break-guest-write", "break-snapshot"] {
        for in_target in [false, true] {
            let faults = (1..).take_while(|number| with_fault(policy, in_target, *number)).count();
            assert!(faults >= 4, "{policy}: {faults}");
        }
    }
}

#[test]
fn a_copy_that_takes_too_long_fails_the_write_and_goes_on() {
    sim::run(7, async {
        let disks = Disks::open(",cbw-timeout=2").await;
        disks.target.write_time.store(10_000, Relaxed);
        let start = now();
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, Errno::TIMEDOUT);
        assert_eq!(now() - start, Duration::from_secs(2));
        assert_eq!(disks.file.bytes(), old_bytes());
        // A write to another cluster does not wait for the copy. A write to the same cluster does.
        disks.target.write_time.store(0, Relaxed);
        assert_eq!(write(&disks.disk, CLUSTER, vec![1; 512]).await, 0);
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, Errno::TIMEDOUT);
        assert_eq!(now() - start, Duration::from_secs(4));
        // A drain waits for the copy.
        drop(disks.disk.quiesce().await);
        assert_eq!(now() - start, Duration::from_secs(10));
        let copies = disks.target.writes.load(Relaxed);
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, 0);
        assert_eq!(disks.target.writes.load(Relaxed), copies);
        assert!(read(&disks.snapshot, 0, SIZE).await == Ok(old_bytes()));
        disks.close().await;
    });
}

#[test]
fn a_copy_that_takes_too_long_breaks_the_snapshot() {
    sim::run(8, async {
        let disks = Disks::open(",cbw-timeout=2,on-cbw-error=break-snapshot").await;
        disks.target.write_time.store(10_000, Relaxed);
        let start = now();
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, 0);
        assert_eq!(now() - start, Duration::from_secs(2));
        assert_eq!(write(&disks.disk, 0, vec![2; SIZE]).await, 0);
        assert_eq!(now() - start, Duration::from_secs(2));
        assert_eq!(disks.file.bytes(), vec![2; SIZE]);
        assert_eq!(read(&disks.snapshot, 8 * CLUSTER, 512).await, Err(Errno::ACCES));
        let (graph, file) = (disks.graph.clone(), Arc::clone(&disks.file));
        disks.close().await;
        assert_eq!(now() - start, Duration::from_secs(10));
        assert_eq!((graph.nodes().len(), file.bytes()), (0, vec![2; SIZE]));
    });
}

#[test]
fn a_write_of_unchanged_data_copies_nothing() {
    sim::run(8, async {
        let disks = Disks::open("").await;
        let data = IoBuf::from(old_bytes()[..2 * CLUSTER].to_vec());
        disks.disk.write(0, data, WriteFlags::UNCHANGED).await.unwrap();
        assert_eq!(disks.file.writes.load(Relaxed), 1);
        let (at, len) = (2 * CLUSTER as u64, CLUSTER as u64);
        disks.file.data.lock().unwrap()[2 * CLUSTER..3 * CLUSTER].fill(0);
        disks.disk.write_zeroes(at, len, ZeroFlags::UNCHANGED).await.unwrap();
        assert_eq!(disks.target.writes.load(Relaxed), 0);
        // A change copies the clusters.
        assert_eq!(write(&disks.disk, 0, vec![9; 2 * CLUSTER]).await, 0);
        assert_eq!(disks.target.writes.load(Relaxed), 1);
        let expected = &old_bytes()[..2 * CLUSTER];
        assert!(read(&disks.snapshot, 0, 2 * CLUSTER).await.unwrap() == expected);
        disks.close().await;
    });
}

/// The target hangs while the guest writes to one cluster after another, and several times to the first.
#[test]
fn the_number_of_copies_in_the_background_is_limited() {
    sim::run(8, async {
        const DISK: usize = 100 * CLUSTER;
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let ((file, _), (target, _)) = (add(&graph, "file", DISK), add(&graph, "target", DISK));
        let disks = Disks::open_in(graph, file, target, ",cbw-timeout=2").await;
        disks.target.write_time.store(3_600_000, Relaxed);
        let start = now();
        for _ in 0..20 {
            assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, Errno::TIMEDOUT);
        }
        // Each write waits for the lock of the cluster.
        assert_eq!(now() - start, Duration::from_secs(40));
        assert_eq!(disks.target.writes.load(Relaxed), 1);
        for cluster in 1..100 {
            let at = cluster * CLUSTER;
            assert_eq!(write(&disks.disk, at, vec![1; 512]).await, Errno::TIMEDOUT);
        }
        // 15 further writes wait for the target. The others fail at once.
        assert_eq!(now() - start, Duration::from_secs(70));
        assert_eq!(disks.target.writes.load(Relaxed), 16);
        assert_eq!(disks.file.bytes(), vec![0; DISK]);
        // The copies end.
        disks.target.write_time.store(0, Relaxed);
        drop(disks.disk.quiesce().await);
        for cluster in 0..100 {
            assert_eq!(write(&disks.disk, cluster * CLUSTER, vec![1; 512]).await, 0);
        }
        assert_eq!(disks.target.writes.load(Relaxed), 100);
        assert!(read(&disks.snapshot, 0, DISK).await == Ok(vec![0; DISK]));
        disks.close().await;
    });
}

/// A copy in the background ends after its current request to the target when the snapshot is not valid any more.
#[test]
fn no_copy_begins_in_the_background_of_a_broken_snapshot() {
    sim::run(8, async {
        const DISK: usize = 64 << 20;
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let ((file, _), (target, _)) = (add(&graph, "file", DISK), add(&graph, "target", DISK));
        let options = ",cbw-timeout=2,on-cbw-error=break-snapshot,min-cluster-size=16M";
        let disks = Disks::open_in(graph, file, target, options).await;
        disks.target.write_time.store(10_000, Relaxed);
        let start = now();
        assert_eq!(write(&disks.disk, 0, vec![1; DISK]).await, 0);
        assert_eq!(now() - start, Duration::from_secs(2));
        let copies = disks.target.writes.load(Relaxed);
        drop(disks.disk.quiesce().await);
        assert_eq!(now() - start, Duration::from_secs(10));
        assert_eq!(disks.target.writes.load(Relaxed), copies);
        assert_eq!(disks.file.bytes(), vec![1; DISK]);
        disks.close().await;
    });
}

/// Requests of the guest are cancelled at random moments.
fn cancelled(seed: u64) {
    sim::run(seed, async move {
        let disks = Disks::open("").await;
        disks.file.delay(seed * 2 + 1);
        disks.target.delay(seed * 2 + 2);
        let mut random = Random(seed);
        let old = old_bytes();
        for _ in 0..30 {
            let range = random.range(2 * CLUSTER);
            let data = vec![u8::try_from(random.below(256)).unwrap(); range.len()];
            let limit = Duration::from_micros(random.below(500) as u64);
            let _ = oxblk_ring::timeout(limit, write(&disks.disk, range.start, data)).await;
            let range = random.range(2 * CLUSTER);
            let limit = Duration::from_micros(random.below(300) as u64);
            let reading = read(&disks.snapshot, range.start, range.len());
            if let Ok(data) = oxblk_ring::timeout(limit, reading).await {
                assert!(data.unwrap() == old[range], "the snapshot has changed");
            }
        }
        assert!(read(&disks.snapshot, 0, SIZE).await == Ok(old), "the snapshot has changed");
        disks.close().await;
    });
}

#[test]
fn cancelled_requests_do_not_change_the_snapshot() {
    (1..=100).for_each(cancelled);
}

/// The filter is inserted above a disk in use and is removed again.
fn inserted(seed: u64) {
    sim::run(seed, async move {
        let (graph, file, target) = graph();
        file.delay(seed * 2 + 1);
        target.delay(seed * 2 + 2);
        let disk = backend(&graph, &graph.node("file").unwrap());
        // Each sector contains the number of its last write. `begun` and `done` are the last numbers of each sector.
        let sectors = SIZE / 512;
        let done = Rc::new(RefCell::new(vec![0_u64; sectors]));
        let begun = Rc::new(RefCell::new(vec![0_u64; sectors]));
        file.data.lock().unwrap().fill(0);
        let is_over = Rc::new(std::cell::Cell::new(false));
        let mut writers = Vec::new();
        for number in 0..4 {
            let (disk, done, begun) = (disk.clone(), Rc::clone(&done), Rc::clone(&begun));
            let (is_over, mut random) = (Rc::clone(&is_over), Random(seed * 31 + number as u64));
            writers.push(spawn(async move {
                while !is_over.get() {
                    let sector = random.below(sectors / 4) * 4 + number;
                    let value = done.borrow()[sector] + 1;
                    begun.borrow_mut()[sector] = value;
                    let data = value.to_le_bytes().repeat(64);
                    assert_eq!(write(&disk, sector * 512, data).await, 0);
                    done.borrow_mut()[sector] = value;
                }
            }));
        }
        sleep(Duration::from_micros(seed * 37 % 3000)).await;
        let filter =
            node(&graph, "driver=copy-before-write,node-name=cbw,file=file,target=target").await;
        let before = done.borrow().clone();
        let mut change = graph.change();
        change.replace_node(&graph.node("file").unwrap(), &filter, |_| true);
        change.run().await.unwrap();
        let after = begun.borrow().clone();
        let access = node(&graph, "driver=snapshot-access,node-name=snap,file=cbw").await;
        let snapshot = backend(&graph, &access);
        let first = read(&snapshot, 0, SIZE).await.unwrap();
        for (sector, data) in first.chunks(512).enumerate() {
            let value = u64::from_le_bytes(data[..8].try_into().unwrap());
            assert!((before[sector]..=after[sector]).contains(&value), "sector {sector}");
        }
        for _ in 0..10 {
            sleep(Duration::from_micros(seed % 500)).await;
            assert!(read(&snapshot, 0, SIZE).await.as_ref() == Ok(&first), "the snapshot changes");
        }
        // The snapshot needs the filter.
        let mut change = graph.change();
        change.remove_filter(&filter);
        let refused = change.run().await.unwrap_err().to_string();
        assert!(refused.contains("Permission conflict on node 'file'"), "{refused}");
        assert!(read(&snapshot, 0, SIZE).await == Ok(first), "the snapshot changes");
        snapshot.close().await.unwrap();
        let mut change = graph.change();
        change.remove_filter(&filter);
        drop(filter);
        change.run().await.unwrap();
        assert!(graph.node("cbw").is_none() && graph.node("snap").is_none());
        let copies = target.writes.load(Relaxed);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(target.writes.load(Relaxed), copies);
        is_over.set(true);
        for writer in writers {
            writer.await;
        }
        for (sector, value) in done.take().iter().enumerate() {
            let data = read(&disk, sector * 512, 8).await.unwrap();
            assert_eq!(u64::from_le_bytes(data.try_into().unwrap()), *value);
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn the_point_in_time_is_the_moment_of_the_insertion() {
    (1..=40).for_each(inserted);
}

#[test]
fn users_stay_as_the_snapshot_needs_them() {
    sim::run(9, async {
        let disks = Disks::open("").await;
        let file = disks.graph.node("file").unwrap();
        let writing = Permissions::sharing_all(Perm::WRITE);
        let refused = Backend::new(&disks.graph, "w", Arc::clone(&file), writing).err().unwrap();
        assert!(refused.to_string().contains("unshared by node 'cbw'"), "{refused}");
        // A filter above the copy-before-write node gets its users, but not the snapshot.
        let text = "driver=copy-before-write,node-name=upper,file=cbw,target.driver=null-co,\
                    target.size=1M";
        let upper = node(&disks.graph, text).await;
        let mut change = disks.graph.change();
        change.replace_node(&disks.graph.node("cbw").unwrap(), &upper, |_| true);
        change.run().await.unwrap();
        assert_eq!(disks.disk.node().unwrap().name(), "upper");
        assert_eq!(write(&disks.disk, 0, vec![0; SIZE]).await, 0);
        assert!(read(&disks.snapshot, 0, SIZE).await == Ok(old_bytes()));
        let mut change = disks.graph.change();
        change.remove_filter(&upper);
        drop(upper);
        change.run().await.unwrap();
        assert_eq!(disks.disk.node().unwrap().name(), "cbw");
        disks.close().await;
    });
}

/// Four I/O threads write while a fifth reads the snapshot.
fn on_threads(seed: u64) {
    perturb::start(seed);
    let start = |n: u64| IoThread::start(&format!("cbw-{n}"), Config::default()).unwrap();
    let threads: Vec<_> = (0..5).map(start).collect();
    let opening = threads[0].spawn(move || async move {
        let disks = Disks::open("").await;
        disks.file.delay(seed);
        disks.target.delay(seed + 1);
        disks
    });
    let disks = opening.wait().unwrap();
    let (is_over, model) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(old_bytes())));
    let ranges = Arc::new(RangeLock::new());
    let mut writing = Vec::new();
    for (number, thread) in (0_u64..).zip(&threads[..4]) {
        let (disk, model, ranges) = (disks.disk.clone(), Arc::clone(&model), Arc::clone(&ranges));
        writing.push(thread.spawn(move || async move {
            let mut random = Random(seed * 101 + number);
            for _ in 0..40 {
                let range = random.range(2 * CLUSTER);
                let _guard = ranges.lock(range.start as u64..range.end as u64).await;
                let data = vec![u8::try_from(random.below(256)).unwrap(); range.len()];
                assert_eq!(write(&disk, range.start, data.clone()).await, 0);
                model.lock().unwrap()[range].copy_from_slice(&data);
            }
        }));
    }
    let (snapshot, over) = (disks.snapshot.clone(), Arc::clone(&is_over));
    let reading = threads[4].spawn(move || async move {
        let (mut random, old) = (Random(seed), old_bytes());
        while !over.load(Relaxed) {
            let range = random.range(3 * CLUSTER);
            let data = read(&snapshot, range.start, range.len()).await.unwrap();
            assert!(data == old[range], "the snapshot has changed");
        }
        assert!(read(&snapshot, 0, SIZE).await == Ok(old), "the snapshot has changed");
    });
    for task in writing {
        task.wait().unwrap();
    }
    is_over.store(true, Relaxed);
    reading.wait().unwrap();
    assert!(disks.file.bytes() == *model.lock().unwrap(), "the disk has other data");
    threads[0].spawn(move || disks.close()).wait().unwrap();
}

#[test]
fn four_threads_write_while_the_snapshot_is_read() {
    (1..=12).for_each(on_threads);
    perturb::stop();
}
