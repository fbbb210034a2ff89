//! Tests of an empty backend that gets a root node inside a drained section of this node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use oxblk_core::{Backend, Limits, WriteFlags};
use oxblk_ring::{IoBuf, block_on, yield_now};

use super::all;
use crate::memory::{Memory, graph, node};

#[test]
fn no_request_begins_in_a_drained_section_when_an_empty_backend_gets_a_root() {
    let graph = graph();
    let memory = Memory::new(8192, Limits::default());
    let node = block_on(async { node(&graph, "m", &memory) });
    graph.keep_open(Arc::clone(&node)).unwrap();
    let backend = Backend::empty(&graph, "b", all());
    let done = AtomicBool::new(false);
    let violations = std::thread::scope(|scope| {
        for _ in 0..3 {
            let (backend, done) = (backend.clone(), &done);
            scope.spawn(move || {
                block_on(async {
                    while !done.load(SeqCst) {
                        let _ = backend.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await;
                        yield_now().await;
                    }
                });
            });
        }
        let (graph, backend, memory, done) = (&graph, &backend, &memory, &done);
        let main = scope.spawn(move || {
            block_on(async {
                let mut violations = 0;
                for round in 0..2000 {
                    let drained = graph.drain(&node).await;
                    memory.take_log();
                    if round % 2 == 0 {
                        backend.insert(&node).await.unwrap();
                    } else {
                        let mut change = graph.change();
                        change.set_root(backend, &node);
                        change.run().await.unwrap();
                    }
                    for _ in 0..5 {
                        yield_now().await;
                    }
                    let log = memory.take_log();
                    violations += u32::from(log.iter().any(|line| line.starts_with("write")));
                    drop(drained);
                    backend.remove().await.unwrap();
                }
                done.store(true, SeqCst);
                backend.close().await.unwrap();
                graph.allow_close(node).await.unwrap();
                violations
            })
        });
        main.join().unwrap()
    });
    assert_eq!(violations, 0, "requests began in a drained section");
}
