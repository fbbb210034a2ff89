//! Tests of draining and closing: requests wait while a node is drained, and new users are refused while a node closes.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use futures_util::future::{Either, select};
use oxblk_core::driver::Drain;
use oxblk_core::{
    Attachment, Backend, BoxFuture, ChildIdx, ChildrenRef, Driver, DriverFactory, DriverKind,
    DriverTable, Error, ErrorKind, Gate, Graph, Limits, OpenContext, OpenFlags, Options, Result,
    WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, spawn, yield_now};

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
        assert_eq!(graph.keep_open(node).unwrap_err().kind(), ErrorKind::Busy);
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

/// The units of work that two filters still have to do. When a filter ends a unit, it may give the other filter a unit.
static WORK: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
/// The number of units that the filters give each other.
static GIVEN: AtomicU32 = AtomicU32::new(0);

/// A filter that works in the background.
struct Worker {
    children: ChildrenRef,
    number: usize,
}

impl Driver for Worker {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.children.require(ChildIdx::FILE)?.read(offset, buf).await })
    }

    fn write(&self, _: u64, _: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::invalid("The test does not write")) })
    }

    fn size(&self) -> u64 {
        self.children.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }

    fn drain(&self) -> Option<&dyn Drain> {
        Some(self)
    }
}

impl Drain for Worker {
    fn begin(&self) {}

    fn end(&self) {}

    fn idle(&self) -> Option<BoxFuture<'_, ()>> {
        let (own, other) = (&WORK[self.number], &WORK[1 - self.number]);
        (own.load(SeqCst) != 0).then(|| {
            Box::pin(async move {
                yields(3).await;
                if GIVEN.load(SeqCst) != 0 {
                    GIVEN.fetch_sub(1, SeqCst);
                    other.fetch_add(1, SeqCst);
                }
                own.fetch_sub(1, SeqCst);
            }) as BoxFuture<'_, ()>
        })
    }
}

struct WorkerFactory;

impl DriverFactory for WorkerFactory {
    fn name(&self) -> &'static str {
        "worker"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let number = context.options.take_number("number")?.unwrap_or(0);
            let children = Arc::clone(&context.children);
            let number = usize::try_from(number).unwrap();
            Ok(Box::new(Worker { children, number }) as Box<dyn Driver>)
        })
    }
}

#[test]
fn a_drain_waits_for_work_that_a_driver_begins_while_the_drain_waits_for_another() {
    static DRIVERS: DriverTable = &[&WorkerFactory];
    block_on(async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let memory = Memory::new(4096, Limits::default());
        let base = node(&graph, "m", &memory);
        graph.keep_open(base).unwrap();
        let text = "driver=worker,number=0,file.driver=worker,file.number=1,file.file=m";
        let options = Options::from_dotted(text, None).unwrap();
        let disk = graph.open_backend(None, options, OpenFlags::default()).await.unwrap();
        for first in [0, 1] {
            WORK[first].store(1, SeqCst);
            GIVEN.store(4, SeqCst);
            drop(disk.quiesce().await);
            let left = [&WORK[0], &WORK[1], &GIVEN].map(|count| count.load(SeqCst));
            assert_eq!(left, [0, 0, 0]);
            WORK.iter().for_each(|work| work.store(0, SeqCst));
        }
    });
}
