//! Tests of internal snapshots of a disk below a filter that must see all changes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use oxblk_core::snapshot::{SnapshotInfo, Snapshots};
use oxblk_core::{
    Backend, BoxFuture, Driver, DriverFactory, DriverKind, DriverTable, Errno, Error, ErrorKind,
    Gate, Graph, OpenContext, OpenFlags, Options, Perm, Permissions, Result, WriteFlags,
};
use oxblk_filters::blklogwrites::BLKLOGWRITES;
use oxblk_filters::copy_before_write::COPY_BEFORE_WRITE;
use oxblk_filters::snapshot_access::SNAPSHOT_ACCESS;
use oxblk_ring::{IoBuf, IoBufMut, block_on};

static DRIVERS: DriverTable = &[&BLKLOGWRITES, &COPY_BEFORE_WRITE, &SNAPSHOT_ACCESS];
const SIZE: usize = 256 << 10;

/// An image in memory. Its snapshot has the byte 0xee everywhere.
struct Image(Arc<Mutex<Vec<u8>>>);

impl Driver for Image {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let at = usize::try_from(offset).unwrap();
            let len = buf.len();
            buf.copy_from_slice(&self.0.lock().unwrap()[at..at + len]);
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let at = usize::try_from(offset).unwrap();
            self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
            Ok(())
        })
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

impl Snapshots for Image {
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>> {
        Box::pin(async { Ok(vec![SnapshotInfo { id: "1".to_owned(), ..Default::default() }]) })
    }

    fn create<'a>(&'a self, _: &'a SnapshotInfo) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn apply<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.0.lock().unwrap().fill(0xee);
            Ok(())
        })
    }

    fn delete<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn load<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

struct ImageFactory;

impl DriverFactory for ImageFactory {
    fn name(&self) -> &'static str {
        "image"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::invalid("not by options")) })
    }
}

static IMAGE: ImageFactory = ImageFactory;

fn graph() -> Graph {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    for name in ["file", "further"] {
        let driver = Box::new(Image(Arc::new(Mutex::new(vec![1; SIZE]))));
        let node = graph.add_node(Some(name), &IMAGE, driver, OpenFlags::default()).unwrap();
        graph.keep_open(node).unwrap();
    }
    graph
}

async fn open(graph: &Graph, text: &str, taken: Perm) -> Backend {
    let options = Options::from_dotted(text, None).unwrap();
    let node = graph.open(options, OpenFlags::default()).await.unwrap();
    Backend::new(graph, "", node, Permissions::sharing_all(taken)).unwrap()
}

/// Tries to apply a snapshot, which fails. The other operations with snapshots succeed.
async fn check_refused(disk: &Backend, filter: &str) {
    disk.create_snapshot(&SnapshotInfo::default()).await.unwrap();
    assert_eq!(disk.snapshots().await.unwrap().len(), 1);
    let error = disk.apply_snapshot("1").await.unwrap_err();
    assert_eq!((error.kind(), error.raw_errno()), (ErrorKind::Unsupported, Errno::OPNOTSUPP));
    let expected = format!(
        "A snapshot cannot replace the contents of a disk below the filter '{filter}, which must see all changes"
    );
    assert!(error.to_string().contains(&expected), "{error}");
    disk.delete_snapshot("1").await.unwrap();
}

#[test]
fn a_snapshot_is_not_applied_below_copy_before_write() {
    block_on(async {
        let graph = graph();
        let writes = Perm::CONSISTENT_READ | Perm::WRITE;
        let text = "driver=copy-before-write,node-name=cbw,file=file,target=further";
        let disk = open(&graph, text, writes).await;
        let text = "driver=snapshot-access,node-name=snap,file=cbw";
        let snapshot = open(&graph, text, Perm::CONSISTENT_READ).await;
        check_refused(&disk, "cbw' (copy-before-write)").await;
        for disk in [&disk, &snapshot] {
            let old = disk.read(0, IoBufMut::new(SIZE)).await.unwrap();
            assert!(old.iter().all(|byte| *byte == 1), "the disk has changed");
        }
    });
}

#[test]
fn a_snapshot_is_not_applied_below_blklogwrites() {
    block_on(async {
        let graph = graph();
        let writes = Perm::CONSISTENT_READ | Perm::WRITE;
        let text = "driver=blklogwrites,node-name=log,file=file,log=further";
        let disk = open(&graph, text, writes).await;
        check_refused(&disk, "log' (blklogwrites)").await;
        disk.close().await.unwrap();
        // The filter has no users any more.
        let node = graph.node("file").unwrap();
        let disk = Backend::new(&graph, "", node, Permissions::sharing_all(writes)).unwrap();
        disk.apply_snapshot("1").await.unwrap();
        let new = disk.read(0, IoBufMut::new(SIZE)).await.unwrap();
        assert!(new.iter().all(|byte| *byte == 0xee));
    });
}
