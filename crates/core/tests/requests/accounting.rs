//! Tests of accounting: counts, latencies in virtual time, histograms, intervals, several threads.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures_util::future::join_all;
use oxblk_core::{
    AccountingOptions, Backend, Boundaries, Errno, IoType, Limits, Statistics, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, sim, sleep};

use super::all;
use crate::memory::{Memory, graph, node};

const MS: Duration = Duration::from_millis(1);

fn backend(memory: &Arc<Memory>) -> Backend {
    let graph = graph();
    Backend::new(&graph, "b", node(&graph, "m", memory), all()).unwrap()
}

fn statistics(backend: &Backend) -> Statistics {
    backend.statistics().unwrap()
}

#[test]
fn a_backend_counts_requests_only_after_accounting_was_switched_on() {
    block_on(async {
        let backend = backend(&Memory::new(1 << 20, Limits::default()));
        backend.read(0, IoBufMut::new(512)).await.unwrap();
        backend.account_invalid(IoType::Read);
        assert!(backend.statistics().is_none());
        backend.set_accounting(AccountingOptions::default()).unwrap();
        assert_eq!(statistics(&backend).idle, None);
        backend.read(0, IoBufMut::new(512)).await.unwrap();
        backend.read(0, IoBufMut::new(1024)).await.unwrap();
        backend.write(0, IoBuf::zeroes(2048), WriteFlags::empty()).await.unwrap();
        backend.write_zeroes(0, 4096, ZeroFlags::empty()).await.unwrap();
        backend.discard(0, 8192).await.unwrap();
        backend.flush().await.unwrap();
        backend.account_merged(IoType::Write, 3);
        let counts = statistics(&backend).counts;
        assert_eq!((counts.read.operations, counts.read.bytes), (2, 1536));
        assert_eq!((counts.write.operations, counts.write.bytes), (2, 6144));
        assert_eq!((counts.unmap.operations, counts.unmap.bytes), (1, 8192));
        assert_eq!((counts.flush.operations, counts.flush.bytes), (1, 0));
        assert_eq!((counts.write.merged, counts.read.merged), (3, 0));
        assert!(statistics(&backend).idle.is_some());
    });
}

#[test]
fn failed_and_invalid_requests_are_counted_apart() {
    block_on(async {
        let memory = Memory::new(4096, Limits::default());
        let backend = backend(&memory);
        backend.set_accounting(AccountingOptions::default()).unwrap();
        backend.read(4096, IoBufMut::new(1)).await.unwrap_err();
        memory.errno.store(Errno::IO, SeqCst);
        backend.read(0, IoBufMut::new(1)).await.unwrap_err();
        backend.write(0, IoBuf::zeroes(1), WriteFlags::empty()).await.unwrap_err();
        let counts = statistics(&backend).counts;
        assert_eq!((counts.read.invalid, counts.read.failed, counts.read.operations), (1, 1, 0));
        assert_eq!((counts.write.invalid, counts.write.failed), (0, 1));
    });
}

#[test]
fn times_histograms_and_idle_time_are_those_of_the_virtual_clock() {
    sim::run(1, async {
        let memory = Memory::new(4096, Limits::default());
        let backend = backend(&memory);
        backend.set_accounting(AccountingOptions::default()).unwrap();
        let boundaries = Boundaries::new(&[2_000_000, 5_000_000]).unwrap();
        backend.set_latency_histograms(&[IoType::Read, IoType::Flush], Some(&boundaries));
        for delay in [1, 2, 4, 7] {
            memory.delay_ms.store(delay, SeqCst);
            backend.read(0, IoBufMut::new(512)).await.unwrap();
        }
        sleep(30 * MS).await;
        let now = statistics(&backend);
        assert_eq!((now.counts.read.total_time, now.idle), (14 * MS, Some(30 * MS)));
        assert_eq!(now.histograms.read.unwrap().bins(), [1, 2, 1]);
        assert_eq!(now.histograms.flush.unwrap().bins(), [0, 0, 0]);
        assert_eq!(now.histograms.write, None);
        // New boundaries make an empty histogram.
        backend.set_latency_histograms(&[IoType::Read], Some(&Boundaries::new(&[]).unwrap()));
        assert_eq!(statistics(&backend).histograms.read.unwrap().bins(), [0]);
        backend.set_latency_histograms(&[IoType::Read, IoType::Flush], None);
        assert_eq!(statistics(&backend).histograms.read, None);
    });
}

