//! Implements a driver whose disk is stored in memory.

use std::sync::{Mutex, PoisonError};

use oxblk::core::{BoxFuture, Driver, DriverFactory, DriverKind, OpenContext, WriteFlags};
use oxblk::{Disk, Error, IoBuf, IoBufMut, Result};

/// The bytes of the disk.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with<T>(&self, offset: u64, len: usize, work: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        let part = range.and_then(|range| bytes.get_mut(range));
        Ok(work(part.ok_or_else(|| Error::invalid("outside the disk"))?))
    }
}

impl Driver for Memory {
    fn read(&self, offset: u64, mut buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.with(offset, buf.len(), |part| buf.copy_from_slice(part))?;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.with(offset, data.len(), |part| part.copy_from_slice(&data)) })
    }

    fn size(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len().try_into().unwrap_or(u64::MAX)
    }
}

/// The factory of the driver.
struct MemoryKind;

impl DriverFactory for MemoryKind {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn open<'a>(&'a self, _: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("only Disk::with_driver opens this driver")) })
    }
}

fn main() -> Result<()> {
    run()
}

/// Writes to a disk in memory and reads it back.
pub fn run() -> Result<()> {
    let disk = Disk::with_driver(&MemoryKind, Memory(Mutex::new(vec![0; 1 << 20]))).wait()?;
    disk.write(4096, b"kept in memory".as_slice()).wait()?;
    println!("{:?}", String::from_utf8_lossy(&disk.read(4096, 14).wait()?));
    disk.close().wait()
}
