//! The node below a filter, and requests that a filter passes on unchanged.

use std::sync::Arc;

use oxblk_core::driver::{Compress, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, ChildrenRef, CompressedCluster, Edge, Errno, Error, Limits, Preallocation,
    Result, WriteFlags, ZeroFlags,
};
use oxblk_ring::IoBuf;

/// The `file` child of a filter.
pub(crate) struct Below(ChildrenRef);

impl Below {
    pub(crate) fn new(children: &ChildrenRef) -> Self {
        Self(Arc::clone(children))
    }

    /// The edge to the child.
    pub(crate) fn edge(&self) -> Result<Arc<Edge>> {
        self.0.require(ChildIdx::FILE)
    }

    pub(crate) fn size(&self) -> u64 {
        self.0.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }

    /// The limits of the child, for a filter that passes writes and zero writes on with their flags.
    pub(crate) fn limits(&self) -> Limits {
        let below = self.0.get(ChildIdx::FILE).map(|file| file.node().limits());
        let below = below.as_deref().cloned().unwrap_or_default();
        Limits {
            write_flags: WriteFlags::FUA,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            ..below
        }
    }

    /// The capability to pass compressed writes on, if the child can compress.
    pub(crate) fn compress(&self) -> Option<&dyn Compress> {
        self.edge().is_ok_and(|file| compressor(&file).is_ok()).then_some(self)
    }
}

/// The capability of the node below to compress.
pub(crate) fn compressor(file: &Edge) -> Result<&dyn Compress> {
    file.node().driver().compress().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Compress for Below {
    fn write_compressed(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.edge()?.write(offset, data, WriteFlags::COMPRESSED).await })
    }

    fn compress(&self, data: IoBuf) -> BoxFuture<'_, Result<CompressedCluster>> {
        Box::pin(async move { compressor(&*self.edge()?)?.compress(data).await })
    }

    fn store(&self, offset: u64, cluster: CompressedCluster) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.edge()?.write_compressed(offset, cluster, WriteFlags::empty()).await
        })
    }

    fn end(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { compressor(&*self.edge()?)?.end().await })
    }
}

impl Resize for Below {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.edge()?.resize(size, preallocation).await })
    }
}
