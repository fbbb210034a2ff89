//! Tests of the `file` driver on a simulated disk with faults.

use std::sync::{Arc, Barrier};

use crate::common::{error, graph, pattern, read, write};
use oxblk_core::{
    Attachment, Backend, Errno, OpenFlags, Options, Perm, Permissions, ReopenRequest, StatusFlags,
    Want, WriteFlags, ZeroFlags,
};
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::{File, block_on, perturb, sim};
use sim::{FailRule, FaultOp, Faults};

const SIZE: u64 = 1 << 20;

fn backend(disk: &sim::Disk, alignment: u32) -> Backend {
    let graph = graph();
    let driver = FileDriver::from_ring_file(File::sim(disk), disk.len()).with_alignment(alignment);
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let node = graph.add_node(Some("disk"), &FILE, Box::new(driver), flags).unwrap();
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap()
}

fn fail(op: FaultOp, errno: i32, once: bool) -> FailRule {
    FailRule { op, nth: None, range: None, errno, once }
}

/// Makes the next sync fail and later syncs succeed, because a host reports the loss of data only once.
fn fail_next_sync(disk: &sim::Disk) {
    disk.set_faults(Faults {
        fail: vec![fail(FaultOp::Sync, Errno::IO, true)],
        ..Faults::default()
    });
}

#[test]
fn short_transfers_in_any_order_move_every_byte() {
    for seed in 0..50 {
        let disk = sim::Disk::new(seed, SIZE);
        disk.set_faults(Faults { short_reads: 0.4, short_writes: 0.4, ..Faults::default() });
        sim::run(seed, async {
            let alignment = if seed % 2 == 0 { 1 } else { 512 };
            let backend = backend(&disk, alignment);
            let data = pattern(100_000, 5);
            write(&backend, 12_345, &data).await;
            assert!(read(&backend, 12_345, data.len()).await == data);
            backend.flush().await.unwrap();
        });
        assert_eq!(disk.bytes()[12_345..112_345], pattern(100_000, 5));
    }
}

#[test]
fn a_short_aligned_write_is_completed() {
    for seed in 0..20 {
        let disk = sim::Disk::new(seed, SIZE);
        disk.set_faults(Faults { short_writes: 0.9, ..Faults::default() });
        sim::run(seed, async {
            let backend = backend(&disk, 512);
            let (one, other) = (pattern(65_536, 7), pattern(100, 9));
            // The second write changes a part of a block of the first write, and waits for the first write.
            futures_util::future::join(
                write(&backend, 4096, &one),
                write(&backend, 4096 + 65_536 - 612, &other),
            )
            .await;
            let read = read(&backend, 4096, 65_536).await;
            assert!(read[..64_924] == one[..64_924] && read[65_024..] == one[65_024..]);
            backend.flush().await.unwrap();
        });
    }
}

#[test]
fn no_flush_succeeds_after_a_failed_flush() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        fail_next_sync(&disk);
        assert_eq!(error(backend.flush().await), "Input/output error");
        write(&backend, 0, b"more").await;
        assert_eq!(error(backend.flush().await), "Input/output error");
        // The error remains after a reopen, because the data is lost.
        backend.reopen(Options::new()).await.unwrap();
        assert_eq!(error(backend.flush().await), "Input/output error");
    });
}

async fn set_direct(backend: &Backend, direct: &str) {
    let options = Options::from_dotted(&format!("cache.direct={direct}"), None).unwrap();
    backend.reopen(options).await.unwrap();
}

#[test]
fn a_flush_after_a_reopen_for_direct_io_covers_earlier_cached_writes() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"kept").await;
        set_direct(&backend, "on").await;
        backend.flush().await.unwrap();
    });
    assert!(disk.after_power_loss_none().bytes().starts_with(b"kept"));
}

#[test]
fn a_failed_flush_of_cached_writes_is_recorded_although_direct_io_was_turned_on_meanwhile() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        set_direct(&backend, "on").await;
        fail_next_sync(&disk);
        assert_eq!(error(backend.flush().await), "Input/output error");
        assert_eq!(error(backend.flush().await), "Input/output error");
    });
    // With direct I/O, the host drops no data when a flush fails. So the next flush can succeed.
    sim::run(2, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"more").await;
        set_direct(&backend, "on").await;
        backend.flush().await.unwrap();
        write(&backend, 0, b"data").await;
        fail_next_sync(&disk);
        assert_eq!(error(backend.flush().await), "Input/output error");
        backend.flush().await.unwrap();
    });
}

#[test]
fn two_flushes_that_overlap_fail_together() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        fail_next_sync(&disk);
        let node = backend.node().unwrap();
        let flush = || node.driver().flush().unwrap();
        let (one, other) = futures_util::future::join(flush(), flush()).await;
        assert_eq!([error(one), error(other)], ["Input/output error"; 2]);
    });
}

