//! The filter `replication`: the guest of a secondary always sees the last checkpoint and its own writes, whatever is written to
//! the secondary disk.

use std::sync::Arc;

use futures_util::future::join;
use oxblk_core::{
    Backend, Errno, Gate, Graph, Node, OpenFlags, Options, Perm, Permissions, ReplicationMode,
    Result, WriteFlags, ZeroFlags,
};
use oxblk_filters::replication::{checkpoint_all, errors, start_all, stop_all};
use oxblk_ring::sim::{Disk, Faults};
use oxblk_ring::{IoBuf, IoBufMut, sim};
use oxblk_tests::program::Program;
use oxblk_tests::random::Random;
use oxblk_tests::sim_disk::{self, Pace};
use oxblk_tests::{scaled, scratch};

const SIZE: usize = (1 << 20) - 512;

/// The bytes of an empty qcow2 image of `size` bytes.
fn template(size: usize) -> Vec<u8> {
    let directory = scratch::in_memory();
    let path = directory.path().join("empty.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=16k"];
    Program::new("qemu-img").args(create).arg(&path).arg(size.to_string()).succeed();
    std::fs::read(path).expect("the image that was made")
}

struct Secondary {
    graph: Graph,
    disks: [Disk; 3],
    guest: Backend,
    server: Backend,
    /// What the guest sees.
    seen: Vec<u8>,
    /// What the server has written.
    replicated: Vec<u8>,
}

fn options(text: &str) -> Options {
    Options::from_dotted(text, None).expect("options")
}

async fn open(graph: &Graph, text: &str) -> Arc<Node> {
    graph.open(options(text), OpenFlags::default()).await.expect("it opens")
}

fn backend(graph: &Graph, name: &str, node: Arc<Node>) -> Backend {
    let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE);
    Backend::new(graph, name, node, permissions).expect("a backend")
}

/// A graph with the disk files of the nodes.
fn graph(sizes: [usize; 3]) -> (Graph, [Disk; 3]) {
    let graph = Graph::new(oxblk::drivers(), Gate::Anything);
    let mut old = vec![0; sizes[2]];
    Random::new(7).fill(&mut old);
    let disks = [template(sizes[0]), template(sizes[1]), old];
    let [active, hidden, secondary] = &disks;
    let disks = [(1, active), (2, hidden), (3, secondary)]
        .map(|(seed, bytes)| Disk::from_bytes(seed, bytes));
    for (name, disk) in ["active-file", "hidden-file", "secondary"].iter().zip(&disks) {
        let node = sim_disk::add(&graph, name, disk, false, Pace::GivesWay).expect("a node");
        graph.keep_open(node).expect("the node has an owner");
    }
    (graph, disks)
}

const CHAIN: &str = "file.driver=qcow2,file.file=active-file,file.backing.driver=qcow2,\
                     file.backing.file=hidden-file,file.backing.backing=secondary";

impl Secondary {
    async fn open() -> Self {
        let (graph, disks) = graph([SIZE; 3]);
        let server = backend(&graph, "nbd", graph.node("secondary").expect("the node"));
        let text = format!("driver=replication,mode=secondary,top-id=r,node-name=r,{CHAIN}");
        let guest = backend(&graph, "guest", open(&graph, &text).await);
        let bytes = disks[2].bytes();
        Self { graph, disks, guest, server, seen: bytes.clone(), replicated: bytes }
    }

    async fn start(&mut self) {
        start_all(&self.graph, ReplicationMode::Secondary).await.expect("it starts");
        self.seen.clone_from(&self.replicated);
    }

    /// Makes requests of the guest and of the server at the same time.
    async fn use_disks(&mut self, random: &mut Random) {
        let (mut one, mut other) = (random.fork(), random.fork());
        let (guest, server) = (&self.guest, &self.server);
        let (seen, replicated) = (&mut self.seen, &mut self.replicated);
        join(
            async {
                for _ in 0..20 {
                    if one.one_in(2) {
                        check(guest, &mut one, seen).await;
                    } else {
                        write(guest, &mut one, seen).await;
                    }
                }
            },
            async {
                for _ in 0..20 {
                    write(server, &mut other, replicated).await;
                }
            },
        )
        .await;
    }

    async fn check_all(&self) {
        let found = self.guest.read(0, IoBufMut::new(SIZE)).await.expect("the guest reads");
        assert!(*found == *self.seen, "the guest sees other data");
    }

    fn set_faults(&self, rate: f64) {
        for disk in &self.disks {
            disk.set_faults(Faults { fail_rate: rate, ..Faults::default() });
        }
    }

