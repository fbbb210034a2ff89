//! Tests of the request path with drivers in memory.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "requests/abandoned.rs"]
mod abandoned;
#[path = "requests/accounting.rs"]
mod accounting;
#[path = "requests/admission.rs"]
mod admission;
#[path = "requests/bitmaps.rs"]
mod bitmaps;
#[path = "requests/blocked.rs"]
mod blocked;
#[path = "requests/closing.rs"]
mod closing;
#[path = "requests/creation.rs"]
mod creation;
#[path = "requests/device_threads.rs"]
mod device_threads;
#[path = "requests/devices.rs"]
mod devices;
#[path = "requests/drains.rs"]
mod drains;
#[path = "requests/failed_changes.rs"]
mod failed_changes;
#[path = "requests/failed_pieces.rs"]
mod failed_pieces;
#[path = "requests/foreign_memory.rs"]
mod foreign_memory;
#[path = "requests/graph_changes.rs"]
mod graph_changes;
#[path = "requests/held_model.rs"]
mod held_model;
#[path = "requests/held_requests.rs"]
mod held_requests;
#[path = "requests/inserted_media.rs"]
mod inserted_media;
mod memory;
#[path = "requests/notifications.rs"]
mod notifications;
#[path = "requests/ordering.rs"]
mod ordering;
#[path = "requests/references.rs"]
mod references;
#[path = "requests/resumed_requests.rs"]
mod resumed_requests;
#[path = "requests/tracking.rs"]
mod tracking;
#[path = "requests/users.rs"]
mod users;
#[path = "requests/write_through.rs"]
mod write_through;

use std::sync::Arc;

use memory::{Memory, graph, node, node_with, options};
use oxblk_core::{
    Attachment, Backend, Errno, ErrorKind, Limits, OpenFlags, Perm, Permissions, Preallocation,
    StatusFlags, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, spawn};

fn all() -> Permissions {
    Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE)
}

fn aligned(alignment: u32) -> Limits {
    Limits { request_alignment: alignment, max_transfer: 4096, ..Limits::default() }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap().wrapping_add(seed)).collect()
}

#[test]
fn misaligned_requests_read_and_write_the_right_bytes() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(16384, aligned(512));
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let mut oracle = vec![0_u8; 16384];
        for (offset, len, seed) in
            [(0, 512, 1), (100, 50, 2), (511, 2, 3), (513, 9000, 4), (16383, 1, 5), (700, 324, 6)]
        {
            let data = pattern(len, seed);
            backend.write(offset as u64, data.clone().into(), WriteFlags::empty()).await.unwrap();
            oracle[offset..offset + len].copy_from_slice(&data);
        }
        assert_eq!(*memory.bytes.lock().unwrap(), oracle);
        for (offset, len) in [(0, 16384), (1, 1), (511, 1025), (16000, 384)] {
            let read = backend.read(offset as u64, IoBufMut::new(len)).await.unwrap();
            assert_eq!(&*read, &oracle[offset..offset + len]);
        }
    });
}

#[test]
fn concurrent_writes_within_one_block_lose_no_data() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory {
            bytes: vec![0; 4096].into(),
            limits: aligned(4096),
            yields: 3,
            ..Memory::default()
        });
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let tasks: Vec<_> = (0..64_u64)
            .map(|i| {
                let backend = backend.clone();
                spawn(async move {
                    let data = vec![u8::try_from(i + 1).unwrap(); 64];
                    backend.write(i * 64, data.into(), WriteFlags::empty()).await.unwrap();
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let bytes = memory.bytes.lock().unwrap();
        for (i, byte) in bytes.iter().enumerate() {
            assert_eq!(usize::from(*byte), i / 64 + 1, "byte {i}");
        }
    });
}

#[test]
fn requests_outside_the_device_are_refused() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1024, Limits::default());
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        for (offset, len) in [(1024, 1), (0, 1025), (u64::MAX, 2), (u64::MAX - 1, 1)] {
            let error = backend.read(offset, IoBufMut::new(len)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
            let data = IoBuf::zeroes(len);
            let error = backend.write(offset, data, WriteFlags::empty()).await.unwrap_err();
            assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::OutOfRange, 5));
        }
        assert!(memory.take_log().is_empty());
    });
}

