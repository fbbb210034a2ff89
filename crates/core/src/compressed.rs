//! Compressed writes in two steps: compressing a cluster, and storing the compressed cluster.
//!
//! Compression takes processor time and no I/O, so many clusters can be compressed concurrently, in any order. Storing
//! a cluster allocates space, and the order of these allocations determines the layout of the image. A caller that
//! needs the same layout on every run first compresses clusters ([`Backend::compress`]), and then stores them in disk
//! order ([`Backend::write_compressed`]).

use std::sync::Arc;

use oxblk_ring::IoBuf;

use crate::{Backend, Error, Node, Result};

/// A cluster that has been compressed but is not stored yet.
#[derive(Debug, Clone)]
pub struct CompressedCluster {
    /// The uncompressed guest data.
    pub plain: IoBuf,
    /// The compressed data. `None`: compression saves no space, so the cluster is stored uncompressed.
    pub stream: Option<IoBuf>,
}

impl Backend {
    /// Compresses `data` for [`Backend::write_compressed`]. `data` is one cluster, or the incomplete cluster at the end
    /// of the disk.
    ///
    /// # Errors
    /// When the root's driver has no compression; the errors of the driver, for example if memory runs out.
    pub async fn compress(&self, data: IoBuf) -> Result<CompressedCluster> {
        let node = self.node()?;
        let compress = node.driver().compress().ok_or_else(cannot_compress)?;
        compress.compress(data).await.map_err(|error| error.on_node(node.name()))
    }

    /// Ends a series of compressed writes: pads the image file to whole sectors, because some programs that read images
    /// expect whole sectors.
    ///
    /// # Errors
    /// When the root's driver has no compression; the errors of the driver.
    pub async fn end_compressed(&self) -> Result<()> {
        let end = |node: Arc<Node>| async move {
            let compress = node.driver().compress().ok_or_else(cannot_compress)?;
            compress.end().await.map_err(|error| error.on_node(node.name()))
        };
        self.graph().run_exclusive(&self.node()?, self.while_writer(end)).await
    }
}

pub(crate) fn cannot_compress() -> Error {
    Error::unsupported("Compression not supported for this file format")
}