    async fn close(self) {
        self.guest.close().await.expect("it closes");
        self.server.close().await.expect("it closes");
        for _ in 0..1000 {
            oxblk_ring::yield_now().await;
        }
        for name in ["active-file", "hidden-file", "secondary"] {
            let node = self.graph.node(name).expect("the node");
            self.graph.allow_close(node).await.expect("it closes");
        }
        let left: Vec<_> = self.graph.nodes().iter().map(|node| node.name().to_owned()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn range(random: &mut Random) -> std::ops::Range<usize> {
    let start = usize::try_from(random.below(SIZE as u64)).expect("a small number");
    let most = if random.one_in(3) { 200_000 } else { 5000 };
    let len = usize::try_from(random.within(1, most)).expect("a small number");
    start..(start + len).min(SIZE)
}

async fn check(disk: &Backend, random: &mut Random, expected: &[u8]) {
    let range = range(random);
    let found = disk.read(range.start as u64, IoBufMut::new(range.len())).await;
    assert!(*found.expect("a read") == expected[range.clone()], "other data at {range:?}");
}

async fn write(disk: &Backend, random: &mut Random, expected: &mut [u8]) {
    let range = range(random);
    let mut data = vec![0; range.len()];
    let written = if random.one_in(4) {
        disk.write_zeroes(range.start as u64, range.len() as u64, ZeroFlags::MAY_UNMAP).await
    } else {
        random.fill(&mut data);
        disk.write(range.start as u64, IoBuf::from(data.clone()), WriteFlags::empty()).await
    };
    written.expect("a write");
    expected[range].copy_from_slice(&data);
}

/// The error of an operation as text.
fn text(outcome: Result<()>) -> String {
    outcome.expect_err("an error").to_string()
}

async fn is_refused(disk: &Backend) -> bool {
    let read = disk.read(0, IoBufMut::new(512)).await.map(drop);
    let write = disk.write(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()).await;
    [read, write]
        .iter()
        .all(|outcome| outcome.as_ref().is_err_and(|error| error.raw_errno() == Errno::IO))
}

#[test]
fn the_guest_sees_the_last_checkpoint_and_its_own_writes() {
    for seed in 0..scaled(6) {
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let mut disks = Secondary::open().await;
            assert!(is_refused(&disks.guest).await);
            disks.start().await;
            for _ in 0..8 {
                disks.use_disks(&mut random).await;
                disks.check_all().await;
                errors(&disks.graph).expect("no error");
                match random.below(4) {
                    0 => {
                        stop_all(&disks.graph, false).await.expect("it stops");
                        disks.seen.clone_from(&disks.replicated);
                        disks.check_all().await;
                        disks.start().await;
                    }
                    1 => {}
                    _ => {
                        checkpoint_all(&disks.graph).await.expect("a checkpoint");
                        disks.seen.clone_from(&disks.replicated);
                        disks.check_all().await;
                    }
                }
            }
            if random.one_in(3) {
                disks.close().await;
                return;
            }
            stop_all(&disks.graph, true).await.expect("a failover");
            disks.check_all().await;
            assert!(disks.disks[2].bytes() == disks.seen, "the secondary disk has other data");
            let file = disks.graph.node("active-file").expect("the node");
            assert!(!file.has_parents());
            // The guest uses the secondary disk now. Further operations have no effect.
            start_all(&disks.graph, ReplicationMode::Secondary).await.expect("no effect");
            checkpoint_all(&disks.graph).await.expect("no effect");
            write(&disks.guest, &mut random, &mut disks.seen).await;
            stop_all(&disks.graph, false).await.expect("no effect");
            disks.check_all().await;
            disks.close().await;
        });
    }
}

#[test]
fn a_failed_checkpoint_or_failover_never_shows_wrong_data() {
    let mut failed = [0; 2];
    for seed in 0..scaled(30) {
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let mut disks = Secondary::open().await;
            disks.start().await;
            disks.use_disks(&mut random).await;
            let is_failover = random.one_in(2);
            disks.set_faults(0.05);
            let outcome = match is_failover {
                true => stop_all(&disks.graph, true).await,
                false => checkpoint_all(&disks.graph).await,
            };
            disks.set_faults(0.0);
            let is_lost = disks.guest.read(0, IoBufMut::new(512)).await.is_err();
            match (&outcome, is_failover) {
                (Err(_), true) => {
                    failed[0] += 1;
                    disks.check_all().await;
                    if stop_all(&disks.graph, true).await.is_ok() {
                        assert!(disks.disks[2].bytes() == disks.seen, "other data");
                    }
                    disks.check_all().await;
                }
                (Err(_), false) => {
                    failed[1] += 1;
                    if is_lost {
                        assert_eq!(text(errors(&disks.graph)), "I/O error occurred");
                        stop_all(&disks.graph, true).await.expect_err("the data was lost");
                        if checkpoint_all(&disks.graph).await.is_ok() {
                            disks.seen.clone_from(&disks.replicated);
                            disks.check_all().await;
                        }
                    } else {
                        disks.check_all().await;
                    }
                }
                (Ok(()), true) => disks.check_all().await,
                (Ok(()), false) => {
                    disks.seen.clone_from(&disks.replicated);
                    disks.check_all().await;
                }
            }
        });
    }
    assert!(failed.iter().all(|count| *count > 0), "{failed:?}");
}

