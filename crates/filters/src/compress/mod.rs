//! The filter `compress`: writes become compressed writes.
//!
//! Compressed writes cover whole clusters. So the node has an alignment of one cluster, and `oxblk_core` completes shorter
//! writes with the old data of the cluster.

use oxblk_core::driver::{Compress as _, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Error, Limits, MapOp, Node,
    OpenContext, Result, Step, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use crate::below::{Below, compressor};

/// The driver `compress`.
pub static COMPRESS: CompressFactory = CompressFactory;

/// Opens compress nodes.
#[derive(Debug)]
pub struct CompressFactory;

impl DriverFactory for CompressFactory {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.file()?;
            if compressor(&file).is_err() {
                let format = file.node().factory().name();
                let text = format!("Compression is not supported for underlying format: {format}");
                return Err(Error::unsupported(text));
            }
            Ok(Box::new(Filter { below: Below::new(&context.children) }) as Box<dyn Driver>)
        })
    }
}

/// An open compress node.
struct Filter {
    below: Below,
}

/// The cluster size of the first format from `node` down.
fn cluster_size(node: &Node) -> u64 {
    let own = node.driver().info().cluster_size;
    match node.filtered_child() {
        Some(below) if own == 0 => cluster_size(below.node()),
        _ => own,
    }
}

impl Filter {
    /// Compresses the data of whole clusters. The end of the disk may cut the last cluster.
    async fn write_clusters(&self, offset: u64, mut data: IoBuf) -> Result<()> {
        let room = self.below.size().saturating_sub(offset);
        data.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        if data.is_empty() { Ok(()) } else { self.below.write_compressed(offset, data).await }
    }
}

impl Driver for Filter {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        match op {
            MapOp::Read => Step::Forward { child: ChildIdx::FILE, offset, len },
            MapOp::Write => Step::Slow,
        }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.below.edge()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_clusters(offset, data))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let len = len.min(self.below.size().saturating_sub(offset));
            self.below.edge()?.write_zeroes(offset, len, flags).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.below.edge()?.discard(offset, len).await }))
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        let below = self.below.limits();
        let cluster = self.below.edge().map_or(0, |file| cluster_size(file.node()));
        let cluster = u32::try_from(cluster).unwrap_or(0);
        let request_alignment = below.request_alignment.max(cluster);
        Limits { request_alignment, write_flags: WriteFlags::empty(), ..below }
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(&self.below)
    }
}
