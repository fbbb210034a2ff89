//! Tracking of the requests of a node: which requests are waited for, and changes of the root node.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use oxblk_core::{Backend, ErrorKind, Limits, OpenFlags, ReadFlags, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut, block_on, sim, sleep, spawn, yield_now};

use super::all;
use crate::memory::{Memory, graph, node, options};

#[test]
fn a_serialising_write_waits_for_requests_that_began_above_a_filter() {
    sim::run(1, async {
        let graph = graph();
        let memory = Memory::new(8192, Limits::default());
        let below = node(&graph, "m", &memory);
        let filter = graph
            .open(options("driver=pass,node-name=filter,file=m"), OpenFlags::default())
            .await
            .unwrap();
        let guest = Backend::new(&graph, "guest", filter, all()).unwrap();
        let job = Backend::new(&graph, "job", Arc::clone(&below), all()).unwrap();
        memory.delay_ms.store(10_000, SeqCst);
        let writer = guest.clone();
        let write =
            spawn(async move { writer.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await });
        for _ in 0..20 {
            yield_now().await;
        }
        assert_eq!(memory.take_log().len(), 1, "the write is in flight");
        memory.delay_ms.store(0, SeqCst);
        let serialising = spawn(async move {
            let tracking = job.track_requests().await.unwrap();
            let data = vec![1; 512].into();
            let outcome = job.write(0, data, WriteFlags::SERIALISING).await;
            drop(tracking);
            job.close().await.unwrap();
            outcome
        });
        sleep(Duration::from_secs(1)).await;
        let log = memory.take_log();
        write.await.unwrap();
        serialising.await.unwrap();
        guest.close().await.unwrap();
        assert!(log.is_empty(), "the serialising write began before the other had ended: {log:?}");
    });
}

#[test]
fn a_serialising_write_is_refused_until_all_requests_in_flight_are_tracked() {
    sim::run(2, async {
        let graph = graph();
        let memory = Memory::new(8192, Limits::default());
        let disk = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        memory.delay_ms.store(10_000, SeqCst);
        let writer = disk.clone();
        let write =
            spawn(async move { writer.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await });
        while memory.take_log().is_empty() {
            yield_now().await;
        }
        memory.delay_ms.store(0, SeqCst);
        let edge = disk.root().unwrap();
        let tracking = spawn(async move { edge.track_requests().await });
        sleep(Duration::from_secs(1)).await;
        let data = IoBuf::from(vec![1; 512]);
        let early = disk.write(0, data.clone(), WriteFlags::SERIALISING).await;
        assert_eq!(early.unwrap_err().kind(), ErrorKind::Invalid);
        write.await.unwrap();
        let tracking = tracking.await;
        disk.write(0, data, WriteFlags::SERIALISING).await.unwrap();
        drop(tracking);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_copying_read_survives_a_change_of_the_root_node() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(8192, Limits::default());
        let below = node(&graph, "m", &memory);
        let guest = Backend::new(&graph, "guest", Arc::clone(&below), all()).unwrap();
        let filter = graph
            .open(options("driver=pass,node-name=filter,file=m"), OpenFlags::default())
            .await
            .unwrap();
        let drained = graph.drain(&below).await;
        let reader = guest.clone();
        let read = spawn(async move {
            reader.read_with(0, IoBufMut::new(512), ReadFlags::COPY_ON_READ).await.map(drop)
        });
        for _ in 0..100 {
            yield_now().await;
        }
        // A filter is inserted, as a job does, while the read waits for the end of the drained section.
        let mut change = graph.change();
        change.replace_node(&below, &filter, |_| true);
        change.run().await.unwrap();
        drop(drained);
        let outcome = read.await;
        guest.close().await.unwrap();
        outcome.unwrap();
    });
}
