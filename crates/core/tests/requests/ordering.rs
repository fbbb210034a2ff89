//! Flags of single requests: copy-on-read, prefetch, serialising writes, unchanged data, FUA.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{
    Attachment, Backend, ErrorKind, Graph, Limits, Node, OpenFlags, Perm, Permissions, ReadFlags,
    WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, sim, spawn};

use super::memory::{DRIVERS, Memory, graph, node, options};

fn all() -> Permissions {
    Permissions::sharing_all(Perm::all())
}

/// A disk that takes a millisecond for each request.
fn slow_memory(limits: Limits) -> Arc<Memory> {
    let memory = Memory { bytes: vec![0; 8192].into(), limits, zeroes: true, ..Memory::default() };
    memory.delay_ms.store(1, SeqCst);
    Arc::new(memory)
}

fn filter_above(graph: &Graph, name: &str) -> impl Future<Output = Arc<Node>> + use<> {
    let (graph, disk) = (graph.clone(), options(&format!("driver=pass,file={name}")));
    async move { graph.open(disk, OpenFlags::default()).await.unwrap() }
}

#[test]
fn a_serialising_write_waits_for_overlapping_requests_only() {
    sim::run(1, async {
        let graph = graph();
        let memory = slow_memory(Limits::default());
        let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let tracking = disk.track_requests().await.unwrap();
        for (offset, ends_first) in [(1024, true), (4096, false)] {
            memory.delay_ms.store(100, SeqCst);
            let reader = disk.clone();
            let read = spawn(async move {
                reader.read(offset, IoBufMut::new(512)).await.unwrap();
                oxblk_ring::now()
            });
            oxblk_ring::yield_now().await;
            memory.delay_ms.store(1, SeqCst);
            disk.write(1024, vec![1; 1024].into(), WriteFlags::SERIALISING).await.unwrap();
            let written = oxblk_ring::now();
            assert_eq!(read.await < written, ends_first);
        }
        drop(tracking);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_serialising_request_holds_back_later_requests_that_overlap() {
    for zeroes in [false, true] {
        sim::run(2, async {
            let graph = graph();
            let memory = slow_memory(Limits::default());
            memory.bytes.lock().unwrap().fill(7);
            let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
            let _tracking = disk.track_requests().await.unwrap();
            memory.delay_ms.store(50, SeqCst);
            let writer = disk.clone();
            let write = spawn(async move {
                let flags = (WriteFlags::SERIALISING, ZeroFlags::SERIALISING);
                match zeroes {
                    true => writer.write_zeroes(512, 1024, flags.1).await.unwrap(),
                    false => writer.write(512, vec![0; 1024].into(), flags.0).await.unwrap(),
                }
            });
            oxblk_ring::yield_now().await;
            oxblk_ring::yield_now().await;
            memory.delay_ms.store(1, SeqCst);
            let apart = disk.read(2048, IoBufMut::new(512)).await.unwrap();
            assert_eq!(apart[0], 7);
            assert!(!write.is_finished());
            let read = disk.read(1024, IoBufMut::new(512)).await.unwrap();
            assert_eq!(read[0], 0, "the read began after the write");
            disk.write(512, vec![9; 512].into(), WriteFlags::empty()).await.unwrap();
            write.await;
            assert_eq!(memory.bytes.lock().unwrap()[512], 9);
        });
    }
}

#[test]
fn serialising_requests_and_copies_need_request_tracking() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        let edge = Attachment::new(&node(&graph, "m", &memory), "test", "root", all()).unwrap();
        let write = || edge.write(0, IoBuf::zeroes(512), WriteFlags::SERIALISING);
        let zero = || edge.write_zeroes(0, 512, ZeroFlags::SERIALISING);
        let read = || edge.read_with(0, IoBufMut::new(512), ReadFlags::COPY_ON_READ);
        for refused in [write().await, zero().await, read().await.map(drop)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
        }
        let (one, two) = (edge.track_requests().await, edge.track_requests().await);
        drop(one);
        write().await.unwrap();
        zero().await.unwrap();
        read().await.unwrap();
        drop(two);
        write().await.unwrap_err();
        edge.read_with(0, IoBufMut::new(512), ReadFlags::empty()).await.unwrap();
    });
}

