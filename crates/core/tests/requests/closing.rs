//! Closing a node while a control operation on the node below is in progress.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join;
use oxblk_core::driver::Backing;
use oxblk_core::{
    Backend, BoxFuture, Driver, Graph, Node, OpenFlags, Perm, Permissions, Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, sim, sleep};

use crate::all;
use crate::memory::{DRIVERS, graph, options};

type Log = Arc<Mutex<Vec<&'static str>>>;

/// A protocol that can be emptied, in several steps.
struct Emptied(Log);

impl Emptied {
    fn record(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }
}

impl Driver for Emptied {
    fn read(&self, _offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async { Ok(buf) })
    }
    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        self.record("flush");
        Some(Box::pin(async { Ok(()) }))
    }
    fn size(&self) -> u64 {
        8192
    }
    fn backing(&self) -> Option<&dyn Backing> {
        Some(self)
    }
}

impl Backing for Emptied {
    fn change<'a>(
        &'a self,
        _filename: Option<&'a str>,
        _format: Option<&'a str>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.record("begin");
            sleep(Duration::from_millis(1)).await;
            self.record("end");
            Ok(())
        })
    }
}

/// Adds a node that records its operations in `log`.
fn add(graph: &Graph, name: &str, log: &Log) -> Arc<Node> {
    let driver = Box::new(Emptied(Arc::clone(log)));
    graph.add_node(Some(name), DRIVERS[0], driver, OpenFlags::default()).unwrap()
}

#[test]
fn a_close_does_not_flush_the_node_below_during_a_control_operation() {
    // Time is virtual.
    sim::run(1, async {
        let (graph, log) = (graph(), Log::default());
        let node = add(&graph, "m", &log);
        let writer = Permissions::sharing_all(Perm::WRITE);
        let below = Backend::new(&graph, "below", node, writer).unwrap();
        let above = graph.open(options("driver=pass,file=m"), OpenFlags::default());
        let above = Backend::new(&graph, "above", above.await.unwrap(), all()).unwrap();
        above.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        let close = async {
            while log.lock().unwrap().is_empty() {
                sleep(Duration::from_micros(10)).await;
            }
            above.close().await.unwrap();
        };
        let (emptied, ()) = join(below.make_empty(), close).await;
        emptied.unwrap();
        assert_eq!(*log.lock().unwrap(), ["begin", "end", "flush"]);
        below.close().await.unwrap();
    });
}

#[test]
fn a_close_does_not_wait_for_a_control_operation_on_another_disk() {
    sim::run(1, async {
        let (graph, log) = (graph(), Log::default());
        let node = add(&graph, "m", &log);
        let writer = Permissions::sharing_all(Perm::WRITE);
        let busy = Backend::new(&graph, "busy", Arc::clone(&node), writer).unwrap();
        let other = add(&graph, "o", &Log::default());
        let other = Backend::new(&graph, "other", other, writer).unwrap();
        let reader = Backend::new(&graph, "reader", node, Permissions::sharing_all(Perm::empty()));
        let (reader, closing) = (reader.unwrap(), Arc::clone(&log));
        let close = async {
            while log.lock().unwrap().is_empty() {
                sleep(Duration::from_micros(10)).await;
            }
            // This close waits for the control operation. The close of the other disk does not wait.
            let waiting = async {
                reader.close().await.unwrap();
                closing.lock().unwrap().push("closed");
            };
            let closes = async {
                other.close().await.unwrap();
                closing.lock().unwrap().push("other closed");
            };
            join(waiting, closes).await;
        };
        let (emptied, ()) = join(busy.make_empty(), close).await;
        emptied.unwrap();
        assert_eq!(log.lock().unwrap()[..3], ["begin", "other closed", "end"]);
        busy.close().await.unwrap();
    });
}
