//! Tests of changes of the graph while requests are made: filters inserted and removed, roots and children replaced.

use std::pin::pin;
use std::sync::Arc;

use futures_util::future::{Either, join, select};
use futures_util::poll;
use oxblk_core::{
    Backend, ChildIdx, ErrorKind, Graph, Node, OpenFlags, Perm, Permissions, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, spawn, yield_now};

use crate::memory::{Memory, graph, node, options};

const NONE: WriteFlags = WriteFlags::empty();

async fn open(graph: &Graph, dotted: &str) -> Arc<Node> {
    graph.open(options(dotted), OpenFlags::default()).await.unwrap()
}

fn memory_of(size: usize) -> Arc<Memory> {
    Memory::slow(size, 0)
}

/// A disk of 4 KiB in a new graph.
struct Setup {
    graph: Graph,
    memory: Arc<Memory>,
    /// The root node, `m`.
    below: Arc<Node>,
    disk: Backend,
}

/// Each request of the disk yields `yields` times to other tasks.
fn setup(yields: u32) -> Setup {
    let graph = graph();
    let memory = Memory::slow(4096, yields);
    let below = node(&graph, "m", &memory);
    let disk = Backend::new(&graph, "", Arc::clone(&below), super::all()).unwrap();
    Setup { graph, memory, below, disk }
}

/// The filter `f` above the node `m`.
async fn filter(graph: &Graph) -> Arc<Node> {
    open(graph, "driver=pass,node-name=f,file=m").await
}

async fn replace(graph: &Graph, old: &Arc<Node>, new: &Arc<Node>) -> oxblk_core::Result<()> {
    let mut change = graph.change();
    change.replace_node(old, new, |_| true);
    change.run().await
}

fn taken(memory: &Memory) -> Perm {
    memory.permissions.lock().unwrap().map_or(Perm::empty(), |permissions| permissions.taken)
}

#[test]
fn a_filter_is_inserted_above_a_node_and_removed_again() {
    block_on(async {
        let Setup { graph, memory, below, disk } = setup(0);
        disk.write(0, vec![1; 512].into(), NONE).await.unwrap();
        let filter = filter(&graph).await;
        replace(&graph, &below, &filter).await.unwrap();
        assert_eq!(memory.take_log(), ["write 0+512", "flush 0+0"]);
        assert_eq!(disk.node().unwrap().name(), "f");
        assert!(taken(&memory).contains(Perm::WRITE | Perm::CONSISTENT_READ));
        disk.write(512, vec![2; 512].into(), NONE).await.unwrap();
        let mut change = graph.change();
        change.remove_filter(&filter);
        change.run().await.unwrap();
        drop(filter);
        assert!(graph.node("f").is_none());
        assert_eq!(disk.node().unwrap().name(), "m");
        let read = disk.read(0, IoBufMut::new(1024)).await.unwrap();
        assert!(read[..512].iter().all(|byte| *byte == 1) && read[512..].iter().all(|b| *b == 2));
        disk.close().await.unwrap();
        assert!(graph.nodes().is_empty() || Arc::strong_count(&below) == 1);
        assert_eq!(memory.take_log().last().unwrap(), "close 0+0");
    });
}

