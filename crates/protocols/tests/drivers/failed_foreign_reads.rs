//! Reads into foreign memory that fail. After the end of a read, the host writes nothing to the memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use oxblk_core::{
    Backend, BoxFuture, ChildIdx, ChildrenRef, Driver, DriverFactory, DriverKind, DriverTable,
    Graph, MapOp, OpenContext, OpenFlags, Options, Perm, Permissions, Result, Step, WriteFlags,
};
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::{File, ForeignOwner, ForeignVecMut, IoBuf, IoBufMut, sim, sleep};
use sim::{FailRule, FaultOp, Faults};

const BLOCK: u64 = 4096;

/// A format that maps each block separately, like an image with scattered clusters.
struct Blocks(ChildrenRef);

impl Driver for Blocks {
    fn map(&self, _: MapOp, offset: u64, len: u64) -> Step {
        let len = len.min(BLOCK - offset % BLOCK);
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.0.require(ChildIdx::FILE)?.read(offset, buf).await })
    }
    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.0.require(ChildIdx::FILE)?.write(offset, data, flags).await })
    }
    fn size(&self) -> u64 {
        self.0.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }
}

struct BlocksFactory;

impl DriverFactory for BlocksFactory {
    fn name(&self) -> &'static str {
        "blocks"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(
            async move { Ok(Box::new(Blocks(Arc::clone(&context.children))) as Box<dyn Driver>) },
        )
    }
}

static DRIVERS: DriverTable = &[&FILE, &BlocksFactory];

#[test]
fn no_memory_changes_after_a_read_has_failed() {
    let mut late = Vec::new();
    for seed in 0..40 {
        let disk = sim::Disk::new(seed, 1 << 20);
        let words: Arc<Vec<AtomicU64>> = Arc::new((0..4096).map(|_| AtomicU64::new(0)).collect());
        let is_late = sim::run(seed, async {
            let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let driver = FileDriver::from_ring_file(File::sim(&disk), disk.len());
            let file = graph.add_node(Some("f"), &FILE, Box::new(driver), OpenFlags::default());
            graph.keep_open(file.unwrap()).unwrap();
            let options = Options::from_dotted("driver=blocks,file=f", None).unwrap();
            let node = graph.open(options, OpenFlags::default()).await.unwrap();
            let taken = Perm::CONSISTENT_READ | Perm::WRITE;
            let backend = Backend::new(&graph, "", node, Permissions::sharing_all(taken)).unwrap();
            let data = vec![0xab; 4 * 4096];
            backend.write(0, data.into(), WriteFlags::empty()).await.unwrap();
            // The first block cannot be read.
            disk.set_faults(Faults {
                fail: vec![FailRule {
                    op: FaultOp::Read,
                    nth: None,
                    range: Some(0..512),
                    errno: 5,
                    once: false,
                }],
                delay: Duration::from_micros(10)..Duration::from_millis(5),
                ..Faults::default()
            });
            let base = words.as_ptr().cast::<u8>().cast_mut();
            let owner = Arc::clone(&words) as ForeignOwner;
            // SAFETY: the range lies in the words, which the owner keeps and which are atomics.
            let memory = unsafe { ForeignVecMut::new(owner, [(base, 4 * 4096)]) };
            backend.read_into(0, memory).await.unwrap_err();
            // The request has ended: the guest uses its memory for something else.
            words.iter().for_each(|word| word.store(0, Relaxed));
            sleep(Duration::from_secs(1)).await;
            words.iter().any(|word| word.load(Relaxed) != 0)
        });
        if is_late {
            late.push(seed);
        }
    }
    assert!(late.is_empty(), "the host wrote to the memory after the end of the read: {late:?}");
}