#[test]
fn a_parent_that_writes_past_the_end_of_its_child_gets_enospc() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1024, Limits::default());
        let edge = Attachment::new(&node(&graph, "m", &memory), "test", "root", all()).unwrap();
        let error = edge.write(1000, IoBuf::zeroes(25), WriteFlags::empty()).await.unwrap_err();
        assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::NoSpace, 28));
        let error = edge.write_zeroes(1024, 1, ZeroFlags::empty()).await.unwrap_err();
        assert_eq!((error.kind(), error.offset()), (ErrorKind::NoSpace, Some(1024)));
        edge.write(1000, IoBuf::zeroes(24), WriteFlags::empty()).await.unwrap();
    });
}

#[test]
fn zero_writes_free_space_only_on_nodes_with_discard_unmap() {
    block_on(async {
        let graph = graph();
        for unmap in [true, false] {
            let memory =
                Arc::new(Memory { bytes: vec![0; 4096].into(), zeroes: true, ..Memory::default() });
            let flags = OpenFlags { unmap, ..OpenFlags::default() };
            let node = node_with(&graph, if unmap { "on" } else { "off" }, &memory, flags);
            let backend = Backend::new(&graph, "", node, all()).unwrap();
            backend.write_zeroes(0, 512, ZeroFlags::MAY_UNMAP).await.unwrap();
            let done = if unmap { "unmap 0+512" } else { "zero 0+512" };
            assert_eq!(memory.take_log(), [done]);
        }
    });
}

#[test]
fn an_image_with_an_incomplete_last_block_is_writable_only_if_it_may_grow() {
    block_on(async {
        let graph = graph();
        let limits = Limits { grows: true, ..aligned(4096) };
        let node = node(&graph, "m", &Memory::new(1536, limits));
        let write = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE);
        let error = Backend::new(&graph, "", Arc::clone(&node), write).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        let read = Permissions::sharing_all(Perm::CONSISTENT_READ);
        Backend::new(&graph, "", Arc::clone(&node), read).unwrap();
        Backend::new(&graph, "", node, all()).unwrap();
    });
}

#[test]
fn a_flush_without_completed_writes_reaches_no_driver() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1024, Limits::default());
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        backend.flush().await.unwrap();
        assert!(memory.take_log().is_empty());
        backend.write(0, vec![1; 512].into(), WriteFlags::FUA).await.unwrap();
        assert_eq!(memory.take_log(), ["write 0+512", "flush 0+0"]);
        backend.flush().await.unwrap();
        assert!(memory.take_log().is_empty());
    });
}

#[test]
fn a_flush_after_a_failed_read_reaches_no_driver() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory { bad_read: Some(512), ..Memory::default() });
        memory.bytes.lock().unwrap().resize(4096, 0);
        let disk = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        disk.read(512, IoBufMut::new(512)).await.unwrap_err();
        oxblk_ring::settled().await;
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
        assert_eq!(memory.take_log(), ["read 512+512", "close 0+0"]);
    });
}

#[test]
fn zero_writes_use_the_driver_for_whole_blocks_and_data_for_the_rest() {
    block_on(async {
        let graph = graph();
        let limits =
            Limits { request_alignment: 512, write_zeroes_alignment: 1024, ..Limits::default() };
        let memory = Arc::new(Memory {
            bytes: vec![7; 8192].into(),
            limits,
            zeroes: true,
            ..Memory::default()
        });
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        backend.write_zeroes(100, 5000, ZeroFlags::empty()).await.unwrap();
        assert!(memory.take_log().contains(&"zero 1024+3072".to_owned()));
        let bytes = memory.bytes.lock().unwrap().clone();
        assert!(bytes[..100].iter().chain(&bytes[5100..]).all(|byte| *byte == 7));
        assert!(bytes[100..5100].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn zero_writes_without_fallback_fail_if_the_driver_does_not_support_them() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(8192, Limits::default());
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let error = backend.write_zeroes(0, 4096, ZeroFlags::NO_FALLBACK).await.unwrap_err();
        assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::Unsupported, 95));
    });
}

#[test]
fn a_zero_write_without_fallback_of_incomplete_blocks_changes_nothing() {
    block_on(async {
        let graph = graph();
        let limits = Limits {
            request_alignment: 512,
            zero_flags: ZeroFlags::NO_FALLBACK,
            ..Limits::default()
        };
        let memory = Arc::new(Memory {
            bytes: vec![1; 4096].into(),
            limits,
            zeroes: true,
            ..Memory::default()
        });
        let backend = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        for (offset, len) in [(1024, 1025), (1000, 1048)] {
            let error = backend.write_zeroes(offset, len, ZeroFlags::NO_FALLBACK).await;
            assert_eq!(error.unwrap_err().raw_errno(), 95);
        }
        assert_eq!(memory.bytes.lock().unwrap()[..], [1; 4096]);
        backend.close().await.unwrap();
    });
}

