//! Tests of opens that refer to nodes, while control operations use these nodes.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use futures_util::future::{Either, join, join_all, select};
use futures_util::poll;
use oxblk_core::{Backend, Error, Graph, Limits, Node, OpenFlags, Preallocation, WriteFlags};
use oxblk_ring::{block_on, yield_now};

use crate::memory::{Memory, graph, node, options};

fn memory() -> Arc<Memory> {
    Memory::new(4096, Limits::default())
}

async fn open(graph: &Graph, dotted: &str) -> Result<Arc<Node>, Error> {
    graph.open(options(dotted), OpenFlags::default()).await
}

/// Polls `future` and lets the other tasks run, 50 times.
async fn must_wait<F: Future<Output: std::fmt::Debug> + Unpin>(future: F) -> F {
    let pause = pin!(async {
        for _ in 0..50 {
            yield_now().await;
        }
    });
    match select(future, pause).await {
        Either::Right(((), future)) => future,
        Either::Left((outcome, _)) => panic!("the operation did not wait: {outcome:?}"),
    }
}

type Open<'a> = Pin<Box<dyn Future<Output = Result<Arc<Node>, Error>> + 'a>>;

/// Opens images that refer to the node `m` in every way. Each open must wait until the requests of `memory` end.
async fn each_reference(graph: &Graph, memory: &Memory) {
    let by_name = "json:{\"driver\":\"pass\",\"node-name\":\"j\",\"file\":\"m\"}";
    let opens: [Open<'_>; 4] = [
        Box::pin(open(graph, "driver=pass,node-name=f,file=m")),
        Box::pin(open(graph, "driver=pass,file.driver=pass,file.file=m")),
        Box::pin(open(graph, "driver=checkered,file.driver=memory,file.size=8192,backing=m")),
        Box::pin(graph.open_image(by_name, options(""), OpenFlags::default())),
    ];
    let waiting = join_all(opens.map(must_wait)).await;
    memory.held.store(false, SeqCst);
    for opened in join_all(waiting).await {
        graph.release(opened.unwrap()).await.unwrap();
    }
}

/// Opens images that refer to the node `m` while a resize of `below` waits for a write in flight.
async fn each_reference_during_a_resize(graph: &Graph, memory: &Memory, below: &Arc<Node>) {
    let disk = Backend::new(graph, "", Arc::clone(below), super::all()).unwrap();
    memory.held.store(true, SeqCst);
    let mut write = pin!(disk.write(0, vec![1; 512].into(), WriteFlags::empty()));
    assert!(poll!(&mut write).is_pending());
    let mut resize = pin!(disk.resize(8192, Preallocation::Off));
    assert!(poll!(&mut resize).is_pending());
    let (written, (resized, ())) = join(write, join(resize, each_reference(graph, memory))).await;
    written.and(resized).unwrap();
    disk.close().await.unwrap();
}

#[test]
fn an_open_waits_for_a_control_operation_on_the_node_to_which_it_refers() {
    block_on(async {
        let graph = graph();
        let memory = memory();
        let below = node(&graph, "m", &memory);
        each_reference_during_a_resize(&graph, &memory, &below).await;
    });
}

#[test]
fn an_open_waits_for_a_control_operation_below_the_node_to_which_it_refers() {
    block_on(async {
        let graph = graph();
        let memory = memory();
        let below = node(&graph, "b", &memory);
        let _middle = open(&graph, "driver=pass,node-name=m,file=b").await.unwrap();
        each_reference_during_a_resize(&graph, &memory, &below).await;
    });
}

#[test]
fn a_control_operation_waits_for_an_open_that_refers_to_its_node() {
    block_on(async {
        let graph = graph();
        let memory = memory();
        let below = node(&graph, "m", &memory);
        memory.held.store(true, SeqCst);
        let mut opening = pin!(open(&graph, "driver=pass,node-name=f,file=m,reads=on"));
        assert!(poll!(&mut opening).is_pending());
        while memory.take_log().is_empty() {
            yield_now().await;
        }
        let add = async { graph.add_bitmap(&below, "b", None).await.map(drop) };
        let adding = must_wait(Box::pin(add)).await;
        memory.held.store(false, SeqCst);
        let (opened, added) = join(opening, adding).await;
        added.unwrap();
        graph.release(opened.unwrap()).await.unwrap();
    });
}

#[test]
fn an_image_may_refer_to_a_node_that_is_opened_with_it() {
    block_on(async {
        let graph = graph();
        let dotted = "driver=checkered,file.driver=memory,file.size=8192,file.node-name=x,\
                      backing.driver=pass,backing.file=x";
        let node = open(&graph, dotted).await.unwrap();
        assert_eq!(graph.node("x").unwrap().parents().len(), 2);
        graph.release(node).await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn two_opens_that_refer_to_the_same_nodes_in_another_order_both_end() {
    block_on(async {
        let graph = graph();
        let (_a, _b) = (node(&graph, "a", &memory()), node(&graph, "b", &memory()));
        let open = |file: &str, backing: &str| {
            let dotted = format!("driver=checkered,file={file},backing={backing}");
            let graph = graph.clone();
            async move { open(&graph, &dotted).await }
        };
        let many = (0..10).flat_map(|_| [open("a", "b"), open("b", "a")]);
        let opened = join_all(many).await;
        // The file of one image is the backing file of the other one.
        let opened: Vec<_> = opened.into_iter().flatten().collect();
        assert!(!opened.is_empty());
        for node in opened {
            graph.release(node).await.unwrap();
        }
    });
}

#[test]
fn a_failed_open_closes_the_node_to_which_it_refers_if_nothing_else_uses_it() {
    block_on(async {
        for nested in
            ["driver=pass,fails=on,file=m", "driver=pass,fails=on,file.driver=pass,file.file=m"]
        {
            let graph = graph();
            let memory = memory();
            let below = node(&graph, "m", &memory);
            open(&graph, nested).await.unwrap_err();
            assert_eq!(memory.take_log(), ["close 0+0"], "{nested}");
            assert!(graph.node("m").is_none());
            drop(below);
        }
    });
}
