//! Tests of write-through mode: data is on stable storage when a request completes.

use std::sync::{Arc, Mutex};

use oxblk_core::driver::CopyRange;
use oxblk_core::{
    Backend, BoxFuture, Driver, HostFile, MapOp, OpenFlags, Result, Step, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use crate::all;
use crate::memory::{DRIVERS, graph};

type Log = Arc<Mutex<Vec<&'static str>>>;

/// A protocol that offloads copies, and logs copies and flushes.
struct Offloading(Log);

impl Driver for Offloading {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Host { offset, len }
    }
    fn host_file(&self) -> Option<HostFile<'_>> {
        None
    }
    fn read(&self, _offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async { Ok(buf) })
    }
    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        self.0.lock().unwrap().push("flush");
        Some(Box::pin(async { Ok(()) }))
    }
    fn size(&self) -> u64 {
        4096
    }
    fn copy_range(&self) -> Option<&dyn CopyRange> {
        Some(self)
    }
}

impl CopyRange for Offloading {
    fn copy_to<'a>(
        &'a self,
        _offset: u64,
        _target: &'a dyn Driver,
        _target_offset: u64,
        _len: u64,
    ) -> BoxFuture<'a, Result<()>> {
        self.0.lock().unwrap().push("copy");
        Box::pin(async { Ok(()) })
    }
}

#[test]
fn an_offloaded_copy_is_flushed_in_write_through_mode() {
    for (through, expected) in [(false, vec!["copy"]), (true, vec!["copy", "flush"])] {
        block_on(async {
            let (graph, log) = (graph(), Log::default());
            let disk = || {
                let driver = Box::new(Offloading(Arc::clone(&log)));
                let node = graph.add_node(None, DRIVERS[0], driver, OpenFlags::default()).unwrap();
                Backend::new(&graph, "", node, all()).unwrap()
            };
            let (source, target) = (disk(), disk());
            target.set_write_through(through);
            source.copy_to(0, &target, 1024, 512).await.unwrap();
            assert_eq!(*log.lock().unwrap(), expected);
        });
    }
}