#[test]
fn a_driver_receives_only_the_zero_flags_that_it_implements() {
    block_on(async {
        let graph = graph();
        for (name, implemented, outcome, log) in [
            ("no", ZeroFlags::empty(), Err(Errno::OPNOTSUPP), vec![]),
            ("yes", ZeroFlags::NO_FALLBACK, Ok(()), vec!["unmap 0+4096"]),
        ] {
            let memory = Arc::new(Memory {
                bytes: vec![7; 8192].into(),
                limits: Limits { zero_flags: implemented, ..Limits::default() },
                zeroes: true,
                ..Memory::default()
            });
            let backend = Backend::new(&graph, "", node(&graph, name, &memory), all()).unwrap();
            let flags = ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP;
            let zeroed = backend.write_zeroes(0, 4096, flags).await;
            assert_eq!(zeroed.map_err(|error| error.raw_errno()), outcome);
            assert_eq!(memory.take_log(), log);
            backend.write_zeroes(0, 4096, ZeroFlags::empty()).await.unwrap();
            assert_eq!(memory.take_log(), ["zero 0+4096"]);
        }
    });
}

#[test]
fn a_read_of_a_chain_returns_the_data_of_all_its_images() {
    block_on(async {
        let graph = graph();
        let top = options(
            "driver=checkered,node-name=top,size=8192,file.driver=memory,file.size=8192,file.node-name=f,backing.driver=memory,backing.size=3000,backing.node-name=base",
        );
        let backend = graph.open_backend(None, top, OpenFlags::default()).await.unwrap();
        let seed = |name: &str, byte: u8| {
            let node = graph.node(name).unwrap();
            async move {
                let size = usize::try_from(node.size()).unwrap();
                node.driver().write(0, vec![byte; size].into(), WriteFlags::empty()).await.unwrap();
            }
        };
        seed("f", 1).await;
        seed("base", 2).await;
        let read = backend.read(0, IoBufMut::new(8192)).await.unwrap();
        for (i, byte) in read.iter().enumerate() {
            let expected = match (i / 512 % 2, i < 3000) {
                (0, _) => 1,
                (_, true) => 2,
                (_, false) => 0,
            };
            assert_eq!(*byte, expected, "byte {i}");
        }
        let at = |offset| backend.block_status(offset, 8192, Want::Precise);
        let first = at(0).await.unwrap();
        assert_eq!((first.depth, first.status.len, first.status.host), (0, 512, Some(512)));
        let second = at(600).await.unwrap();
        assert_eq!((second.depth, second.status.len), (1, 424));
        let past = at(3584).await.unwrap();
        assert!(past.status.flags.contains(StatusFlags::ZERO));
        backend.close().await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn resize_waits_for_requests_in_flight() {
    block_on(async {
        let graph = graph();
        let memory =
            Arc::new(Memory { bytes: vec![0; 1024].into(), yields: 5, ..Memory::default() });
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let writer = {
            let backend = backend.clone();
            spawn(async move { backend.write(512, vec![9; 512].into(), WriteFlags::empty()).await })
        };
        oxblk_ring::yield_now().await;
        backend.resize(2048, Preallocation::Off).await.unwrap();
        assert_eq!(memory.bytes.lock().unwrap()[1023], 9);
        writer.await.unwrap();
        assert_eq!(backend.size(), 2048);
    });
}

#[test]
fn the_error_of_a_permission_conflict_contains_both_users() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1024, Limits::default());
        let shared = node(&graph, "m", &memory);
        let alone = Permissions { taken: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
        let first = Backend::new(&graph, "one", Arc::clone(&shared), alone).unwrap();
        let error = Backend::new(&graph, "two", Arc::clone(&shared), all()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Permission conflict on node 'm': permissions 'write, resize' are both required by block device 'two' \
             (uses node 'm' as 'root' child) and unshared by block device 'one' (uses node 'm' as 'root' child)."
        );
        first.close().await.unwrap();
    });
}