#[test]
fn the_options_decide_whether_failed_and_invalid_requests_count_in_times() {
    for counted in [true, false] {
        sim::run(1, async move {
            let memory = Memory::new(4096, Limits::default());
            let backend = backend(&memory);
            let options =
                AccountingOptions { failed: counted, invalid: counted, intervals: Vec::new() };
            backend.set_accounting(options).unwrap();
            memory.delay_ms.store(5, SeqCst);
            memory.errno.store(Errno::IO, SeqCst);
            backend.read(0, IoBufMut::new(512)).await.unwrap_err();
            let time = if counted { 5 * MS } else { Duration::ZERO };
            assert_eq!(statistics(&backend).counts.read.total_time, time);
            assert_eq!(statistics(&backend).idle, counted.then_some(Duration::ZERO));
            sleep(MS).await;
            backend.account_invalid(IoType::Read);
            assert_eq!(statistics(&backend).idle, counted.then_some(Duration::ZERO));
        });
    }
}

#[test]
fn an_interval_shows_the_latencies_and_the_queue_depth_of_its_requests() {
    sim::run(1, async {
        let memory = Memory::new(4096, Limits::default());
        let backend = backend(&memory);
        let intervals = vec![10, 60];
        let bad = AccountingOptions { intervals: vec![0], ..AccountingOptions::default() };
        assert!(backend.set_accounting(bad).is_err());
        backend
            .set_accounting(AccountingOptions { intervals, ..AccountingOptions::default() })
            .unwrap();
        // Two reads at a time, all the time.
        for delay in [100, 300, 200].repeat(100) {
            memory.delay_ms.store(delay, SeqCst);
            let read = || backend.read(0, IoBufMut::new(512));
            join_all([read(), read()]).await.into_iter().for_each(|done| drop(done.unwrap()));
        }
        let now = statistics(&backend).intervals;
        assert_eq!((now[0].seconds, now[1].seconds), (10, 60));
        for interval in &now {
            let read = &interval.latencies.read;
            assert_eq!((read.min, read.max), (100 * MS, 300 * MS));
            assert!(read.average.abs_diff(200 * MS) < 10 * MS, "{read:?}");
            assert!((read.queue_depth - 2.0).abs() < 0.1, "{read:?}");
            assert_eq!(interval.latencies.write.max, Duration::ZERO);
        }
        sleep(Duration::from_secs(12)).await;
        let now = statistics(&backend).intervals;
        assert_eq!(now[0].latencies.read.max, Duration::ZERO);
        assert_eq!(now[1].latencies.read.max, 300 * MS);
    });
}

#[test]
fn the_counts_of_several_threads_are_added_up() {
    let backend = block_on(async { backend(&Memory::new(4096, Limits::default())) });
    backend
        .set_accounting(AccountingOptions { intervals: vec![3600], ..AccountingOptions::default() })
        .unwrap();
    let boundaries = Boundaries::new(&[1]).unwrap();
    backend.set_latency_histograms(&[IoType::Write], Some(&boundaries));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let backend = backend.clone();
            // Each thread has an executor of its own.
            scope.spawn(move || {
                block_on(async {
                    for _ in 0..500 {
                        let data = IoBuf::zeroes(512);
                        backend.write(0, data, WriteFlags::empty()).await.unwrap();
                    }
                });
            });
        }
        // Readers of the statistics do not disturb the writers.
        for _ in 0..100 {
            let counts = statistics(&backend).counts.write;
            assert_eq!(counts.bytes, counts.operations * 512);
        }
    });
    let now = statistics(&backend);
    assert_eq!(now.counts.write.operations, 2000);
    assert_eq!(now.histograms.write.unwrap().bins().iter().sum::<u64>(), 2000);
    assert!(now.intervals[0].latencies.write.max > Duration::ZERO);
    block_on(backend.close()).unwrap();
}

#[test]
fn the_lengths_and_the_number_of_intervals_are_limited() {
    let backend = Backend::empty(&graph(), "b", super::all());
    let set = |intervals| {
        backend.set_accounting(AccountingOptions { intervals, ..AccountingOptions::default() })
    };
    assert_eq!(set(vec![60, 0]).unwrap_err().to_string(), "Invalid interval length: 0");
    let error = set(vec![60; 65]).unwrap_err();
    assert_eq!(error.to_string(), "Accounting has at most 64 intervals");
    assert!(backend.statistics().is_none());
    set((1..=64).collect()).unwrap();
    assert_eq!(statistics(&backend).intervals.len(), 64);
    block_on(backend.close()).unwrap();
}
