//! Tests of draining and closing: requests wait while a node is drained, and new users are refused while a node closes.

use std::pin::pin;
use std::sync::Arc;

use futures_util::future::{Either, select};
use oxblk_core::{Attachment, Backend, ErrorKind, Limits, WriteFlags};
use oxblk_ring::{block_on, spawn, yield_now};

use crate::memory::{Memory, graph, node};

async fn yields(count: u32) {
    for _ in 0..count {
        yield_now().await;
    }
}

#[test]
fn a_new_backend_waits_for_the_end_of_a_drain() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        let node = node(&graph, "m", &memory);
        let drained = graph.drain(&node).await;
        let backend = Backend::new(&graph, "", node, super::all()).unwrap();
        {
            let write = pin!(backend.write(0, vec![1; 512].into(), WriteFlags::empty()));
            let Either::Right(((), write)) = select(write, pin!(yields(10))).await else {
                panic!("a request passed while the node was drained");
            };
            assert!(memory.take_log().is_empty());
            drop(drained);
            write.await.unwrap();
        }
        assert_eq!(memory.take_log(), ["write 0+512"]);
        // The drain has no effect any more: another drain and a flush succeed.
        drop(graph.drain(&backend.node().unwrap()).await);
        backend.flush().await.unwrap();
    });
}

#[test]
fn a_node_that_closes_accepts_no_new_user() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory { yields: 5, ..Memory::default() });
        let node = node(&graph, "m", &memory);
        let release = {
            let (graph, node) = (graph.clone(), Arc::clone(&node));
            spawn(async move { graph.release(node).await })
        };
        yields(2).await;
        let attached = Attachment::new(&node, "test", "root", super::all());
        assert_eq!(attached.err().unwrap().kind(), ErrorKind::Busy);
        assert_eq!(graph.own(node).unwrap_err().kind(), ErrorKind::Busy);
        release.await.unwrap();
    });
}

#[test]
fn a_copy_that_waits_for_one_backend_does_not_block_a_drain_of_the_other() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        let node = node(&graph, "m", &memory);
        let source = Backend::new(&graph, "", Arc::clone(&node), super::all()).unwrap();
        let target = Backend::new(&graph, "", node, super::all()).unwrap();
        let held = target.quiesce().await;
        let copy = {
            let (source, target) = (source.clone(), target.clone());
            spawn(async move { source.copy_to(0, &target, 512, 512).await })
        };
        yields(5).await;
        // Both backends of the node are drained now.
        drop(source.quiesce().await);
        drop(held);
        // The memory driver has no copy offload. The test requires only that the request has ended.
        assert_eq!(copy.await.unwrap_err().kind(), ErrorKind::Unsupported);
    });
}