#[test]
fn no_flush_succeeds_after_a_failed_flush_whose_future_was_dropped() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        fail_next_sync(&disk);
        let node = backend.node().unwrap();
        let mut dropped = node.driver().flush().unwrap();
        assert!(futures_util::poll!(&mut dropped).is_pending());
        drop(dropped);
        // This flush waits for the first one.
        assert_eq!(error(node.driver().flush().unwrap().await), "Input/output error");
    });
}

#[test]
fn no_flush_succeeds_after_a_failed_flush_whose_thread_has_ended() {
    let disk = sim::Disk::new(1, SIZE);
    let backend = sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        fail_next_sync(&disk);
        let mut flush = Box::pin(backend.flush());
        for _ in 0..20 {
            assert!(futures_util::poll!(&mut flush).is_pending());
            oxblk_ring::yield_now().await;
        }
        assert_eq!(disk.write_boundaries(), 1);
        drop(flush);
        backend
    });
    // The host has carried out the flush, and the task that waited for it has been dropped.
    assert_eq!(disk.write_boundaries(), 2);
    sim::run(2, async {
        assert_eq!(error(backend.flush().await), "Input/output error");
    });
}

#[test]
fn no_flush_succeeds_after_a_failed_write_with_fua() {
    let disk = sim::Disk::new(1, SIZE);
    sim::run(1, async {
        let backend = backend(&disk, 1);
        write(&backend, 0, b"lost").await;
        fail_next_sync(&disk);
        let node = backend.node().unwrap();
        let written = node.driver().write(4096, vec![1; 512].into(), WriteFlags::FUA).await;
        assert_eq!(error(written), "Input/output error");
        assert_eq!(error(backend.flush().await), "Input/output error");
    });
}

#[test]
fn a_failing_close_is_an_error_only_if_the_file_was_writable() {
    for read_only in [false, true] {
        let disk = sim::Disk::new(1, SIZE);
        disk.set_faults(Faults {
            fail: vec![fail(FaultOp::Close, Errno::DQUOT, true)],
            ..Faults::default()
        });
        sim::run(1, async {
            let backend = backend(&disk, 1);
            let mut options = Options::new();
            options.insert("read-only", read_only);
            backend.reopen(options).await.unwrap();
            let closed = backend.close().await;
            assert_eq!(
                closed.map_err(|error| error.raw_errno()),
                if read_only { Ok(()) } else { Err(Errno::DQUOT) }
            );
        });
    }
}

#[test]
fn a_dropped_write_is_covered_by_a_flush_after_it() {
    for seed in 0..20 {
        let disk = sim::Disk::new(seed, SIZE);
        sim::run(seed, async {
            let backend = backend(&disk, 1);
            let mut dropped = Box::pin(backend.write(0, vec![7; 512].into(), WriteFlags::empty()));
            assert!(futures_util::poll!(&mut dropped).is_pending());
            // This flush begins before the write is on the disk.
            backend.flush().await.unwrap();
            drop(dropped);
            oxblk_ring::settled().await;
            assert_eq!(read(&backend, 0, 512).await, [7; 512]);
            backend.flush().await.unwrap();
            assert_eq!(disk.after_power_loss_none().bytes()[..512], [7; 512]);
        });
    }
}

#[test]
fn a_write_of_a_thread_that_has_ended_is_flushed_and_recorded_in_bitmaps() {
    let disk = sim::Disk::new(1, SIZE);
    let (backend, bitmap) = sim::run(1, async {
        let backend = backend(&disk, 1);
        let node = backend.node().unwrap();
        let bitmap = backend.graph().add_bitmap(&node, "b", Some(4096)).await.unwrap();
        backend.flush().await.unwrap();
        let mut write = Box::pin(backend.write(8192, vec![7; 512].into(), WriteFlags::empty()));
        for _ in 0..20 {
            assert!(futures_util::poll!(&mut write).is_pending());
            oxblk_ring::yield_now().await;
        }
        drop(write);
        (backend, bitmap)
    });
    assert_eq!(disk.bytes()[8192..8704], [7; 512]);
    assert!(bitmap.map().get(8192));
    sim::run(2, async { backend.flush().await.unwrap() });
    assert_eq!(disk.after_power_loss_none().bytes()[8192..8704], [7; 512]);
}

#[test]
fn unsupported_zeroing_falls_back_to_writes_and_is_tried_only_once() {
    let disk = sim::Disk::from_bytes(2, &pattern(1 << 20, 1));
    sim::run(2, async {
        let backend = backend(&disk, 1);
        let refuse = fail(FaultOp::Fallocate, Errno::OPNOTSUPP, false);
        disk.set_faults(Faults { fail: vec![refuse], ..Faults::default() });
        backend.write_zeroes(1000, 5000, ZeroFlags::MAY_UNMAP).await.unwrap();
        assert_eq!(read(&backend, 1000, 5000).await, [0; 5000]);
        // A discard that the host does not support is not an error.
        backend.discard(0, 4096).await.unwrap();
        // The driver has recorded both operations as unsupported. The driver does not try these operations again,
        // although they would succeed now.
        disk.set_faults(Faults::default());
        let refused = backend.write_zeroes(8192, 4096, ZeroFlags::NO_FALLBACK).await;
        assert_eq!(refused.unwrap_err().raw_errno(), Errno::OPNOTSUPP);
        backend.discard(8192, 4096).await.unwrap();
        assert_eq!(read(&backend, 8192, 4).await, pattern(8196, 1)[8192..]);
    });
}