#[test]
fn operations_in_other_stages_are_refused_with_the_texts_of_qemu() {
    sim::run(1, async {
        let mut disks = Secondary::open().await;
        let graph = disks.graph.clone();
        let not_running = "Block replication is not running";
        assert_eq!(text(errors(&graph)), not_running);
        assert_eq!(text(checkpoint_all(&graph).await), not_running);
        assert_eq!(text(stop_all(&graph, false).await), not_running);
        stop_all(&graph, true).await.expect("no effect");
        let other = start_all(&graph, ReplicationMode::Primary).await;
        assert_eq!(text(other), "The parameter mode's value is invalid, needs 1, but got 0");
        disks.start().await;
        let again = start_all(&graph, ReplicationMode::Secondary).await;
        assert_eq!(text(again), "Block replication is running or done");
        disks.close().await;
    });
}

#[test]
fn disks_that_are_not_suitable_are_refused_with_the_texts_of_qemu() {
    let backing = "file.driver=qcow2,file.file=active-file";
    let hidden = format!("{backing},file.backing.driver=qcow2,file.backing.file=hidden-file");
    let sizes = "Active disk, hidden disk, secondary disk's length are not the same";
    let top = "No top_bs or it is invalid";
    for (len, id, chain, has_server, message) in [
        (SIZE, "r", backing, true, "Active disk doesn't have backing file"),
        (SIZE, "r", &hidden, true, "Hidden disk doesn't have backing file"),
        (SIZE, "r", CHAIN, false, "The secondary disk doesn't have block backend"),
        (SIZE + 512, "r", CHAIN, true, sizes),
        (SIZE, "x", CHAIN, true, top),
        (SIZE, "nbd", CHAIN, true, top),
    ] {
        sim::run(1, async {
            let (graph, _) = graph([SIZE, SIZE, len]);
            let secondary = graph.node("secondary").expect("the node");
            let _server = has_server.then(|| backend(&graph, "nbd", secondary));
            let text_of =
                format!("driver=replication,mode=secondary,top-id={id},node-name=r,{chain}");
            let guest = backend(&graph, "guest", open(&graph, &text_of).await);
            let found = text(start_all(&graph, ReplicationMode::Secondary).await);
            assert!(found.ends_with(message), "{found}");
            assert!(is_refused(&guest).await);
        });
    }
}

#[test]
fn a_primary_passes_writes_on_and_reports_their_errors() {
    sim::run(1, async {
        let (graph, disks) = graph([SIZE; 3]);
        let text_of = "driver=replication,mode=primary,node-name=r,file=secondary";
        let disk = backend(&graph, "guest", open(&graph, text_of).await);
        assert!(is_refused(&disk).await);
        start_all(&graph, ReplicationMode::Primary).await.expect("it starts");
        let data = || IoBuf::from(vec![9; 4096]);
        disk.write(0, data(), WriteFlags::empty()).await.expect("a write");
        assert_eq!(disks[2].bytes()[..4096], [9; 4096]);
        assert!(disk.read(0, IoBufMut::new(512)).await.is_err());
        errors(&graph).expect("no error");
        disks[2].set_faults(Faults { fail_rate: 1.0, ..Faults::default() });
        disk.write(0, data(), WriteFlags::empty()).await.expect("the guest gets no error");
        disks[2].set_faults(Faults::default());
        assert_eq!(text(errors(&graph)), "I/O error occurred");
        checkpoint_all(&graph).await.expect("a checkpoint");
        assert_eq!(text(errors(&graph)), "I/O error occurred");
        stop_all(&graph, true).await.expect("it stops");
        errors(&graph).expect("no error");
        assert!(is_refused(&disk).await);
        disk.close().await.expect("it closes");
    });
}