#[test]
fn a_failed_open_leaves_nothing_open() {
    block_on(async {
        let graph = graph();
        let bad = options("driver=checkered,nonsense=1,file.driver=memory,file.size=1024");
        let error = graph.open(bad, OpenFlags::default()).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Block format 'checkered' does not support the option 'nonsense'"
        );
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn only_requests_that_change_a_node_are_marked_in_its_bitmaps() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1 << 20, Limits { grows: true, ..aligned(512) });
        let node = node(&graph, "m", &memory);
        let backend = Backend::new(&graph, "b", Arc::clone(&node), all()).unwrap();
        backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        let bitmap = graph.add_bitmap(&node, "since", Some(4096)).await.unwrap();
        let dirty = || -> Vec<_> { bitmap.map().areas().map(|a| (a.start, a.end)).collect() };
        backend.read(0, IoBufMut::new(65536)).await.unwrap();
        backend.flush().await.unwrap();
        assert!(dirty().is_empty());
        backend.write(5000, vec![1; 10].into(), WriteFlags::empty()).await.unwrap();
        backend.write(65536, vec![1; 8192].into(), WriteFlags::FUA).await.unwrap();
        backend.write_zeroes(131_072, 512, ZeroFlags::empty()).await.unwrap();
        assert_eq!(dirty(), [(4096, 8192), (65536, 73728), (131_072, 135_168)]);
        backend.resize(2 << 20, Preallocation::Off).await.unwrap();
        let edge = backend.root().unwrap();
        edge.write((2 << 20) + 4096, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        assert_eq!(dirty().last(), Some(&((2 << 20) + 4096, (2 << 20) + 4608)));
        let error = graph.add_bitmap(&node, "since", None).await.err().unwrap();
        assert_eq!(error.to_string(), "Bitmap already exists: since");
        graph.delete_bitmap(&node, &bitmap).await.unwrap();
        let error = graph.delete_bitmap(&node, &bitmap).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        backend.write(262_144, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        assert!(!bitmap.map().get(262_144));
    });
}

#[test]
fn adding_a_bitmap_waits_for_writes_in_flight() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory {
            bytes: std::sync::Mutex::new(vec![0; 65536]),
            yields: 50,
            ..Memory::default()
        });
        let node = node(&graph, "m", &memory);
        let backend = Backend::new(&graph, "b", Arc::clone(&node), all()).unwrap();
        let writer = backend.clone();
        let write = spawn(async move {
            writer.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        });
        oxblk_ring::yield_now().await;
        graph.add_bitmap(&node, "new", None).await.unwrap();
        assert_eq!(memory.bytes.lock().unwrap()[0], 1);
        write.await;
    });
}

#[test]
fn a_cancelled_request_is_counted_until_the_host_has_completed_it() {
    block_on(async {
        let graph = graph();
        let memory =
            Arc::new(Memory { bytes: vec![0; 1024].into(), yields: 100_000, ..Memory::default() });
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let epochs = Arc::clone(backend.node().unwrap().epochs());
        let epoch = epochs.current();
        let task = {
            let backend = backend.clone();
            spawn(async move { backend.read(0, IoBufMut::new(512)).await.map(drop) })
        };
        oxblk_ring::yield_now().await;
        assert!(!epochs.has_passed(epoch), "the epoch passed while a request was in progress");
        drop(task);
        drop(backend.quiesce().await);
        assert!(epochs.has_passed(epoch), "a completed request is still counted");
    });
}

#[test]
fn a_misaligned_write_waits_only_for_writes_that_overlap_it() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(16384, aligned(4096));
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        memory.landing.store(100_000, std::sync::atomic::Ordering::SeqCst);
        let aligned_write = {
            let backend = backend.clone();
            let data = IoBuf::from(vec![1; 4096]);
            spawn(async move { backend.write(4096, data, WriteFlags::empty()).await })
        };
        while memory.take_log().is_empty() {
            oxblk_ring::yield_now().await;
        }
        memory.landing.store(0, std::sync::atomic::Ordering::SeqCst);
        backend.write(9000, vec![2; 100].into(), WriteFlags::empty()).await.unwrap();
        let elsewhere = memory.bytes.lock().unwrap()[4096];
        assert_eq!(elsewhere, 0, "the misaligned write has waited for another block");
        backend.write(5000, vec![3; 100].into(), WriteFlags::empty()).await.unwrap();
        let bytes = memory.bytes.lock().unwrap()[4096..8192].to_vec();
        assert!(bytes[..904].iter().all(|byte| *byte == 1), "the aligned write was lost");
        assert!(bytes[904..1004].iter().all(|byte| *byte == 3), "the misaligned write was lost");
        aligned_write.await.unwrap();
    });
}
