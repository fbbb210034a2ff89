//! Each request asks a driver for admission once, however it continues below the driver.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use oxblk_core::{
    Admission, Backend, BoxFuture, ChildIdx, Children, Driver, DriverFactory, DriverKind, Gate,
    Graph, IncomingRequest, Limits, MapOp, Objects, OpenContext, OpenFlags, RequestKind, Result,
    Step, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on, spawn, yield_now};

use super::memory::{CheckeredFactory, MemoryFactory, options};

/// What a [`Turnstile`] has admitted, and how.
#[derive(Debug, Default)]
struct Admitted {
    requests: Mutex<Vec<(RequestKind, u64, u64)>>,
    /// Requests must wait before they pass.
    is_slow: AtomicBool,
    /// Requests wait until this is cleared.
    is_closed: AtomicBool,
}

impl Admitted {
    fn take(&self) -> Vec<(RequestKind, u64, u64)> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn pass(&self, request: &IncomingRequest) {
        let request = (request.kind, request.offset, request.len);
        self.requests.lock().unwrap().push(request);
    }
}

/// A filter that admits requests.
struct Turnstile {
    children: Arc<Children>,
    admitted: Arc<Admitted>,
}

impl Admission for Turnstile {
    fn try_admit(&self, request: &IncomingRequest) -> bool {
        let passes = !self.admitted.is_slow.load(SeqCst);
        if passes {
            self.admitted.pass(request);
        }
        passes
    }

    fn admit(&self, request: IncomingRequest) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            yield_now().await;
            while self.admitted.is_closed.load(SeqCst) {
                yield_now().await;
            }
            self.admitted.pass(&request);
        })
    }
}

impl Driver for Turnstile {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }

    fn admission(&self) -> Option<&dyn Admission> {
        Some(self)
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.children.require(ChildIdx::FILE)?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(
            async move { self.children.require(ChildIdx::FILE)?.write(offset, data, flags).await },
        )
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.children.require(ChildIdx::FILE)?.write_zeroes(offset, len, flags).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(
            async move { self.children.require(ChildIdx::FILE)?.discard(offset, len).await },
        ))
    }

    fn size(&self) -> u64 {
        self.children.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }

    fn limits(&self) -> Limits {
        // Zero writes and discards reach the driver in several pieces.
        Limits { max_write_zeroes: 1024, max_discard: 1024, ..Limits::default() }
    }
}

struct TurnstileFactory;

impl DriverFactory for TurnstileFactory {
    fn name(&self) -> &'static str {
        "turnstile"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let id = context.options.take_str("counts")?.unwrap_or_default();
            let admitted = context.graph.objects().get::<Admitted>(&id).unwrap();
            let children = Arc::clone(&context.children);
            Ok(Box::new(Turnstile { children, admitted }) as Box<dyn Driver>)
        })
    }
}

static DRIVERS: &[&dyn DriverFactory] = &[&MemoryFactory, &CheckeredFactory, &TurnstileFactory];

/// A disk, and the requests that the filters `a` and `b` have admitted.
async fn open(disk: &str) -> (Backend, Arc<Admitted>, Arc<Admitted>) {
    let (a, b) = (Arc::<Admitted>::default(), Arc::<Admitted>::default());
    let objects = Objects::default();
    objects.add("a", Arc::clone(&a)).unwrap();
    objects.add("b", Arc::clone(&b)).unwrap();
    let graph = Graph::with_objects(DRIVERS, Gate::Anything, objects);
    let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
    let disk = graph.open_backend(None, options(disk), flags).await.unwrap();
    (disk, a, b)
}

/// A filter above a format whose blocks of 512 bytes are scattered over two files.
const ABOVE_FORMAT: &str = "driver=turnstile,counts=a,file.driver=checkered,\
    file.file.driver=memory,file.file.size=8192,file.backing.driver=memory,file.backing.size=3000";
/// Filters above and below a format.
const AROUND_FORMAT: &str = "driver=turnstile,counts=a,file.driver=checkered,\
    file.file.driver=turnstile,file.file.counts=b,file.file.file.driver=memory,\
    file.file.file.size=8192,file.backing.driver=memory,file.backing.size=3000";
