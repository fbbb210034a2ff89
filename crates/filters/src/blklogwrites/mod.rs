//! The filter `blklogwrites`: records all changes of a disk in a log. The log can be replayed up to any point, for example to
//! test what a file system finds after a crash.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | opening a node |
//! | `format` | the format of the log |
//! | `log` | appending entries |
//!
//! A change is recorded when the disk has completed it. So all changes before the entry of a flush were completed before the flush
//! began. A change holds a lock on its range until it is recorded, so changes that overlap are recorded in the order in which they
//! took effect.
//!
//! Locks: first `Blklogwrites::changes`, then `Blklogwrites::log`.

mod factory;
mod format;
mod log;

use std::sync::Arc;

use oxblk_core::driver::Resize;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildrenRef, Driver, Edge, Limits, Preallocation, Result, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, Mutex, RangeLock};

pub use factory::{BLKLOGWRITES, BlklogwritesFactory};

use log::{Log, Payload};

/// An open blklogwrites node.
struct Blklogwrites {
    children: ChildrenRef,
    /// The child that contains the log.
    log_child: ChildIdx,
    /// Requests are aligned to the sectors of the log.
    sector_size: u32,
    /// The ranges that are being changed.
    changes: RangeLock,
    log: Mutex<Log>,
}

impl Blklogwrites {
    fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    fn log_file(&self) -> Result<Arc<Edge>> {
        self.children.require(self.log_child)
    }

    /// Changes a range of the disk, then records the change.
    async fn record(
        &self,
        (offset, len): (u64, u64),
        change: impl Future<Output = Result<()>>,
        flags: u64,
        payload: Payload,
    ) -> Result<()> {
        let _changing = self.changes.lock(offset..offset.saturating_add(len)).await;
        change.await?;
        let mut log = self.log.lock().await;
        log.append(&*self.log_file()?, (offset, len), flags, payload).await
    }
}

impl Driver for Blklogwrites {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.file()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let len = bytes(data.len());
            let kept = data.clone();
            let change = async { self.file()?.write(offset, data, flags).await };
            let logged = if flags.contains(WriteFlags::FUA) { format::FUA } else { 0 };
            self.record((offset, len), change, logged, Payload::Data(kept)).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let change = async { self.file()?.write_zeroes(offset, len, flags).await };
            self.record((offset, len), change, 0, Payload::Zeroes).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let change = async { self.file()?.discard(offset, len).await };
            self.record((offset, len), change, format::DISCARD, Payload::None).await
        }))
    }

    /// No change is recorded during the flush, because the flush may not cover it.
    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let mut log = self.log.lock().await;
            self.file()?.flush().await?;
            let file = self.log_file()?;
            log.append(&file, (0, 0), format::FLUSH, Payload::None).await?;
            log.count(&file).await
        }))
    }

    fn size(&self) -> u64 {
        self.children.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|file| file.node().limits());
        below.map_or_else(Limits::default, |below| Limits {
            request_alignment: self.sector_size,
            write_zeroes_alignment: 1,
            discard_alignment: 1,
            write_flags: WriteFlags::FUA,
            zero_flags: below.zero_flags & ZeroFlags::MAY_UNMAP,
            ..Limits::clone(&below)
        })
    }

    /// Counts the last entries, if there was no flush after them.
    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.log.lock().await.count(&*self.log_file()?).await }))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for Blklogwrites {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.file()?.resize(size, preallocation).await })
    }
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
