//! The drivers `null-co` and `null-aio`: a disk without storage. Written data is dropped. Reads leave the buffer
//! unchanged; with `read-zeroes=on`, reads return zeroes. With `latency-ns`, each read, write, zero write and flush
//! waits for this time.

use std::time::Duration;

use oxblk_core::driver::Reopen;
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, Limits, MapOp, OpenContext, OpenFlags,
    Options, Result, Status, StatusFlags, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};
use serde::{Deserialize, Serialize};

/// The `null-co` driver.
pub static NULL_CO: NullFactory = NullFactory("null-co");
/// The `null-aio` driver: the same driver with another name.
pub static NULL_AIO: NullFactory = NullFactory("null-aio");

const DEFAULT_SIZE: u64 = 1 << 30;
const SECTOR: u64 = 512;

/// Creates null disks.
#[derive(Debug)]
pub struct NullFactory(&'static str);

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct NullOptions {
    filename: Option<String>,
    size: Option<u64>,
    read_zeroes: Option<bool>,
    latency_ns: Option<i64>,
}

struct Null {
    name: &'static str,
    size: u64,
    read_zeroes: bool,
    latency: Duration,
}

impl Null {
    async fn pause(&self) {
        if !self.latency.is_zero() {
            oxblk_ring::sleep(self.latency).await;
        }
    }
}

impl Driver for Null {
    fn map(&self, op: MapOp, _offset: u64, len: u64) -> Step {
        if op == MapOp::Read && self.read_zeroes && self.latency.is_zero() {
            Step::Zero { len }
        } else {
            Step::Slow
        }
    }

    fn read(&self, _offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.pause().await;
            if self.read_zeroes {
                buf.fill(0);
            }
            Ok(buf)
        })
    }

    fn write(&self, _offset: u64, _data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pause().await;
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.pause().await;
            Ok(())
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.pause().await;
            Ok(())
        }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        let mut flags = StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        if self.read_zeroes {
            flags |= StatusFlags::ZERO;
        }
        let status = Status { len, flags, host: Some(offset), child: None };
        Some(Box::pin(async move { Ok(status) }))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: self.read_zeroes,
            ..Limits::default()
        }
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(0)
    }

    fn filename(&self) -> Option<String> {
        Some(format!("{}://", self.name))
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }
}

/// A reopen changes nothing, because no open option affects a null disk.
impl Reopen for Null {
    fn prepare(&self, _flags: OpenFlags, _options: &Options) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

impl DriverFactory for NullFactory {
    fn name(&self) -> &'static str {
        self.0
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn schemes(&self) -> &'static [&'static str] {
        if self.0 == "null-co" { &["null-co"] } else { &["null-aio"] }
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let rest = filename.strip_prefix(self.0).and_then(|rest| rest.strip_prefix("://"));
        if rest != Some("") {
            let text = format!("The only allowed filename for this driver is '{}://'", self.0);
            return Err(Error::invalid(text));
        }
        Ok(Options::new())
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let options: NullOptions = context.options.extract()?;
            let size = options.size.unwrap_or(DEFAULT_SIZE);
            // The graph refuses a node whose size is too large.
            let size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
            let latency = u64::try_from(options.latency_ns.unwrap_or(0))
                .map_err(|_| Error::invalid("latency-ns is invalid"))?;
            Ok(Box::new(Null {
                name: self.0,
                size,
                read_zeroes: options.read_zeroes.unwrap_or(false),
                latency: Duration::from_nanos(latency),
            }) as Box<dyn Driver>)
        })
    }
}
