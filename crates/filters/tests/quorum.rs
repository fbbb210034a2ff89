//! Tests of the driver `quorum` on disks in memory, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use oxblk_core::{
    Backend, BlockEvent, DriverTable, Errno, Gate, Graph, OpenFlags, Options, QuorumOperation,
    WriteFlags, ZeroFlags,
};
use oxblk_filters::quorum::QUORUM;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, RangeLock, sim, spawn, yield_now};

use memory::{Contents, add};

static DRIVERS: DriverTable = &[&NULL_CO, &QUORUM];

const SIZE: usize = 64 << 10;

/// A quorum `q` of the disks `n0`, `n1`, … in memory.
struct Disks {
    graph: Graph,
    disk: Backend,
    children: Vec<Arc<Contents>>,
}

async fn open(count: usize, options: &str) -> Disks {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let children = (0..count).map(|at| add(&graph, &format!("n{at}"), SIZE).0).collect();
    let mut text = format!("driver=quorum,node-name=q{options}");
    for at in 0..count {
        text.push_str(&format!(",children.{at}=n{at}"));
    }
    let options = Options::from_dotted(&text, None).unwrap();
    let disk = graph.open_backend(None, options, OpenFlags::default()).await.unwrap();
    Disks { graph, disk, children }
}

fn fill(contents: &Contents, byte: u8) {
    contents.data.lock().unwrap().fill(byte);
}

async fn read(disk: &Backend, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
    let data = disk.read(offset, IoBufMut::new(len)).await;
    data.map(|data| data.to_vec()).map_err(|error| error.raw_errno())
}

async fn write(disk: &Backend, offset: u64, data: Vec<u8>) -> i32 {
    let outcome = disk.write(offset, IoBuf::from(data), WriteFlags::empty()).await;
    outcome.map_or_else(|error| error.raw_errno(), |()| 0)
}

fn bad(child: &str, operation: QuorumOperation, errno: i32, sectors: (u64, u64)) -> BlockEvent {
    BlockEvent::QuorumReportBad {
        operation,
        error: (errno != 0).then(|| oxblk_core::strerror(errno)),
        node_name: child.to_owned(),
        sector_num: sectors.0,
        sectors_count: sectors.1,
    }
}

#[test]
fn a_read_returns_the_data_of_the_majority_and_corrects_the_rest() {
    sim::run(1, async {
        let disks = open(3, ",vote-threshold=2,rewrite-corrupted=on").await;
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        let _listening =
            disks.graph.events().listen(move |event| seen.lock().unwrap().push(event.clone()));
        fill(&disks.children[1], 5);
        assert_eq!(read(&disks.disk, 1000, 600).await, Ok(vec![0; 600]));
        let corrected = disks.children[1].bytes();
        assert!(corrected[1000..1600].iter().all(|byte| *byte == 0));
        assert_eq!((corrected[999], corrected[1600]), (5, 5));
        let wrong = bad("n1", QuorumOperation::Read, 0, (1, 3));
        assert_eq!(std::mem::take(&mut *events.lock().unwrap()), [wrong]);

        fill(&disks.children[2], 6);
        assert_eq!(read(&disks.disk, 0, 512).await, Err(Errno::IO));
        let reference = "q".to_owned();
        let failure = BlockEvent::QuorumFailure { reference, sector_num: 0, sectors_count: 1 };
        let expected = std::slice::from_ref(&failure);
        assert_eq!(std::mem::take(&mut *events.lock().unwrap()), expected);

        disks.children[0].fails_writes.store(Errno::NOSPC, Relaxed);
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, 0);
        disks.children[2].fails_writes.store(Errno::NOSPC, Relaxed);
        assert_eq!(write(&disks.disk, 0, vec![2; 512]).await, Errno::NOSPC);
        let full = |child| bad(child, QuorumOperation::Write, Errno::NOSPC, (0, 1));
        let expected = [full("n0"), full("n0"), full("n2"), failure];
        assert_eq!(std::mem::take(&mut *events.lock().unwrap()), expected);
        drop(disks.disk.close().await);
    });
}

#[test]
fn a_flush_succeeds_if_enough_children_are_flushed() {
    sim::run(2, async {
        let disks = open(3, ",vote-threshold=2").await;
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, 0);
        disks.children[0].fails_writes.store(Errno::IO, Relaxed);
        disks.disk.flush().await.unwrap();
        assert_eq!(disks.children[2].flushes.load(Relaxed), 1);
        assert_eq!(write(&disks.disk, 0, vec![1; 512]).await, 0);
        disks.children[1].fails_writes.store(Errno::NOSPC, Relaxed);
        assert_eq!(disks.disk.flush().await.unwrap_err().raw_errno(), Errno::NOSPC);
        drop(disks.disk.close().await);
    });
}

