//! Tests of the filter `throttle` in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use oxblk_core::{Backend, DriverTable, Gate, Graph, Objects, OpenFlags, Options};
use oxblk_filters::throttle::{Group, GroupLimits, Notation, THROTTLE};
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, now, sim, sleep, spawn};

static DRIVERS: DriverTable = &[&NULL_CO, &THROTTLE];

fn options(text: &str) -> Options {
    Options::from_dotted(text, None).unwrap()
}

fn limits(text: &str) -> GroupLimits {
    GroupLimits::take(&mut options(text), Notation::KeyValue).unwrap()
}

/// A graph with the throttle group `g`.
fn graph(text: &str) -> (Graph, Arc<Group>) {
    let objects = Objects::default();
    let group = Group::new("g", limits(text));
    objects.add("g", Arc::clone(&group)).unwrap();
    (Graph::with_objects(DRIVERS, Gate::Anything, objects), group)
}

async fn open(graph: &Graph) -> Backend {
    let disk = "driver=throttle,throttle-group=g,file.driver=null-co,file.size=1G";
    graph.open_backend(None, options(disk), OpenFlags::default()).await.unwrap()
}

/// Sends requests of `len` bytes through `disk`, `depth` at a time, until `end`. Counts the requests that have completed.
fn load(disk: &Backend, writes: bool, len: usize, depth: usize, end: Duration) -> Rc<Cell<u64>> {
    let count = Rc::new(Cell::new(0));
    for _ in 0..depth {
        let (disk, count) = (disk.clone(), Rc::clone(&count));
        spawn(async move {
            while now() < end {
                if writes {
                    disk.write(0, IoBuf::zeroes(len), oxblk_core::WriteFlags::empty())
                        .await
                        .unwrap();
                } else {
                    disk.read(0, IoBufMut::new(len)).await.unwrap();
                }
                if now() <= end {
                    count.set(count.get() + 1);
                }
            }
        })
        .detach();
    }
    count
}

fn assert_close(count: u64, expected: u64) {
    let off = count.abs_diff(expected);
    assert!(off * 50 <= expected, "{count} instead of {expected}");
}

const SECONDS: Duration = Duration::from_secs(10);

/// The number of requests of one disk within ten seconds.
fn requests(text: &str, writes: bool, len: usize, depth: usize) -> u64 {
    sim::run(1, async {
        let (graph, _) = graph(text);
        let disk = open(&graph).await;
        let end = now() + SECONDS;
        let count = load(&disk, writes, len, depth, end);
        sleep(SECONDS * 2).await;
        disk.close().await.unwrap();
        count.get()
    })
}

#[test]
fn rates_are_those_of_the_limits() {
    // A tenth of a second passes at once at the beginning.
    assert_close(requests("x-iops-total=1000", false, 4096, 8), 10_100);
    assert_close(requests("x-iops-total=1000", true, 4096, 1), 10_100);
    assert_close(requests("x-bps-total=4096000", false, 4096, 32), 10_100);
    assert_close(requests("x-bps-write=4096000", true, 8192, 4), 5050);
    // Requests count several times.
    assert_close(requests("x-iops-total=1000,x-iops-size=1024", false, 4096, 8), 2525);
    // The lower limit counts.
    assert_close(requests("x-iops-read=500,x-bps-read=409600000", false, 4096, 8), 5050);
}

#[test]
fn bursts_pass_at_their_rate() {
    assert_close(requests("x-iops-total=100,x-iops-total-max=2000", false, 512, 8), 3000);
    let long = "x-iops-total=100,x-iops-total-max=1000,x-iops-total-max-length=5";
    // The burst ends after (5000 / 900) seconds.
    assert_close(requests(long, false, 512, 8), 6000);
}

#[test]
fn reads_do_not_use_the_limits_of_writes() {
    sim::run(2, async {
        let (graph, _) = graph("x-iops-write=100");
        let disk = open(&graph).await;
        let begin = now();
        for _ in 0..1000 {
            disk.read(0, IoBufMut::new(512)).await.unwrap();
        }
        assert_eq!(now(), begin);
        disk.close().await.unwrap();
    });
}

#[test]
fn members_share_the_limits_fairly() {
    sim::run(3, async {
        let (graph, _) = graph("x-iops-total=1000");
        let mut loads = Vec::new();
        let end = now() + SECONDS;
        // The members have different numbers of requests in flight.
        for depth in [1, 4, 16, 64] {
            let disk = open(&graph).await;
            loads.push((load(&disk, false, 512, depth, end), disk));
        }
        sleep(SECONDS * 2).await;
        let total: u64 = loads.iter().map(|(count, _)| count.get()).sum();
        assert_close(total, 10_100);
        for (count, disk) in loads {
            assert!(count.get() * 4 * 10 >= total * 9, "{} of {total}", count.get());
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn limits_change_while_requests_wait() {
    sim::run(4, async {
        let (graph, group) = graph("x-iops-total=1");
        let disk = open(&graph).await;
        let begin = now();
        let end = begin + SECONDS;
        let count = load(&disk, true, 512, 4, end);
        sleep(Duration::from_millis(500)).await;
        assert!(count.get() <= 2);
        group.set_limits(limits("x-iops-total=1000"));
        sleep(Duration::from_secs(1)).await;
        assert_close(count.get(), 1100);
        group.set_limits(GroupLimits::default());
        // Without limits, requests do not wait, so virtual time would not pass.
        group.set_limits(limits("x-iops-total=10"));
        sleep(SECONDS * 2).await;
        assert!(now() > end);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_request_that_is_dropped_gives_its_turn_to_the_next() {
    sim::run(5, async {
        let (graph, _) = graph("x-iops-total=10");
        let disk = open(&graph).await;
        let read = || {
            let disk = disk.clone();
            spawn(async move { disk.read(0, IoBufMut::new(512)).await.unwrap() })
        };
        // Two requests pass at once, and one has the turn.
        let first: Vec<_> = (0..3).map(|_| read()).collect();
        let last = read();
        sleep(Duration::from_millis(1)).await;
        drop(first);
        let begin = now();
        last.await;
        assert!(now() - begin <= Duration::from_millis(101), "{:?}", now() - begin);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_missing_group_gets_the_messages_of_qemu() {
    sim::run(6, async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        for (text, message) in [
            ("driver=throttle,file.driver=null-co", "Please specify a throttle group"),
            (
                "driver=throttle,throttle-group=x,file.driver=null-co",
                "Throttle group 'x' does not exist",
            ),
        ] {
            let refused = graph.open(options(text), OpenFlags::default()).await.unwrap_err();
            assert_eq!(refused.to_string(), message);
        }
        assert!(graph.nodes().is_empty());
    });
}