/// Two filters above a disk.
const TWO_FILTERS: &str = "driver=turnstile,counts=a,file.driver=turnstile,file.counts=b,\
    file.file.driver=memory,file.file.size=8192";

use RequestKind::{Discard, Read, Write, WriteZeroes};

#[test]
fn a_request_that_is_split_below_a_driver_is_admitted_once() {
    block_on(async {
        for is_slow in [false, true] {
            let (disk, a, b) = open(AROUND_FORMAT).await;
            a.is_slow.store(is_slow, SeqCst);
            b.is_slow.store(!is_slow, SeqCst);
            disk.read(100, IoBufMut::new(5000)).await.unwrap();
            assert_eq!(a.take(), [(Read, 100, 5000)]);
            // Each block in the file is a request of its own there.
            let mut below = b.take();
            below.sort_unstable_by_key(|(_, offset, _)| *offset);
            let blocks = [(0, 512), (612, 412), (1024, 512), (1536, 512), (2560, 512)];
            assert_eq!(below, blocks.map(|(offset, len)| (Read, offset, len)));
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn a_write_is_admitted_once_even_if_a_part_fails() {
    block_on(async {
        let (disk, a, _) = open(ABOVE_FORMAT).await;
        for is_slow in [false, true] {
            a.is_slow.store(is_slow, SeqCst);
            disk.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
            assert_eq!(a.take(), [(Write, 0, 512)]);
            // The second block is in the backing file: the format has no space for it.
            disk.write(0, vec![2; 1024].into(), WriteFlags::FUA).await.unwrap_err();
            assert_eq!(a.take(), [(Write, 0, 1024)]);
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn each_filter_of_a_stack_admits_every_kind_of_request_once() {
    block_on(async {
        let (disk, a, b) = open(TWO_FILTERS).await;
        for (slow, slow_below) in [(false, false), (false, true), (true, false), (true, true)] {
            a.is_slow.store(slow, SeqCst);
            b.is_slow.store(slow_below, SeqCst);
            let data: IoBuf = super::pattern(4000, 1).into();
            disk.write(96, data.clone(), WriteFlags::empty()).await.unwrap();
            let read = disk.read(96, IoBufMut::new(4000)).await.unwrap();
            assert_eq!(*read, *data);
            let passed = [(Write, 96, 4000), (Read, 96, 4000)];
            assert_eq!((a.take(), b.take()), (passed.to_vec(), passed.to_vec()));

            disk.write_zeroes(0, 3000, ZeroFlags::empty()).await.unwrap();
            disk.discard(1024, 2048).await.unwrap();
            assert_eq!(a.take(), [(WriteZeroes, 0, 3000), (Discard, 1024, 2048)]);
            // The limits of the filter above split the requests: each piece is a request to the filter below.
            assert_eq!(b.take().len(), 3 + 2);
            disk.flush().await.unwrap();
            assert!(a.take().is_empty() && b.take().is_empty());
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn a_request_outside_the_disk_is_not_admitted() {
    block_on(async {
        let (disk, a, _) = open(ABOVE_FORMAT).await;
        disk.read(8000, IoBufMut::new(512)).await.unwrap_err();
        disk.write(8000, IoBuf::zeroes(512), WriteFlags::empty()).await.unwrap_err();
        assert!(a.take().is_empty());
        disk.close().await.unwrap();
    });
}

#[test]
fn a_request_that_is_dropped_while_it_waits_does_not_pass() {
    block_on(async {
        let (disk, a, b) = open(TWO_FILTERS).await;
        b.is_slow.store(true, SeqCst);
        b.is_closed.store(true, SeqCst);
        let reader = disk.clone();
        let read = spawn(async move { reader.read(0, IoBufMut::new(512)).await });
        while a.requests.lock().unwrap().is_empty() {
            yield_now().await;
        }
        yield_now().await;
        drop(read);
        b.is_closed.store(false, SeqCst);
        disk.flush().await.unwrap();
        assert_eq!((a.take(), b.take()), (vec![(Read, 0, 512)], vec![]));
        disk.close().await.unwrap();
    });
}
