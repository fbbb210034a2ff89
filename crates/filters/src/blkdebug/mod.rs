//! The filter `blkdebug`: fails and suspends requests at chosen steps of the driver above, and replaces the limits of the node
//! below. It tests how drivers and programs handle errors.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `factory` | opening a node: options and file names |
//! | `rules` | what happens at an event, and which requests fail |
//! | `breakpoints` | suspended requests |
//! | `sections` | rules as sections of a configuration file or of the options |
//! | `overrides` | the limits that the node reports |
//!
//! The driver above reports its steps as debug events (`oxblk_core::DebugEvent`). At an event, rules make errors active. Each
//! request then looks for an active error that fits it.

mod breakpoints;
mod factory;
mod overrides;
mod rules;
mod sections;

use std::sync::Arc;

use oxblk_core::driver::{Drain, Reopen, Resize};
use oxblk_core::{
    BoxFuture, Breakpoints, ChildIdx, ChildrenRef, DebugEvent, DebugEvents, Driver, Edge, Error,
    Limits, OpenFlags, Options, Perm, Permissions, Preallocation, Result, Status, Want, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

pub use factory::{BLKDEBUG, BlkdebugFactory};

use overrides::Overrides;
use rules::{IoType, Rules};

/// An open blkdebug node.
struct Blkdebug {
    children: ChildrenRef,
    rules: Rules,
    overrides: Overrides,
    /// Permissions on the child in addition to those of the parents.
    takes: Perm,
    /// Permissions that the node does not share on the child.
    unshares: Perm,
    /// The name of the configuration file. Empty if there is none.
    config: String,
    /// A file name cannot describe the node, because it has rules or limits from options.
    has_options: bool,
    /// The options of the node.
    options: Options,
}

impl Blkdebug {
    fn image(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    /// Fails if a rule wants this request to fail. `len` is 0 for a flush.
    async fn check(&self, io: IoType, offset: u64, len: u64) -> Result<()> {
        let Some(fault) = self.rules.fault(io, offset, len) else { return Ok(()) };
        if !fault.delay.is_zero() {
            self.rules.delay(fault.delay).await;
        }
        if fault.errno == 0 {
            return Ok(());
        }
        if !fault.is_immediate {
            oxblk_ring::yield_now().await;
        }
        Err(Error::from_errno(fault.errno))
    }
}

impl Driver for Blkdebug {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            self.check(IoType::Read, offset, bytes(buf.len())).await?;
            self.image()?.read(offset, buf).await
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(IoType::Write, offset, bytes(data.len())).await?;
            self.image()?.write(offset, data, flags).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            if len < u64::from(self.overrides.zero_alignment()) {
                return Err(Error::unsupported("The range is shorter than opt-write-zero"));
            }
            self.check(IoType::WriteZeroes, offset, len).await?;
            self.image()?.write_zeroes(offset, len, flags).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            // Parts of blocks are ignored.
            let Some((offset, len)) = self.overrides.whole_blocks(offset, len) else {
                return Ok(());
            };
            self.check(IoType::Discard, offset, len).await?;
            self.image()?.discard(offset, len).await
        }))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.check(IoType::Flush, 0, 0).await?;
            self.image()?.flush().await
        }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(async move {
            self.check(IoType::BlockStatus, offset, len).await?;
            Ok(Status::mapped(len, ChildIdx::FILE, offset))
        }))
    }

    fn size(&self) -> u64 {
        self.children.get(ChildIdx::FILE).map_or(0, |image| image.size())
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|image| image.node().limits());
        self.overrides.apply(below.as_deref())
    }

    fn filename(&self) -> Option<String> {
        if self.has_options {
            return None;
        }
        let image = self.image().ok()?.node().filename()?;
        Some(format!("blkdebug:{}:{image}", self.config))
    }

    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let taken = parents.taken | self.takes;
        Some(Permissions { taken, shared: parents.shared - self.unshares })
    }

    fn drain(&self) -> Option<&dyn Drain> {
        Some(&self.rules)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn debug_events(&self) -> Option<&dyn DebugEvents> {
        Some(&self.rules)
    }

    fn breakpoints(&self) -> Option<&dyn Breakpoints> {
        Some(&self.rules)
    }
}

impl DebugEvents for Rules {
    fn raise(&self, event: DebugEvent) -> BoxFuture<'_, ()> {
        Box::pin(self.apply_event(event))
    }
}

impl Resize for Blkdebug {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.image()?.resize(size, preallocation).await })
    }
}

/// A reopen changes no option.
impl Reopen for Blkdebug {
    fn prepare(&self, _flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let changed = options
            .iter()
            .find(|(key, value)| self.options.get(key) != Some(*value))
            .or_else(|| self.options.iter().find(|(key, _)| !options.contains(key)));
        let outcome = match changed {
            Some((key, _)) => Err(Error::invalid(format!("Cannot change the option '{key}'"))),
            None => Ok(()),
        };
        Box::pin(std::future::ready(outcome))
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
