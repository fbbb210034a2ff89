//! The requests of a backend: reads, writes, zero writes, discards, flushes and status queries.
//!
//! [`Backend::begin`] counts each request as in flight. [`Backend::carry_out`] makes the attempts of a request. Reads and writes
//! of a plain backend do not use this function, because it moves large futures. If a request may need more than
//! one host operation to change data, the request runs to its end even if its future is dropped. A flush also runs to
//! its end.

use std::cell::Cell;
use std::sync::Arc;

use oxblk_ring::{ForeignVec, ForeignVecMut, IoBuf, IoBufMut};

use super::Backend;
use super::accounting::IoType;
use super::attempts::Io;
use super::in_flight::Request;
use crate::request::{self, ChainStatus, Start};
use crate::{
    CompressedCluster, Edge, Node, ReadFlags, RequestTracking, Result, Want, WriteFlags, ZeroFlags,
};

impl Backend {
    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if the range does not lie inside the disk; otherwise the errors of
    /// the driver and the host.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let size = buf.len();
        let io = Io { kind: IoType::Read, offset, len: request::as_u64(size), writes: None };
        if self.is_plain() {
            let request = match self.try_begin()? {
                Some(request) => request,
                None => self.begin().await?,
            };
            let request = request.check(offset, io.len)?.only_reads();
            // A copy of the end of `read_once`: this is the path of most requests.
            if request.root.below.reads_write {
                return read_once(request, offset, buf).await;
            }
            let buf = request::read_padded(request.root.edge.node(), offset, buf).await?;
            request.done();
            return Ok(buf);
        }
        let mut given = Some(buf);
        self.carry_out(
            io,
            || IoBufMut::zeroed(size),
            |request, _| {
                // An attempt that has failed has consumed its buffer.
                let buf = given.take().unwrap_or_else(|| IoBufMut::new(size));
                read_once(request, offset, buf)
            },
        )
        .await
    }

    /// Reads with flags. With [`ReadFlags::COPY_ON_READ`], the root node tracks its requests during the read. A user with many
    /// such reads keeps a [`RequestTracking`] ([`Self::track_requests`]): otherwise each read first waits for the requests in
    /// flight.
    ///
    /// # Errors
    /// The errors of [`Self::read`]; [`Denied`](crate::ErrorKind::Denied) for a copy without permission to write unchanged data.
    pub async fn read_with(
        &self,
        offset: u64,
        buf: IoBufMut,
        flags: ReadFlags,
    ) -> Result<IoBufMut> {
        if !flags.contains(ReadFlags::COPY_ON_READ) {
            return self.read(offset, buf).await;
        }
        let size = buf.len();
        let io = Io { kind: IoType::Read, offset, len: request::as_u64(size), writes: None };
        let given = Cell::new(Some(buf));
        self.carry_out_tracked(
            io,
            || IoBufMut::zeroed(size),
            |edge| {
                let buf = given.take().unwrap_or_else(|| IoBufMut::new(size));
                async move { edge.read_with(offset, buf, flags).await }
            },
        )
        .await
    }

    /// Copies what a read with [`ReadFlags::COPY_ON_READ`] of the range would copy, without a buffer for the data. See
    /// [`Self::read_with`].
    ///
    /// # Errors
    /// The errors of [`Self::read_with`].
    pub async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        let io = Io { kind: IoType::Read, offset, len, writes: None };
        self.carry_out_tracked(io, || (), |edge| async move { edge.prefetch(offset, len).await })
            .await
    }

    /// Makes the root node track its requests until the value is dropped; see [`RequestTracking`]. Waits for the requests in
    /// flight.
    ///
    /// # Errors
    /// `ENOMEDIUM` if the backend has no root node.
    pub async fn track_requests(&self) -> Result<RequestTracking> {
        Ok(self.root()?.track_requests().await)
    }

    /// Carries out a request for which the root node tracks its requests. The request runs to its end.
    async fn carry_out_tracked<T, F>(
        &self,
        io: Io,
        ignored: impl FnOnce() -> T,
        start: impl Fn(Arc<Edge>) -> F,
    ) -> Result<T>
    where
        T: 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let tracking = Arc::new(self.track_requests().await?);
        self.carry_out(io, ignored, |request, _| {
            self.attempt_tracked(io, request, Arc::clone(&tracking), &start)
        })
        .await
    }

    /// Makes an attempt of a request for which the root node tracks its requests.
    async fn attempt_tracked<'a, T, F>(
        &'a self,
        io: Io,
        mut request: Request<'a>,
        mut tracking: Arc<RequestTracking>,
        start: &impl Fn(Arc<Edge>) -> F,
    ) -> Result<T>
    where
        T: 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        // A change of the graph may have replaced the root node while the request waited. The new root node then has to wait for
        // its requests in flight, so this request ends and begins again.
        while !tracking.is_of(request.root.edge.node()) {
            request.done();
            tracking = Arc::new(self.track_requests().await?);
            request = self.admit(&io).await?;
        }
        let work = start(Arc::clone(&request.root.edge));
        request
            .run_to_completion(async move {
                let outcome = work.await;
                drop(tracking);
                outcome
            })
            .await
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) if the range does not lie inside the disk;
    /// [`Denied`](crate::ErrorKind::Denied) without write permission; [`Unsupported`](crate::ErrorKind::Unsupported)
    /// for [`WriteFlags::COMPRESSED`] if the format has no compression; otherwise the errors of the driver and the
    /// host.
    pub async fn write(&self, offset: u64, mut data: IoBuf, flags: WriteFlags) -> Result<()> {
        let flags = if self.is_write_through() { flags | WriteFlags::FUA } else { flags };
        let len = request::as_u64(data.len());
        let io = Io { kind: IoType::Write, offset, len, writes: Some(flags) };
        if self.is_plain() {
            let request = match self.try_begin()? {
                Some(request) => request,
                None => self.begin().await?,
            };
            let request = request.check(offset, len)?.check_write(flags)?;
            return write_once(request, offset, data, flags).await;
        }
        self.carry_out(
            io,
            || (),
            |request, is_last| {
                let data = if is_last { std::mem::take(&mut data) } else { data.clone() };
                write_once(request, offset, data, flags)
            },
        )
        .await
    }

    /// Reads `memory.len()` bytes at `offset` into memory that others may change. If the range lies in a file of the host, the
    /// host writes to the memory directly. After an error, the contents of the memory are undefined.
    ///
    /// After the returned future has completed, also with an error, nothing writes to the memory any more. If the future is
    /// dropped before, the host may still write to the memory. It has stopped when the owner of `memory` has been dropped:
    /// each operation of the host keeps a reference to the owner.
    ///
    /// # Errors
    /// The errors of [`Self::read`].
    pub async fn read_into(&self, offset: u64, memory: ForeignVecMut) -> Result<()> {
        let len = request::as_u64(memory.len());
        let io = Io { kind: IoType::Read, offset, len, writes: None };
        // If the device ignores errors, a failed read returns zeroes, as in `read`.
        let ignored = memory.clone();
        self.carry_out(
            io,
            || ignored.zero(),
            |request, _| {
                let memory = memory.clone();
                read_into_once(request, offset, memory)
            },
        )
        .await
    }

    /// Writes `memory.len()` bytes at `offset` from memory that others may change. If the range lies in a file of the host, the
    /// host reads the memory directly. Otherwise the data is copied once before a driver sees it. If the memory changes during
    /// the write, the disk gets old or new bytes.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn write_from(
        &self,
        offset: u64,
        memory: ForeignVec,
        flags: WriteFlags,
    ) -> Result<()> {
        let direct = WriteFlags::FUA | WriteFlags::UNCHANGED;
        if memory.is_empty() || !direct.contains(flags) {
            return self.write(offset, memory.to_buf(), flags).await;
        }
        let flags = if self.is_write_through() { flags | WriteFlags::FUA } else { flags };
        let len = request::as_u64(memory.len());
        let io = Io { kind: IoType::Write, offset, len, writes: Some(flags) };
        self.carry_out(
            io,
            || (),
            |request, _| write_from_once(request, offset, memory.clone(), flags),
        )
        .await
    }

    /// Stores at `offset` a cluster that [`Self::compress`] has compressed.
    ///
    /// # Errors
    /// The errors of [`Self::write`], and [`Unsupported`](crate::ErrorKind::Unsupported) if the format has no
    /// compression.
    pub async fn write_compressed(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
        let flags = match self.is_write_through() {
            true => WriteFlags::FUA,
            false => WriteFlags::empty(),
        };
        let len = request::as_u64(cluster.plain.len());
        let io = Io { kind: IoType::Write, offset, len, writes: Some(flags) };
        self.carry_out(
            io,
            || (),
            |request, _| {
                let (root, cluster) = (Arc::clone(&request.root), cluster.clone());
                request.run_to_completion(async move {
                    root.edge.write_compressed(offset, cluster, flags).await
                })
            },
        )
        .await
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The errors of [`Self::write`]; `ENOTSUP` with [`ZeroFlags::NO_FALLBACK`] if the zeroes would have to be written
    /// as data.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let flags = if self.is_write_through() { flags | ZeroFlags::FUA } else { flags };
        let writes = Some(WriteFlags::of_zero_write(flags));
        let io = Io { kind: IoType::Write, offset, len, writes };
        self.carry_out(
            io,
            || (),
            |request, _| {
                let root = Arc::clone(&request.root);
                request.run_to_completion(async move {
                    root.edge.write_zeroes(offset, len, flags).await
                })
            },
        )
        .await
    }

    /// Discards a range: the caller no longer needs the contents of the range.
    ///
    /// # Errors
    /// The errors of [`Self::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let io = Io { kind: IoType::Unmap, offset, len, writes: Some(WriteFlags::empty()) };
        self.carry_out(
            io,
            || (),
            |request, _| {
                let root = Arc::clone(&request.root);
                request.run_to_completion(async move { root.edge.discard(offset, len).await })
            },
        )
        .await
    }

    /// Flushes all completed writes to stable storage.
    ///
    /// # Errors
    /// The errors of the driver and the host.
    pub async fn flush(&self) -> Result<()> {
        let io = Io { kind: IoType::Flush, offset: 0, len: 0, writes: None };
        self.carry_out(
            io,
            || (),
            |request, _| {
                let root = Arc::clone(&request.root);
                request.run_to_completion(async move { root.edge.flush().await })
            },
        )
        .await
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
}

