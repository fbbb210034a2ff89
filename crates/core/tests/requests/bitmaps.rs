//! Tests of dirty bitmaps that are added, removed and changed while the node is in use.

use oxblk_core::{Backend, ErrorKind, Limits, WriteFlags};
use oxblk_ring::{block_on, perturb};

use crate::all;
use crate::memory::{Memory, graph, node};

/// Adds and removes two bitmaps on two threads. One of the threads also writes, and its bitmap must record the write.
fn add_and_remove(rounds: u32) {
    let graph = graph();
    let memory = Memory::new(4096, Limits::default());
    let node = node(&graph, "m", &memory);
    let backend = Backend::new(&graph, "b", node.clone(), all()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            block_on(async {
                for _ in 0..rounds {
                    let other = graph.add_bitmap(&node, "other", Some(512)).await.unwrap();
                    graph.delete_bitmap(&node, &other).await.unwrap();
                }
            });
        });
        block_on(async {
            for round in 0..rounds {
                let bitmap = graph.add_bitmap(&node, "b", Some(512)).await.unwrap();
                backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
                assert!(bitmap.map().get(0), "round {round}: a write was not recorded");
                graph.delete_bitmap(&node, &bitmap).await.unwrap();
            }
        });
    });
}

#[test]
fn a_bitmap_records_writes_while_another_one_is_added_and_removed() {
    add_and_remove(300);
    for seed in 1..=8 {
        perturb::start(seed);
        add_and_remove(60);
    }
    perturb::stop();
}

#[test]
fn a_removed_bitmap_does_not_remove_a_new_one_of_the_same_name() {
    block_on(async {
        let graph = graph();
        let node = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let old = graph.add_bitmap(&node, "b", None).await.unwrap();
        graph.delete_bitmap(&node, &old).await.unwrap();
        graph.add_bitmap(&node, "b", None).await.unwrap();
        let error = graph.delete_bitmap(&node, &old).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(node.bitmaps().find("b").is_ok());
    });
}

#[test]
fn a_frozen_bitmap_refuses_changes_until_the_job_ends() {
    block_on(async {
        let graph = graph();
        let node = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let bitmap = graph.add_bitmap(&node, "b", None).await.unwrap();
        let frozen = graph.freeze_bitmap(&node, "b").await.unwrap();
        for refused in [
            graph.clear_bitmap(&node, "b").await.map(drop),
            graph.enable_bitmap(&node, "b", false).await,
            graph.merge_bitmap(&node, "b", bitmap.map()).await,
            graph.freeze_bitmap(&node, "b").await.map(drop),
            graph.delete_bitmap(&node, &bitmap).await,
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        }
        drop(frozen);
        graph.clear_bitmap(&node, "b").await.unwrap();
        graph.delete_bitmap(&node, &bitmap).await.unwrap();
    });
}
