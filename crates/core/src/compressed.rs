//! Compressed writes in two steps.
//!
//! Compressing takes processor time and no I/O, so many clusters can be compressed at once, in any order. Storing them
//! allocates, and the order of that decides how the image is laid out. A caller that wants the same layout on every run
//! compresses ahead ([`Backend::compress`]) and stores in the order of the disk ([`Backend::write_compressed`]).

use std::sync::Arc;

use oxblk_ring::IoBuf;

use crate::{Backend, Error, Node, Result};

/// A cluster that has been compressed and is not stored yet.
#[derive(Debug, Clone)]
pub struct CompressedCluster {
    /// What the guest is to read.
    pub plain: IoBuf,
    /// The compressed stream; `None` where it would not be smaller, so that the cluster is stored as it is.
    pub stream: Option<IoBuf>,
}

impl Backend {
    /// Compresses `data`, which is one cluster (or what is left of it at the end of the image), for
    /// [`Backend::write_compressed`].
    ///
    /// # Errors
    /// When the root's driver does not compress; when memory runs out.
    pub async fn compress(&self, data: IoBuf) -> Result<CompressedCluster> {
        let node = self.node()?;
        let compress = node.driver().compress().ok_or_else(cannot_compress)?;
        compress.compress(data).await.map_err(|error| error.on_node(node.name()))
    }

    /// Ends a series of compressed writes: the file is made whole sectors long, which is what some readers of images
    /// expect.
    ///
    /// # Errors
    /// When the root's driver does not compress; as the file reports.
    pub async fn end_compressed(&self) -> Result<()> {
        let end = |node: Arc<Node>| async move {
            let compress = node.driver().compress().ok_or_else(cannot_compress)?;
            compress.end().await.map_err(|error| error.on_node(node.name()))
        };
        self.graph().run_exclusive(&self.node()?, end).await
    }
}

pub(crate) fn cannot_compress() -> Error {
    Error::unsupported("Compression not supported for this file format")
}
