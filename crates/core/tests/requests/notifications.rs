//! Tests of events: media, sizes, write thresholds.

use std::sync::Arc;

use oxblk_core::{
    Backend, BlockEvent, BoxFuture, Driver, Limits, MapOp, Notice, OpenFlags, Preallocation,
    Result, Step, Subscription, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use super::all;
use crate::memory::{DRIVERS, Memory, graph, node, options};

fn next(events: &Subscription) -> Option<BlockEvent> {
    events.try_next().map(|notice| match notice {
        Notice::Event(event) => event,
        Notice::Lost(count) => panic!("{count} events were lost"),
    })
}

#[test]
fn a_medium_that_is_inserted_or_removed_is_an_event() {
    block_on(async {
        let graph = graph();
        let events = graph.events().subscribe(9, |_| true);
        let backend = Backend::empty(&graph, "cd", all());
        backend.remove().await.unwrap();
        assert_eq!(next(&events), None);
        backend.insert(&node(&graph, "m", &Memory::new(4096, Limits::default()))).await.unwrap();
        let Some(BlockEvent::MediumInserted { source, node_name, size }) = next(&events) else {
            panic!("no event");
        };
        assert_eq!((source.backend, source.device.as_str()), (backend.id(), "cd"));
        assert_eq!((node_name.as_str(), size), ("m", 4096));
        backend.remove().await.unwrap();
        let removed = next(&events).unwrap();
        assert!(matches!(removed, BlockEvent::MediumRemoved { node_name, .. } if node_name == "m"));
        // A medium of another size is no resize.
        backend.insert(&node(&graph, "n", &Memory::new(8192, Limits::default()))).await.unwrap();
        assert!(matches!(next(&events), Some(BlockEvent::MediumInserted { size: 8192, .. })));
        backend.close().await.unwrap();
        assert_eq!(next(&events), None);
    });
}

#[test]
fn each_backend_of_a_node_reports_a_new_size_once() {
    block_on(async {
        let graph = graph();
        let node = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let one = Backend::new(&graph, "one", node.clone(), all()).unwrap();
        let two = Backend::new(&graph, "two", node, all()).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        one.resize(8192, Preallocation::Off).await.unwrap();
        one.resize(8192, Preallocation::Off).await.unwrap();
        let mut names = Vec::new();
        while let Some(event) = next(&events) {
            let BlockEvent::Resized { source, node_name, size } = event else { panic!("{event}") };
            assert_eq!((node_name.as_str(), size), ("m", 8192));
            names.push(source.device);
        }
        names.sort();
        assert_eq!(names, ["one", "two"]);
        two.close().await.unwrap();
        one.close().await.unwrap();
    });
}

#[test]
fn another_root_node_of_another_size_is_a_resize() {
    block_on(async {
        let graph = graph();
        let small = node(&graph, "small", &Memory::new(4096, Limits::default()));
        let large = node(&graph, "large", &Memory::new(8192, Limits::default()));
        let backend = Backend::new(&graph, "b", small, all()).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        let mut change = graph.change();
        change.set_root(&backend, &large);
        change.run().await.unwrap();
        let resized = next(&events).unwrap();
        assert!(matches!(resized, BlockEvent::Resized { size: 8192, .. }), "{resized}");
        assert_eq!(next(&events), None);
    });
}

#[test]
fn the_first_write_beyond_a_threshold_is_an_event() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1 << 20, Limits::default());
        let node = node(&graph, "m", &memory);
        let backend = Backend::new(&graph, "", node.clone(), all()).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        // As observed with QEMU 10.0.
        node.set_write_threshold(70000);
        backend.write(65536, IoBuf::zeroes(4464), WriteFlags::empty()).await.unwrap();
        backend.discard(100_000, 4096).await.unwrap();
        assert_eq!((next(&events), node.write_threshold()), (None, 70000));
        backend.write(65536, IoBuf::zeroes(4465), WriteFlags::empty()).await.unwrap();
        let expected = |amount_exceeded, write_threshold| {
            let node_name = "m".to_owned();
            Some(BlockEvent::WriteThreshold { node_name, amount_exceeded, write_threshold })
        };
        assert_eq!((next(&events), node.write_threshold()), (expected(1, 70000), 0));
        backend.write(65536, IoBuf::zeroes(8192), WriteFlags::empty()).await.unwrap();
        assert_eq!((next(&events), node.highest_written_offset()), (None, 73728));
        node.set_write_threshold(100);
        backend.write_zeroes(262_144, 4096, ZeroFlags::empty()).await.unwrap();
        assert_eq!(next(&events), expected(266_140, 100));
        assert_eq!(node.highest_written_offset(), 266_240);
    });
}

#[test]
fn each_node_on_the_path_of_a_write_records_its_own_offset() {
    block_on(async {
        let graph = graph();
        let node = graph
            .open(options("driver=pass,file.driver=memory,file.size=8192"), OpenFlags::default())
            .await;
        let node = node.unwrap();
        let backend = Backend::new(&graph, "", node.clone(), all()).unwrap();
        let below = node.child(oxblk_core::ChildIdx::FILE).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        below.set_write_threshold(1000);
        backend.write(0, IoBuf::zeroes(1024), WriteFlags::empty()).await.unwrap();
        assert!(matches!(next(&events), Some(BlockEvent::WriteThreshold { .. })));
        let highest = (node.highest_written_offset(), below.highest_written_offset());
        assert_eq!(highest, (1024, 1024));
        backend.close().await.unwrap();
    });
}

/// A protocol that maps at most one sector at a time.
struct Sectors;

impl Driver for Sectors {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Host { offset, len: len.min(512) }
    }
    fn read(&self, _offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async { Ok(buf) })
    }
    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn size(&self) -> u64 {
        8192
    }
}

#[test]
fn the_event_of_a_threshold_counts_a_write_that_is_split_as_a_whole() {
    block_on(async {
        let graph = graph();
        let node = graph.add_node(None, DRIVERS[0], Box::new(Sectors), OpenFlags::default());
        let node = node.unwrap();
        let backend = Backend::new(&graph, "", Arc::clone(&node), all()).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        node.set_write_threshold(1000);
        backend.write(512, IoBuf::zeroes(4096), WriteFlags::empty()).await.unwrap();
        let Some(BlockEvent::WriteThreshold { amount_exceeded, write_threshold, .. }) =
            next(&events)
        else {
            panic!("no event");
        };
        assert_eq!((amount_exceeded, write_threshold), (3608, 1000));
        assert_eq!((next(&events), node.highest_written_offset()), (None, 4608));
        backend.close().await.unwrap();
    });
}