async fn read_once(request: Request<'_>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
    let request = request.only_reads();
    if request.root.below.reads_write {
        let root = Arc::clone(&request.root);
        let work = async move { request::read_padded(root.edge.node(), offset, buf).await };
        return request.run_to_completion(work).await;
    }
    let buf = request::read_padded(request.root.edge.node(), offset, buf).await?;
    request.done();
    Ok(buf)
}

async fn read_into_once(request: Request<'_>, offset: u64, memory: ForeignVecMut) -> Result<()> {
    let request = request.only_reads();
    if request.root.below.reads_write {
        let root = Arc::clone(&request.root);
        let work = async move { request::read_into(root.edge.node(), offset, memory).await };
        return request.run_to_completion(work).await;
    }
    request::read_into(request.root.edge.node(), offset, memory).await?;
    request.done();
    Ok(())
}

async fn write_from_once(
    request: Request<'_>,
    offset: u64,
    memory: ForeignVec,
    flags: WriteFlags,
) -> Result<()> {
    let root = Arc::clone(&request.root);
    let flushes = flags.contains(WriteFlags::FUA);
    let rest = match request::start_write_from(root.edge.node(), offset, memory) {
        Start::InPlace(operation) => operation.done(root.edge.node()).await.err().map(Err),
        Start::Begun(begun) => Some(Ok(begun)),
    };
    if rest.is_none() && !flushes {
        request.done();
        return Ok(());
    }
    let work = async move {
        let node = root.edge.node();
        match rest {
            Some(Ok(begun)) => {
                request::continue_write_from(node, offset, begun, flags - WriteFlags::FUA).await?;
            }
            Some(Err(rest)) => request::finish_in_place(node, offset, rest).await?,
            None => {}
        }
        if flushes { root.edge.flush().await } else { Ok(()) }
    };
    request.run_to_completion(work).await
}

async fn write_once(
    request: Request<'_>,
    offset: u64,
    data: IoBuf,
    flags: WriteFlags,
) -> Result<()> {
    let root = Arc::clone(&request.root);
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
                let finish =
                    async move { request::finish_in_place(root.edge.node(), offset, rest).await };
                request.run_to_completion(finish).await
            }
        },
        Err(begun) => {
            let work =
                async move { request::continue_write(root.edge.node(), offset, begun).await };
            request.run_to_completion(work).await
        }
    }
}
