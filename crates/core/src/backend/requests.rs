//! The requests of a backend: reads, writes, zero writes, discards, flushes and status queries.
//!
//! Each request begins with [`Backend::begin`], which counts the request as in flight. If a request may need more than
//! one host operation to change data, the request runs to its end even if its future is dropped. A flush also runs to
//! its end.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_ring::{IoBuf, IoBufMut};

use super::Backend;
use super::in_flight::Request;
use crate::request::{self, ChainStatus};
use crate::{CompressedCluster, Node, Result, Want, WriteFlags, ZeroFlags};

impl Backend {
    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if the range does not lie inside the disk; otherwise the errors of
    /// the driver and the host.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let len = request::as_u64(buf.len());
        let request = self.begin().await?.check(offset, len)?.only_reads();
        let buf = if request.root.below.reads_write {
            let root = Arc::clone(&request.root);
            let work = async move { request::read_padded(root.edge.node(), offset, buf).await };
            request.run_to_completion(work).await?
        } else {
            let buf = request::read_padded(request.root.edge.node(), offset, buf).await?;
            request.done();
            buf
        };
        let counters = self.0.counters.mine();
        counters.read_ops.fetch_add(1, Relaxed);
        counters.read_bytes.fetch_add(len, Relaxed);
        Ok(buf)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if the range does not lie inside the disk;
    /// [`Denied`](crate::ErrorKind::Denied) without write permission; [`Unsupported`](crate::ErrorKind::Unsupported)
    /// for [`WriteFlags::COMPRESSED`] if the format has no compression; otherwise the errors of the driver and the
    /// host.
    pub async fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> Result<()> {
        let len = request::as_u64(data.len());
        let request = self.begin().await?.check(offset, len)?;
        let flags =
            if self.0.write_through.load(Relaxed) { flags | WriteFlags::FUA } else { flags };
        self.write_root(request, offset, data, flags).await?;
        self.count_write(len);
        Ok(())
    }

    /// Stores at `offset` a cluster that [`Self::compress`] has compressed.
    ///
    /// # Errors
    /// The errors of [`Self::write`], and [`Unsupported`](crate::ErrorKind::Unsupported) if the format has no
    /// compression.
    pub async fn write_compressed(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
        let len = request::as_u64(cluster.plain.len());
        let request = self.begin().await?.check(offset, len)?;
        let through = self.0.write_through.load(Relaxed);
        let flags = if through { WriteFlags::FUA } else { WriteFlags::empty() };
        let root = Arc::clone(&request.root);
        let work = async move { root.edge.write_compressed(offset, cluster, flags).await };
        request.run_to_completion(work).await?;
        self.count_write(len);
        Ok(())
    }

    async fn write_root(
        &self,
        request: Request<'_>,
        offset: u64,
        data: IoBuf,
        flags: WriteFlags,
    ) -> Result<()> {
        let root = Arc::clone(&request.root);
        if let Err(error) = root.edge.may_write_with(flags) {
            request.done();
            return Err(error);
        }
        if !flags.is_empty() || data.is_empty() {
            let work = async move { root.edge.write(offset, data, flags).await };
            return request.run_to_completion(work).await;
        }
        match request::start_in_place(root.edge.node(), offset, data) {
            Ok(operation) => match operation.done(root.edge.node()).await {
                Ok(()) => {
                    request.done();
                    Ok(())
                }
                Err(rest) => {
                    let finish = async move {
                        request::finish_in_place(root.edge.node(), offset, rest).await
                    };
                    request.run_to_completion(finish).await
                }
            },
            Err(data) => {
                let work = async move { root.edge.write(offset, data, flags).await };
                request.run_to_completion(work).await
            }
        }
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The errors of [`Self::write`]; `ENOTSUP` with [`ZeroFlags::NO_FALLBACK`] if the zeroes would have to be written
    /// as data.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let request = self.begin().await?.check(offset, len)?;
        let flags = if self.0.write_through.load(Relaxed) { flags | ZeroFlags::FUA } else { flags };
        let root = Arc::clone(&request.root);
        let work = async move { root.edge.write_zeroes(offset, len, flags).await };
        request.run_to_completion(work).await?;
        self.count_write(len);
        Ok(())
    }

    /// Discards a range: the caller no longer needs the contents of the range.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let request = self.begin().await?.check(offset, len)?;
        let root = Arc::clone(&request.root);
        request.run_to_completion(async move { root.edge.discard(offset, len).await }).await?;
        self.count_write(len);
        Ok(())
    }

    /// Flushes all completed writes to stable storage.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn flush(&self) -> Result<()> {
        let request = self.begin().await?;
        let root = Arc::clone(&request.root);
        request.run_to_completion(async move { root.edge.flush().await }).await?;
        self.0.counters.mine().flush_ops.fetch_add(1, Relaxed);
        Ok(())
    }

    /// The block status of the start of a range, through the complete backing chain.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if `offset` lies past the end of the disk; otherwise the errors of
    /// the driver and the host.
    pub async fn block_status(&self, offset: u64, len: u64, want: Want) -> Result<ChainStatus> {
        self.status_above(None, offset, len, want).await
    }

    /// The block status of the start of a range, from the root down to, but not including, `base`. Without `base`, the
    /// complete backing chain is queried.
    ///
    /// # Errors
    /// The errors of [`Self::block_status`].
    pub async fn status_above(
        &self,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Result<ChainStatus> {
        let request = self.begin().await?.check(offset, 0)?.only_reads();
        let node = request.root.edge.node();
        let status = request::status_above(node, base, offset, len, want).await?;
        request.done();
        Ok(status)
    }

    pub(super) fn count_write(&self, len: u64) {
        let counters = self.0.counters.mine();
        counters.write_ops.fetch_add(1, Relaxed);
        counters.write_bytes.fetch_add(len, Relaxed);
    }
}