#[test]
fn a_misaligned_serialising_write_changes_only_its_range() {
    block_on(async {
        let graph = graph();
        let limits = Limits { request_alignment: 512, max_transfer: 1024, ..Limits::default() };
        let memory = Memory::new(8192, limits);
        let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let _tracking = disk.track_requests().await.unwrap();
        let mut oracle = vec![0_u8; 8192];
        for (at, len, byte) in [(0, 512, 1), (100, 3000, 2), (511, 2, 3), (4096, 4096, 4)] {
            let flags = WriteFlags::SERIALISING | WriteFlags::FUA;
            disk.write(at as u64, vec![byte; len].into(), flags).await.unwrap();
            oracle[at..at + len].fill(byte);
        }
        disk.write_zeroes(700, 1500, ZeroFlags::SERIALISING).await.unwrap();
        oracle[700..2200].fill(0);
        assert_eq!(*memory.bytes.lock().unwrap(), oracle);
    });
}

#[test]
fn the_permission_to_write_unchanged_data_is_enough_below_a_filter_too() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        // Misaligned requests take the slow path, on which each edge checks the permission.
        let lower = node(&graph, "m", &memory);
        let top = filter_above(&graph, "m").await;
        let unchanged = Permissions::sharing_all(Perm::WRITE_UNCHANGED);
        let edge = Attachment::new(&top, "test", "root", unchanged).unwrap();
        edge.write(0, vec![0; 512].into(), WriteFlags::UNCHANGED).await.unwrap();
        edge.write_zeroes(0, 512, ZeroFlags::UNCHANGED).await.unwrap();
        for refused in [
            edge.write(0, vec![0; 512].into(), WriteFlags::empty()).await,
            edge.write(0, vec![0; 512].into(), WriteFlags::FUA).await,
            edge.write_zeroes(0, 512, ZeroFlags::empty()).await,
            edge.discard(0, 512).await,
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
        }
        drop(lower);
    });
}

#[test]
fn a_driver_gets_fua_if_it_implements_it_and_is_flushed_if_not() {
    block_on(async {
        for (flags, log) in [
            (WriteFlags::empty(), vec!["write 0+512", "flush 0+0"]),
            (WriteFlags::FUA, vec!["write FUA 0+512"]),
        ] {
            let graph = graph();
            let memory = Memory::new(4096, Limits { write_flags: flags, ..Limits::default() });
            let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
            disk.write(0, vec![1; 512].into(), WriteFlags::FUA).await.unwrap();
            assert_eq!(memory.take_log(), log);
            // Nothing is left to flush.
            disk.flush().await.unwrap();
            assert!(memory.take_log().is_empty());
            // Earlier writes are.
            disk.write(512, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
            disk.write(0, vec![1; 512].into(), WriteFlags::FUA).await.unwrap();
            disk.flush().await.unwrap();
            assert!(memory.take_log().contains(&"flush 0+0".to_owned()));
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn a_failed_write_with_fua_is_covered_by_the_next_flush() {
    block_on(async {
        let graph = graph();
        let limits = Limits { write_flags: WriteFlags::FUA, ..Limits::default() };
        let memory = Memory::new(4096, limits);
        let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        memory.errno.store(5, SeqCst);
        disk.write(0, vec![1; 512].into(), WriteFlags::FUA).await.unwrap_err();
        memory.errno.store(0, SeqCst);
        memory.take_log();
        disk.flush().await.unwrap();
        assert_eq!(memory.take_log(), ["flush 0+0"]);
    });
}

#[test]
fn the_flag_reaches_a_driver_below_a_filter() {
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let limits = Limits { write_flags: WriteFlags::FUA, ..Limits::default() };
        let memory = Memory::new(4096, limits);
        let _lower = node(&graph, "m", &memory);
        let disk = Backend::new(&graph, "b", filter_above(&graph, "m").await, all()).unwrap();
        disk.write(0, vec![1; 512].into(), WriteFlags::FUA).await.unwrap();
        assert_eq!(memory.take_log(), ["write FUA 0+512"]);
    });
}
