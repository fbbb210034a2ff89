//! Tests of the filter `blkdebug` on null disks, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use oxblk_core::{
    Backend, DebugEvent, DriverTable, Errno, Gate, Graph, OpenFlags, Options, WriteFlags, ZeroFlags,
};
use oxblk_filters::blkdebug::BLKDEBUG;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, now, sim, spawn, yield_now};

static DRIVERS: DriverTable = &[&NULL_CO, &BLKDEBUG];

/// A graph, and a node with these options.
async fn open(options: &str) -> (Graph, Backend) {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let text = format!("driver=blkdebug,image.driver=null-co{options}");
    let options = Options::from_dotted(&text, None).unwrap();
    let disk = graph.open_backend(None, options, OpenFlags::default()).await.unwrap();
    (graph, disk)
}

async fn read(disk: &Backend, offset: u64) -> i32 {
    disk.read(offset, IoBufMut::new(512)).await.map_or_else(|error| error.raw_errno(), |_| 0)
}

async fn write(disk: &Backend, offset: u64, len: usize) -> i32 {
    let outcome = disk.write(offset, IoBuf::zeroes(len), WriteFlags::empty()).await;
    outcome.map_or_else(|error| error.raw_errno(), |()| 0)
}

#[test]
fn a_rule_fails_requests_after_its_event() {
    sim::run(1, async {
        let rules = ",inject-error.0.event=pwritev,inject-error.0.errno=28,inject-error.0.once=on";
        let (_, disk) = open(rules).await;
        assert_eq!(read(&disk, 0).await, 0);
        assert_eq!(write(&disk, 0, 512).await, Errno::NOSPC);
        assert_eq!(write(&disk, 0, 512).await, 0);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_rule_concerns_only_its_type_of_request() {
    sim::run(2, async {
        for (io, expected) in [
            ("read", [true, false, false, false, false]),
            ("write", [false, true, false, false, false]),
            ("write-zeroes", [false, false, true, false, false]),
            ("discard", [false, false, false, true, false]),
            ("flush", [false, false, false, false, true]),
        ] {
            let options =
                format!(",discard=unmap,inject-error.0.event=none,inject-error.0.iotype={io}");
            let (_, disk) = open(&options).await;
            let failed = [
                read(&disk, 0).await != 0,
                write(&disk, 0, 512).await != 0,
                disk.write_zeroes(0, 512, ZeroFlags::empty()).await.is_err(),
                disk.discard(0, 512).await.is_err(),
                disk.flush().await.is_err(),
            ];
            assert_eq!(failed, expected, "{io}");
            drop(disk.close().await);
        }
    });
}

#[test]
fn a_delay_takes_time_and_is_no_error_without_an_errno() {
    sim::run(3, async {
        let rule = ",inject-error.0.event=none,inject-error.0.delay-ns=1000000";
        for (errno, expected) in [("", Errno::IO), (",inject-error.0.errno=0", 0)] {
            let (_, disk) = open(&format!("{rule}{errno},inject-error.0.once=on")).await;
            let begin = now();
            assert_eq!(read(&disk, 0).await, expected);
            assert_eq!(now() - begin, Duration::from_millis(1));
            assert_eq!(read(&disk, 0).await, 0);
            assert_eq!(now() - begin, Duration::from_millis(1));
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn a_short_write_raises_the_events_of_a_read_modify_write() {
    sim::run(4, async {
        for event in ["head", "after_head", "tail", "after_tail"] {
            let rule = format!(",align=4096,inject-error.0.event=pwritev_rmw_{event}");
            let (_, disk) = open(&rule).await;
            assert_eq!(write(&disk, 4096, 4096).await, 0, "{event}");
            assert_eq!(write(&disk, 512, 512).await, Errno::IO, "{event}");
            drop(disk.close().await);
        }
    });
}

#[test]
fn a_breakpoint_suspends_one_request_until_it_is_resumed() {
    sim::run(5, async {
        let (_, disk) = open("").await;
        let node = disk.node().unwrap();
        let breakpoints = node.driver().breakpoints().unwrap();
        breakpoints.set(DebugEvent::Pwritev, "A", |_| {});
        let suspended = spawn({
            let disk = disk.clone();
            async move { write(&disk, 0, 512).await }
        });
        breakpoints.wait("A").await;
        assert_eq!(write(&disk, 0, 512).await, 0);
        assert!(breakpoints.is_suspended("A") && !breakpoints.is_suspended("B"));
        assert!(!breakpoints.resume("B") && !breakpoints.remove("B"));
        assert!(breakpoints.resume("A") && !breakpoints.resume("A"));
        assert_eq!(suspended.await, 0);
        breakpoints.set(DebugEvent::Pwritev, "A", |_| {});
        assert!(breakpoints.remove("A"));
        assert_eq!(write(&disk, 0, 512).await, 0);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_suspended_write_stays_suspended_if_its_future_is_dropped() {
    sim::run(6, async {
        let (_, disk) = open("").await;
        let node = disk.node().unwrap();
        let breakpoints = node.driver().breakpoints().unwrap();
        breakpoints.set(DebugEvent::PwritevDone, "A", |_| {});
        let suspended = spawn({
            let disk = disk.clone();
            async move { write(&disk, 0, 512).await }
        });
        breakpoints.wait("A").await;
        drop(suspended);
        yield_now().await;
        // A write runs to its end after its future was dropped.
        assert!(breakpoints.is_suspended("A"));
        assert!(breakpoints.resume("A"));
        disk.close().await.unwrap();
    });
}

#[test]
fn a_drain_waits_neither_for_a_breakpoint_nor_for_a_delay() {
    sim::run(9, async {
        let delayed = ",inject-error.0.event=none,inject-error.0.iotype=write,\
                       inject-error.0.errno=0,inject-error.0.delay-ns=1000000000";
        let (graph, disk) = open(delayed).await;
        let node = disk.node().unwrap();
        let breakpoints = node.driver().breakpoints().unwrap();
        breakpoints.set(DebugEvent::Pwritev, "A", |_| {});
        let begin = now();
        let start = |at: u64| {
            let disk = disk.clone();
            spawn(async move { write(&disk, at, 512).await })
        };
        let suspended = start(0);
        breakpoints.wait("A").await;
        let delayed = start(512);
        yield_now().await;
        drop(graph.drain(&node).await);
        assert_eq!(now(), begin);
        assert_eq!((suspended.await, delayed.await), (0, 0));
        assert!(!breakpoints.is_suspended("A"));
        write(&disk, 0, 512).await;
        assert_eq!(now() - begin, Duration::from_secs(1));
        disk.close().await.unwrap();
    });
}

#[test]
fn limits_come_from_the_options() {
    sim::run(7, async {
        let options = ",align=512,max-transfer=4096,opt-write-zero=1024,max-write-zero=2048,\
                       opt-discard=1024,max-discard=8192";
        let (_, disk) = open(options).await;
        let limits = disk.node().unwrap().limits();
        assert_eq!((limits.request_alignment, limits.max_transfer), (512, 4096));
        assert_eq!((limits.write_zeroes_alignment, limits.max_write_zeroes), (1024, 2048));
        assert_eq!((limits.discard_alignment, limits.max_discard), (1024, 8192));
        disk.close().await.unwrap();
    });
}

#[test]
fn permissions_are_taken_and_not_shared_as_asked_for() {
    sim::run(8, async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let options = |text: &str| Options::from_dotted(text, None).unwrap();
        let disk = "driver=null-co,node-name=n";
        let node = graph.open(options(disk), OpenFlags::default()).await.unwrap();
        graph.keep_open(node.clone()).unwrap();
        let first = "driver=blkdebug,image=n,unshare-child-perms.0=write";
        let first = graph.open_backend(None, options(first), OpenFlags::default()).await;
        let first = first.unwrap();
        let second = "driver=blkdebug,image=n,take-child-perms.0=write,read-only=on";
        let read_only = OpenFlags { read_only: true, ..OpenFlags::default() };
        let refused = graph.open_backend(None, options(second), read_only).await.unwrap_err();
        assert!(refused.to_string().contains("Permission conflict on node 'n'"), "{refused}");
        first.close().await.unwrap();
        graph.allow_close(node).await.unwrap();
    });
}
