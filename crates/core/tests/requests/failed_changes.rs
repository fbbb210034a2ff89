//! Tests of changes that fail halfway: the completed part is visible in the node, and the next flush covers it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use oxblk_core::{Backend, Limits, Preallocation};
use oxblk_ring::block_on;

use crate::all;
use crate::memory::{Memory, graph, node};

#[test]
fn a_flush_after_a_failed_discard_reaches_the_driver() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory {
            bytes: vec![1; 4096].into(),
            limits: Limits { max_discard: 512, ..Limits::default() },
            landing: AtomicU32::new(1),
            bad: Some(512),
            ..Memory::default()
        });
        let backend = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        backend.discard(0, 4096).await.unwrap_err();
        assert_eq!(memory.bytes.lock().unwrap()[0], 0);
        memory.take_log();
        backend.flush().await.unwrap();
        assert_eq!(memory.take_log(), ["flush 0+0"]);
        backend.close().await.unwrap();
    });
}

#[test]
fn a_failed_resize_that_has_changed_the_size_is_visible_and_flushed() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        memory.resize_fails.store(true, SeqCst);
        let backend = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        backend.resize(1024, Preallocation::Off).await.unwrap_err();
        assert_eq!(backend.size(), 1024);
        backend.flush().await.unwrap();
        assert_eq!(memory.take_log(), ["flush 0+0"]);
        backend.close().await.unwrap();
    });
}