#[test]
fn in_fifo_mode_a_read_uses_the_first_child_that_works() {
    sim::run(3, async {
        let disks = open(3, ",vote-threshold=2,read-pattern=fifo").await;
        for (at, child) in (1..).zip(&disks.children) {
            fill(child, at);
        }
        assert_eq!(read(&disks.disk, 0, 9).await, Ok(vec![1; 9]));
        disks.children[0].fails_reads.store(Errno::IO, Relaxed);
        assert_eq!(read(&disks.disk, 0, 9).await, Ok(vec![2; 9]));
        disks.children[1].fails_reads.store(Errno::IO, Relaxed);
        disks.children[2].fails_reads.store(Errno::NOSPC, Relaxed);
        assert_eq!(read(&disks.disk, 0, 9).await, Err(Errno::NOSPC));
        disks.disk.close().await.unwrap();
    });
}

#[test]
fn a_quorum_that_verifies_refuses_different_data() {
    sim::run(4, async {
        let disks = open(2, ",vote-threshold=2,blkverify=on").await;
        assert_eq!(read(&disks.disk, 0, 4096).await, Ok(vec![0; 4096]));
        disks.children[1].data.lock().unwrap()[700] = 1;
        let refused = disks.disk.read(512, IoBufMut::new(512)).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "quorum: offset=512 bytes=512 contents mismatch at offset 700"
        );
        disks.disk.close().await.unwrap();
    });
}

#[test]
fn children_are_added_and_removed_with_the_messages_of_qemu() {
    sim::run(5, async {
        let disks = open(2, ",vote-threshold=2").await;
        let graph = &disks.graph;
        for name in ["n2", "n3", "n4"] {
            add(graph, name, SIZE);
        }
        add(graph, "short", SIZE / 2);
        let change = async |parent: &str, child: Option<&str>, node: Option<&str>| {
            let outcome = graph.change_children(parent, child, node).await;
            outcome.map_or_else(|error| error.to_string(), |()| String::new())
        };
        for (parent, child, node, expected) in [
            ("q", None, None, "Either child or node must be specified"),
            ("q", Some("children.0"), Some("n2"), "The parameters child and node are in conflict"),
            ("x", None, Some("n2"), "Cannot find device='x' nor node-name='x'"),
            ("q", None, Some("x"), "Node 'x' not found"),
            ("q", Some("children.9"), None, "Node 'q' does not have child 'children.9'"),
            (
                "q",
                Some("children.0"),
                None,
                "The number of children cannot be lower than the vote threshold 2",
            ),
            ("n0", None, Some("n2"), "The node n0 does not support adding a child"),
            ("q", None, Some("n0"), "The node n0 already has a parent"),
            ("q", None, Some("short"), "Node 'short' and the children of 'q' have different sizes"),
            ("q", None, Some("n2"), ""),
            ("q", Some("children.1"), None, ""),
            ("q", None, Some("n3"), ""),
            ("q", Some("children.3"), None, ""),
            ("q", None, Some("n4"), ""),
        ] {
            assert_eq!(change(parent, child, node).await, expected, "{parent} {child:?} {node:?}");
        }
        let names: Vec<_> = disks.disk.node().unwrap().children().iter().collect();
        let names: Vec<_> =
            names.iter().map(|(_, edge)| (edge.name(), edge.node().name())).collect();
        assert_eq!(names, [("children.0", "n0"), ("children.2", "n2"), ("children.3", "n4")]);
        // The children are writable only through the quorum.
        let node = graph.node("n2").unwrap();
        let permissions = oxblk_core::Permissions::sharing_all(oxblk_core::Perm::WRITE);
        let refused = Backend::new(graph, "other", node, permissions).map(drop).unwrap_err();
        assert!(refused.to_string().starts_with("Permission conflict on node 'n2'"), "{refused}");
        disks.disk.close().await.unwrap();
        let refused = open_refused(graph, "blkverify=on,children.0=n0,children.1=n1").await;
        assert_eq!(refused, "");
        assert_eq!(
            change("v", None, Some("n2")).await,
            "Cannot add a child to a quorum in blkverify mode"
        );
    });
}