#[test]
fn an_error_while_space_is_allocated_for_zeroes_is_reported() {
    // The host cannot zero a range in one step. The driver punches a hole and allocates its space.
    for (errno, expected) in [
        (Errno::NOSPC, Err(Errno::NOSPC)),
        (Errno::DQUOT, Err(Errno::DQUOT)),
        (Errno::FBIG, Err(Errno::FBIG)),
        (Errno::IO, Err(Errno::IO)),
        (Errno::OPNOTSUPP, Ok(())),
    ] {
        let disk = sim::Disk::from_bytes(3, &pattern(1 << 20, 1));
        sim::run(3, async {
            let backend = backend(&disk, 1);
            let refuse = fail(FaultOp::Fallocate, Errno::OPNOTSUPP, true);
            // The rule `refuse` handles the first operation. So this rule counts from the second operation on, and the
            // allocation is number 2.
            let allocate = FailRule { nth: Some(2), ..fail(FaultOp::Fallocate, errno, true) };
            disk.set_faults(Faults { fail: vec![refuse, allocate], ..Faults::default() });
            let zeroed = backend.write_zeroes(0, 4096, ZeroFlags::NO_FALLBACK).await;
            assert_eq!(zeroed.map_err(|error| error.raw_errno()), expected);
            assert_eq!(read(&backend, 0, 4096).await, [0; 4096]);
        });
    }
}

#[test]
fn an_error_while_zeroing_is_reported_and_the_next_attempt_succeeds() {
    let disk = sim::Disk::from_bytes(3, &pattern(1 << 20, 1));
    sim::run(3, async {
        let backend = backend(&disk, 1);
        let once = fail(FaultOp::Fallocate, Errno::IO, true);
        disk.set_faults(Faults { fail: vec![once], ..Faults::default() });
        let failed = backend.write_zeroes(0, 4096, ZeroFlags::empty()).await.unwrap_err();
        assert_eq!((failed.raw_errno(), failed.offset()), (Errno::IO, Some(0)));
        backend.write_zeroes(0, 4096, ZeroFlags::empty()).await.unwrap();
        assert_eq!(read(&backend, 0, 4096).await, [0; 4096]);
    });
}

#[test]
fn block_status_never_calls_data_a_hole_while_others_write_and_discard() {
    for seed in 0..40 {
        let disk = sim::Disk::new(seed, SIZE);
        sim::run(seed, async {
            let backend = Arc::new(backend(&disk, 1));
            let worker = {
                let backend = Arc::clone(&backend);
                oxblk_ring::spawn(async move {
                    for n in 0..20_u64 {
                        write(&backend, n * 8192, &[1; 4096]).await;
                        backend.discard((n / 2) * 8192, 4096).await.unwrap();
                    }
                })
            };
            for n in (0..20).cycle().take(100) {
                backend.block_status(n * 8192, 4096, Want::Precise).await.unwrap();
            }
            worker.await;
            for n in 10..20 {
                let found = backend.block_status(n * 8192, 4096, Want::Precise).await.unwrap();
                assert!(found.status.flags.contains(StatusFlags::DATA), "{n}");
            }
        });
    }
}

/// One thread attaches a writer while another thread makes the node read-only.
fn attach_during_reopen(rounds: u32) {
    let (graph, disk) = (graph(), sim::Disk::new(1, SIZE));
    let driver = FileDriver::from_ring_file(File::sim(&disk), SIZE);
    let node = graph.add_node(None, &FILE, Box::new(driver), OpenFlags::default()).unwrap();
    let barrier = Barrier::new(2);
    let reopen = |read_only: bool| {
        let mut options = Options::new();
        options.insert("read-only", read_only);
        block_on(graph.reopen(vec![ReopenRequest { node: Arc::clone(&node), options, keep: true }]))
    };
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..rounds {
                barrier.wait();
                let reopened = reopen(true);
                barrier.wait();
                // The other thread looks at the outcome.
                barrier.wait();
                if reopened.is_ok() {
                    reopen(false).unwrap();
                }
            }
        });
        for round in 0..rounds {
            barrier.wait();
            let permissions = Permissions::sharing_all(Perm::WRITE);
            let writer = Attachment::new(&node, "test", "root", permissions);
            barrier.wait();
            if writer.is_ok() == node.is_read_only() {
                wrong.push(round);
            }
            if let Ok(writer) = writer {
                drop(writer);
            }
            barrier.wait();
        }
    });
    assert_eq!(wrong, [0; 0], "rounds that ended with a writer of a read-only node");
}

#[test]
fn a_node_that_becomes_read_only_has_no_writer() {
    for seed in 1..=8 {
        perturb::start(seed);
        attach_during_reopen(60);
    }
    perturb::stop();
}