#[test]
fn requests_that_are_made_during_a_change_use_the_new_node() {
    block_on(async {
        let Setup { graph, below, disk, .. } = setup(5);
        let filter = filter(&graph).await;
        let (first, second) = {
            let (one, two) = (disk.clone(), disk.clone());
            let first = spawn(async move { one.write(0, vec![1; 512].into(), NONE).await });
            yield_now().await;
            let graph = graph.clone();
            let change = spawn(async move { replace(&graph, &below, &filter).await });
            yield_now().await;
            let second = spawn(async move {
                two.write(512, vec![2; 512].into(), NONE).await.unwrap();
                two.node().unwrap().name().to_owned()
            });
            change.await.unwrap();
            (first.await, second.await)
        };
        first.unwrap();
        assert_eq!(second, "f");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_close_that_waits_while_its_root_moves_closes_the_new_root() {
    block_on(async {
        let Setup { graph, memory, below, disk } = setup(3);
        let filter = filter(&graph).await;
        let mut write = pin!(disk.write(0, vec![1; 512].into(), NONE));
        assert!(poll!(&mut write).is_pending());
        let mut change = pin!(replace(&graph, &below, &filter));
        assert!(poll!(&mut change).is_pending());
        let mut close = pin!(disk.close());
        assert!(poll!(&mut close).is_pending());
        let (written, (changed, closed)) = join(write, join(change, close)).await;
        written.and(changed).and(closed).unwrap();
        let log = memory.take_log();
        assert_eq!(log.first().unwrap(), "write 0+512");
        assert_eq!(log.last().unwrap(), "close 0+0");
        assert_eq!(log.iter().filter(|entry| *entry == "close 0+0").count(), 1);
        assert_eq!(taken(&memory), Perm::empty());
        assert!(!below.has_parents() && !filter.has_parents());
    });
}

#[test]
fn a_node_that_loses_its_last_user_is_flushed_and_closed() {
    block_on(async {
        let graph = graph();
        let (old, new) = (memory_of(4096), memory_of(8192));
        let disk = Backend::new(&graph, "", node(&graph, "old", &old), super::all()).unwrap();
        let medium = node(&graph, "new", &new);
        disk.write(0, vec![1; 512].into(), NONE).await.unwrap();
        let mut change = graph.change();
        change.set_root(&disk, &medium);
        change.run().await.unwrap();
        assert_eq!(old.take_log(), ["write 0+512", "flush 0+0", "close 0+0"]);
        assert!(graph.node("old").is_none());
        assert_eq!(taken(&old), Perm::empty());
        assert_eq!(disk.size(), 8192);
        disk.write(4096, vec![1; 512].into(), NONE).await.unwrap();
        disk.close().await.unwrap();
        assert_eq!(new.take_log(), ["write 4096+512", "flush 0+0", "close 0+0"]);
    });
}

#[test]
fn the_user_gets_its_permission_back_if_its_root_moved_during_a_job() {
    block_on(async {
        let Setup { graph, below, disk, .. } = setup(0);
        let job = disk.sole_writer("test job").await.unwrap();
        let filter = filter(&graph).await;
        replace(&graph, &below, &filter).await.unwrap();
        assert_eq!(disk.node().unwrap().name(), "f");
        // The job stays at its node.
        assert_eq!(job.backend().node().unwrap().name(), "m");
        job.backend().write(0, vec![1; 512].into(), NONE).await.unwrap();
        let error = disk.write(0, vec![1; 512].into(), NONE).await.unwrap_err();
        assert!(error.to_string().contains("cannot write during the test job"), "{error}");
        job.end().await.unwrap();
        disk.write(0, vec![2; 512].into(), NONE).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_backend_that_is_attached_during_a_change_moves_too() {
    block_on(async {
        let Setup { graph, below, disk: first, .. } = setup(5);
        let filter = filter(&graph).await;
        let mut write = pin!(first.write(0, vec![1; 512].into(), NONE));
        assert!(poll!(&mut write).is_pending());
        // The write is at the driver.
        yield_now().await;
        let mut change = pin!(replace(&graph, &below, &filter));
        assert!(poll!(&mut change).is_pending());
        let second = Backend::new(&graph, "", Arc::clone(&below), super::all()).unwrap();
        let reading = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let lowered = first.set_permissions(reading);
        let (written, (changed, lowered)) = join(write, join(change, lowered)).await;
        written.and(changed).and(lowered).unwrap();
        assert_eq!(second.node().unwrap().name(), "f");
        // The change keeps the permissions that the backend has when the change is made.
        assert_eq!(first.root().unwrap().permissions().taken, Perm::CONSISTENT_READ);
        first.close().await.unwrap();
        second.close().await.unwrap();
    });
}

#[test]
fn a_flush_through_a_node_above_covers_the_data_of_a_new_child() {
    block_on(async {
        let graph = graph();
        let (one, two) = (memory_of(4096), memory_of(4096));
        let (_one, new) = (node(&graph, "m", &one), node(&graph, "n", &two));
        let filter = filter(&graph).await;
        let top = open(&graph, "driver=pass,node-name=top,file=f").await;
        let disk = Backend::new(&graph, "", top, super::all()).unwrap();
        let other = Backend::new(&graph, "", Arc::clone(&new), super::all()).unwrap();
        other.write(0, vec![7; 512].into(), NONE).await.unwrap();
        let mut change = graph.change();
        change.replace_child(&filter, ChildIdx::FILE, Some(&new));
        change.run().await.unwrap();
        two.take_log();
        disk.flush().await.unwrap();
        assert_eq!(two.take_log(), ["flush 0+0"]);
        assert_eq!(one.take_log(), ["flush 0+0", "close 0+0"]);
        disk.close().await.unwrap();
        other.close().await.unwrap();
    });
}

#[test]
fn the_sizes_of_the_nodes_above_follow_a_new_child() {
    block_on(async {
        let graph = graph();
        let (one, two) = (memory_of(4096), memory_of(8192));
        let (_one, new) = (node(&graph, "m", &one), node(&graph, "n", &two));
        let filter = filter(&graph).await;
        let top = open(&graph, "driver=pass,node-name=top,file=f").await;
        let disk = Backend::new(&graph, "", top, super::all()).unwrap();
        let mut change = graph.change();
        change.replace_child(&filter, ChildIdx::FILE, Some(&new));
        change.run().await.unwrap();
        assert_eq!(disk.size(), 8192);
        disk.write(8191, IoBuf::zeroes(1), NONE).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_control_operation_fails_if_its_node_has_left_the_disk() {
    block_on(async {
        let graph = graph();
        let old = Memory::slow(4096, 3);
        let new = memory_of(4096);
        let (first, second) = (node(&graph, "old", &old), node(&graph, "new", &new));
        let disk = Backend::new(&graph, "", Arc::clone(&first), super::all()).unwrap();
        let mut write = pin!(disk.write(0, vec![1; 512].into(), NONE));
        assert!(poll!(&mut write).is_pending());
        let mut change = pin!(replace(&graph, &first, &second));
        assert!(poll!(&mut change).is_pending());
        let mut resize = pin!(disk.resize(1024, oxblk_core::Preallocation::Off));
        assert!(poll!(&mut resize).is_pending());
        let (written, (changed, resized)) = join(write, join(change, resize)).await;
        written.and(changed).unwrap();
        assert_eq!(resized.unwrap_err().raw_errno(), oxblk_core::Errno::NOMEDIUM);
        assert_eq!(disk.size(), 4096);
        disk.close().await.unwrap();
    });
}

#[test]
fn impossible_changes_are_refused_and_change_nothing() {
    block_on(async {
        let graph = graph();
        let memory = memory_of(4096);
        let below = node(&graph, "m", &memory);
        let filter = filter(&graph).await;
        let disk = Backend::new(&graph, "", Arc::clone(&filter), super::all()).unwrap();
        let refused = async |parent: &Arc<Node>, child, new: Option<&Arc<Node>>| {
            let mut change = graph.change();
            change.replace_child(parent, child, new);
            change.run().await.unwrap_err().to_string()
        };
        assert_eq!(
            refused(&filter, ChildIdx::BACKING, Some(&below)).await,
            "Node 'f' (driver 'pass') has no child 'backing'"
        );
        assert_eq!(
            refused(&filter, ChildIdx::FILE, None).await,
            "Cannot remove the 'file' child of 'f'"
        );
        assert_eq!(
            refused(&filter, ChildIdx::FILE, Some(&filter)).await,
            "Making 'f' a file child of 'f' would create a cycle"
        );
        let stranger = crate::memory::graph();
        let other = node(&stranger, "x", &memory_of(4096));
        assert_eq!(
            refused(&filter, ChildIdx::FILE, Some(&other)).await,
            "Nodes 'f' and 'x' belong to different graphs"
        );
        assert_eq!(filter.child(ChildIdx::FILE).unwrap().name(), "m");
        disk.close().await.unwrap();
        let error = replace(&graph, &filter, &below).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    });
}

/// If the time of a change were quadratic in the number of users, this test would take minutes.
#[test]
fn a_filter_is_inserted_above_a_node_with_ten_thousand_users() {
    block_on(async {
        let graph = graph();
        let memory = memory_of(4096);
        let below = node(&graph, "m", &memory);
        let disks: Vec<_> = (0..10_000).map(|_| Backend::empty(&graph, "", super::all())).collect();
        let mut change = graph.change();
        disks.iter().for_each(|disk| change.set_root(disk, &below));
        change.run().await.unwrap();
        let filter = filter(&graph).await;
        replace(&graph, &below, &filter).await.unwrap();
        assert!(disks.iter().all(|disk| disk.node().unwrap().name() == "f"));
        disks[9_999].write(0, vec![1; 512].into(), NONE).await.unwrap();
        let mut change = graph.change();
        disks.iter().for_each(|disk| change.remove_root(disk));
        change.run().await.unwrap();
        assert_eq!(memory.take_log().last().unwrap(), "close 0+0");
        assert!(disks.iter().all(|disk| disk.node().is_err()));
    });
}

#[test]
fn only_a_backing_file_can_be_removed_from_a_node_without_a_list_of_children() {
    block_on(async {
        let graph = graph();
        let below = node(&graph, "m", &memory_of(4096));
        let filter = filter(&graph).await;
        let error = graph.change_children("f", None, Some("m")).await.unwrap_err();
        assert_eq!(error.to_string(), "The node f does not support adding a child");
        let error = graph.change_children("f", Some("file"), None).await.unwrap_err();
        assert_eq!(error.to_string(), "The node f does not support removing a child");
        let mut change = graph.change();
        change.replace_child(&filter, ChildIdx::FILE, None);
        let error = change.run().await.unwrap_err();
        assert_eq!(error.to_string(), "Cannot remove the 'file' child of 'f'");
        graph.release(filter).await.unwrap();
        drop(below);
    });
}

#[test]
fn a_change_waits_for_requests_in_flight() {
    block_on(async {
        let Setup { graph, below, disk, .. } = setup(100_000);
        let filter = filter(&graph).await;
        let mut write = pin!(disk.write(0, vec![1; 512].into(), NONE));
        assert!(poll!(&mut write).is_pending());
        let change = pin!(replace(&graph, &below, &filter));
        let pause = pin!(async {
            for _ in 0..20 {
                yield_now().await;
            }
        });
        let change = match select(change, pause).await {
            Either::Right(((), change)) => change,
            Either::Left((outcome, _)) => panic!("the change did not wait: {outcome:?}"),
        };
        assert_eq!(disk.node().unwrap().name(), "m");
        let (written, changed) = join(write, change).await;
        written.and(changed).unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_medium_is_inserted_and_removed() {
    block_on(async {
        let graph = graph();
        let (one, two) = (memory_of(4096), memory_of(8192));
        let disk = Backend::empty(&graph, "cd0", super::all());
        let nomedium = |error: oxblk_core::Error| assert_eq!(error.raw_errno(), 123);
        nomedium(disk.read(0, IoBufMut::new(512)).await.unwrap_err());
        nomedium(disk.flush().await.unwrap_err());
        assert_eq!(disk.size(), 0);
        let first = node(&graph, "one", &one);
        disk.insert(&first).await.unwrap();
        disk.write(0, vec![1; 512].into(), NONE).await.unwrap();
        let second = node(&graph, "two", &two);
        let refused = disk.insert(&second).await.unwrap_err();
        assert_eq!(refused.to_string(), "There already is a medium in device 'cd0'");
        disk.remove().await.unwrap();
        assert_eq!(one.take_log(), ["write 0+512", "flush 0+0", "close 0+0"]);
        nomedium(disk.write(0, vec![1; 512].into(), NONE).await.unwrap_err());
        disk.remove().await.unwrap();
        disk.insert(&second).await.unwrap();
        assert_eq!(disk.size(), 8192);
        disk.close().await.unwrap();
        assert_eq!(two.take_log(), ["flush 0+0", "close 0+0"]);
        nomedium(disk.insert(&first).await.unwrap_err());
        assert!(disk.is_closed() && graph.backends().is_empty());
    });
}

#[test]
fn a_change_flushes_data_that_an_overlapping_flush_has_not_covered() {
    block_on(async {
        let graph = graph();
        let one = Memory::slow(4096, 5);
        let two = memory_of(4096);
        let (_m, new) = (node(&graph, "m", &one), node(&graph, "n", &two));
        let filter = filter(&graph).await;
        let top = open(&graph, "driver=pass,node-name=top,file=f").await;
        let disk = Backend::new(&graph, "", top, super::all()).unwrap();
        // Keeps the filter open, as a backing file of an overlay is.
        graph.keep_open(Arc::clone(&filter)).unwrap();
        let (writer, flusher) = (disk.clone(), disk.clone());
        let write = spawn(async move { writer.write(0, vec![7; 512].into(), NONE).await });
        yield_now().await;
        let flush = spawn(async move { flusher.flush().await });
        write.await.unwrap();
        flush.await.unwrap();
        one.take_log();
        replace(&graph, &filter, &new).await.unwrap();
        assert_eq!(one.take_log(), ["flush 0+0"]);
        graph.allow_close(filter).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_closed_backend_gets_no_root_node() {
    block_on(async {
        let graph = graph();
        let (one, two) = (memory_of(4096), memory_of(8192));
        let disk = Backend::new(&graph, "", node(&graph, "m", &one), super::all()).unwrap();
        let new = node(&graph, "n", &two);
        let mut change = graph.change();
        change.set_root(&disk, &new);
        disk.close().await.unwrap();
        assert_eq!(change.run().await.unwrap_err().raw_errno(), oxblk_core::Errno::NOMEDIUM);
        assert!(disk.root().is_err() && !new.has_parents());
    });
}

#[test]
fn a_filter_is_removed_above_the_node_that_is_below_it_at_that_time() {
    block_on(async {
        let graph = graph();
        let memory = memory_of(4096);
        let below = node(&graph, "m", &memory);
        let upper = filter(&graph).await;
        let disk = Backend::new(&graph, "", Arc::clone(&upper), super::all()).unwrap();
        let mut removal = graph.change();
        removal.remove_filter(&upper);
        let lower = open(&graph, "driver=pass,node-name=g,file=m").await;
        replace(&graph, &below, &lower).await.unwrap();
        removal.run().await.unwrap();
        assert_eq!(disk.node().unwrap().name(), "g");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_disk_that_has_moved_away_gets_its_permission_back_only_without_a_conflict() {
    block_on(async {
        let graph = graph();
        let (one, two) = (memory_of(4096), memory_of(8192));
        let disk = Backend::new(&graph, "", node(&graph, "m", &one), super::all()).unwrap();
        let new = node(&graph, "n", &two);
        let job = disk.sole_writer("test job").await.unwrap();
        let mut change = graph.change();
        change.set_root(&disk, &new);
        change.run().await.unwrap();
        let alone = Permissions { taken: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
        let reader = Backend::new(&graph, "", Arc::clone(&new), alone).unwrap();
        job.end().await.unwrap();
        let refused = disk.write(0, vec![1; 512].into(), NONE).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied);
        assert!(!taken(&two).contains(Perm::WRITE));
        reader.close().await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn permissions_that_were_lowered_during_a_job_stay_low_after_it() {
    block_on(async {
        let graph = graph();
        let memory = memory_of(4096);
        let disk = Backend::new(&graph, "", node(&graph, "m", &memory), super::all()).unwrap();
        let job = disk.sole_writer("test job").await.unwrap();
        let reading = Permissions::sharing_all(Perm::CONSISTENT_READ);
        disk.set_permissions(reading).await.unwrap();
        job.end().await.unwrap();
        assert_eq!(taken(&memory), Perm::CONSISTENT_READ);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_change_waits_for_a_control_operation_on_a_node_above() {
    block_on(async {
        let graph = graph();
        let memory = Memory::slow(4096, 200);
        let _below = node(&graph, "m", &memory);
        let lower = filter(&graph).await;
        let upper = open(&graph, "driver=pass,node-name=top,file=f").await;
        let disk = Backend::new(&graph, "", Arc::clone(&upper), super::all()).unwrap();
        let new = node(&graph, "n", &memory_of(4096));
        disk.write(0, vec![1; 512].into(), NONE).await.unwrap();
        let mut last = pin!(disk.close());
        assert!(poll!(&mut last).is_pending());
        yield_now().await;
        let mut change = pin!(replace(&graph, &lower, &new));
        assert!(poll!(&mut change).is_pending());
        last.await.unwrap();
        // The filter was closed meanwhile.
        assert!(change.await.is_err());
        assert!(!new.has_parents());
    });
}
