//! The filter `blkverify`: sends each request to an image under test and to a raw copy of it, and compares the results. It tests
//! drivers.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | opening a node: options and file names |
//! | `compare` | comparing the results |
//!
//! A request whose results differ fails, and the log reports the difference. (QEMU ends the process.)
//!
//! A write locks its range, so that writes that overlap reach both children in the same order. Reads take no lock. If the data
//! differs, a read locks the range and reads again, because a write may have reached only one of the children.

mod compare;
mod factory;

use std::sync::Arc;

use futures_util::future::join;
use oxblk_core::driver::Resize;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildrenRef, Driver, Edge, Limits, Preallocation, Result, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, RangeLock};

pub use factory::{BLKVERIFY, BlkverifyFactory};

use compare::Request;

/// An open blkverify node.
struct Blkverify {
    children: ChildrenRef,
    /// The image under test.
    test: ChildIdx,
    /// The ranges that are being written.
    changes: RangeLock,
}

impl Blkverify {
    fn raw(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn test(&self) -> Result<Arc<Edge>> {
        self.children.require(self.test)
    }

    async fn read_both(
        &self,
        offset: u64,
        len: usize,
    ) -> Result<(Result<IoBufMut>, Result<IoBufMut>)> {
        let (test, raw) = (self.test()?, self.raw()?);
        let (test, raw) =
            join(test.read(offset, IoBufMut::new(len)), raw.read(offset, IoBufMut::new(len))).await;
        Ok((test, raw))
    }

    /// Sends a change of a range to both children.
    async fn on_both<F>(&self, request: Request, change: impl Fn(Arc<Edge>) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let _changing = self.changes.lock(request.range()).await;
        let (test, raw) = join(change(self.test()?), change(self.raw()?)).await;
        request.same_outcome(test, raw).map(drop)
    }
}

impl Driver for Blkverify {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let request = Request::new("read", offset, bytes(buf.len()));
            let mut both = self.read_both(offset, buf.len()).await?;
            if let (Ok(test), Ok(raw)) = &both
                && test[..] != raw[..]
            {
                let _unchanged = self.changes.lock(request.range()).await;
                both = self.read_both(offset, buf.len()).await?;
            }
            let (test, raw) = request.same_outcome(both.0, both.1)?;
            request.same_data(&test, &raw)?;
            // The request path needs the buffer that it has passed.
            buf.copy_from_slice(&test);
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let change = |edge: Arc<Edge>| {
                let data = data.clone();
                async move { edge.write(offset, data, flags).await }
            };
            self.on_both(Request::new("write", offset, bytes(data.len())), change).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let change =
                |edge: Arc<Edge>| async move { edge.write_zeroes(offset, len, flags).await };
            self.on_both(Request::new("write", offset, len), change).await
        }))
    }

    fn size(&self) -> u64 {
        self.children.get(self.test).map_or(0, |test| test.size())
    }

    fn limits(&self) -> Limits {
        let zero_flags = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
        let write_flags = WriteFlags::FUA;
        let mut limits = Limits { write_flags, zero_flags, grows: true, ..Limits::default() };
        for (_, edge) in self.children.iter() {
            let child = edge.node().limits();
            limits.zero_flags &= child.zero_flags;
            limits.grows &= child.grows;
        }
        limits
    }

    /// `blkverify:RAW:TEST`.
    fn filename(&self) -> Option<String> {
        let raw = self.raw().ok()?.node().filename()?;
        let test = self.test().ok()?.node().filename()?;
        Some(format!("blkverify:{raw}:{test}"))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for Blkverify {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.test()?.resize(size, preallocation).await?;
            self.raw()?.resize(size, preallocation).await
        })
    }
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