/// The message for the quorum `v` that cannot be opened.
async fn open_refused(graph: &Graph, options: &str) -> String {
    let text = format!("driver=quorum,node-name=v,vote-threshold=2,{options}");
    let options = Options::from_dotted(&text, None).unwrap();
    match graph.open(options, OpenFlags::default()).await {
        Ok(node) => {
            graph.keep_open(node).unwrap();
            String::new()
        }
        Err(error) => error.to_string(),
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Random requests of several tasks, some of them cancelled, while children are added, removed and damaged. Reads return the data of the
/// model, and at the end all children have the same data.
fn matches_a_model(seed: u64) {
    sim::run(seed, async move {
        let disks = Rc::new(open(3, ",vote-threshold=2,rewrite-corrupted=on").await);
        disks.children.iter().zip(seed + 1..).for_each(|(child, seed)| child.delay(seed));
        let model = Rc::new((RefCell::new(vec![0; SIZE]), RangeLock::new()));
        let mut tasks = Vec::new();
        for worker in 0..4 {
            let (disks, model) = (Rc::clone(&disks), Rc::clone(&model));
            tasks.push(spawn(async move {
                let mut random = Random(seed * 31 + worker);
                for _ in 0..60 {
                    let offset = random.below(SIZE as u64 - 3000);
                    let len = 1 + random.below(2999);
                    let (start, end) = (usize::try_from(offset).unwrap(), offset + len);
                    let range = start..usize::try_from(end).unwrap();
                    let byte = u8::try_from(random.below(256)).unwrap();
                    match random.below(8) {
                        // The outcome of a cancelled write is unknown until the next write.
                        0 => {
                            let _alone = model.1.lock(offset..end).await;
                            let disk = disks.disk.clone();
                            let data = vec![byte; range.len()];
                            let cancelled = spawn(async move { write(&disk, offset, data).await });
                            for _ in 0..random.below(4) {
                                yield_now().await;
                            }
                            drop(cancelled);
                            drop(disks.disk.quiesce().await);
                            assert_eq!(write(&disks.disk, offset, vec![0; range.len()]).await, 0);
                            model.0.borrow_mut()[range].fill(0);
                        }
                        1 => {
                            let _alone = model.1.lock(offset..end).await;
                            let zeroes = disks.disk.write_zeroes(offset, len, ZeroFlags::empty());
                            zeroes.await.unwrap();
                            model.0.borrow_mut()[range].fill(0);
                        }
                        2 | 3 => {
                            let _alone = model.1.lock(offset..end).await;
                            assert_eq!(
                                write(&disks.disk, offset, vec![byte; range.len()]).await,
                                0
                            );
                            model.0.borrow_mut()[range].fill(byte);
                        }
                        // Writes that overlap reach all children in the same order.
                        4 => {
                            let _alone = model.1.lock(offset..end).await;
                            let one = write(&disks.disk, offset, vec![byte; range.len()]);
                            let other = write(&disks.disk, offset, vec![!byte; range.len()]);
                            assert_eq!(futures_util::future::join(one, other).await, (0, 0));
                            let data = read(&disks.disk, offset, range.len()).await.unwrap();
                            assert!(data.iter().all(|one| *one == data[0]));
                            model.0.borrow_mut()[range].copy_from_slice(&data);
                        }
                        5 => {
                            let _alone = model.1.lock(offset..end).await;
                            let child = &disks.children[0];
                            child.data.lock().unwrap()[range.clone()].fill(byte);
                            let data = read(&disks.disk, offset, range.len()).await.unwrap();
                            assert_eq!(data, model.0.borrow()[range]);
                        }
                        _ => {
                            let _same = model.1.lock_shared(offset..end).await;
                            let data = read(&disks.disk, offset, range.len()).await.unwrap();
                            assert_eq!(data, model.0.borrow()[range]);
                        }
                    }
                }
            }));
        }
        let changes = {
            let disks = Rc::clone(&disks);
            spawn(async move {
                let graph = &disks.graph;
                for round in 0..6 {
                    let (name, node) = (format!("children.{}", 3), format!("m{round}"));
                    // The contents of a new child must be those of the other children.
                    let held = disks.disk.quiesce().await;
                    let (contents, node) = add(graph, &node, SIZE);
                    let same = disks.children[2].bytes();
                    contents.data.lock().unwrap().copy_from_slice(&same);
                    drop(held);
                    let added = graph.change_children("q", None, Some(node.name()));
                    // Writes between the copy and the change make the new child differ. The others outvote it.
                    added.await.unwrap();
                    oxblk_ring::sleep(std::time::Duration::from_millis(1)).await;
                    graph.change_children("q", Some(&name), None).await.unwrap();
                    assert!(graph.change_children("q", Some(&name), None).await.is_err());
                }
            })
        };
        for task in tasks {
            task.await;
        }
        changes.await;
        assert_eq!(read(&disks.disk, 0, SIZE).await.unwrap(), *model.0.borrow());
        for child in &disks.children {
            assert!(child.bytes() == *model.0.borrow(), "the children differ");
        }
        disks.disk.close().await.unwrap();
    });
}

#[test]
fn requests_match_a_model_while_children_change() {
    for seed in 1..=20 {
        matches_a_model(seed);
    }
}
