//! The filter `preallocate`: when a write makes the file longer, the filter makes it longer than needed. So later writes need no
//! new space from the file system. The node reports only the length that its parents have written.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `options` | the options |
//! | `space` | the length of the file, and the part of it that is preallocated |
//!
//! The preallocated space is cut off when the node is closed, becomes read-only, or loses the permission to write. Until then,
//! the node keeps the permission to resize the file.

mod options;
mod space;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::driver::{Reopen, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Edge, Error, Limits, MapOp,
    OpenContext, OpenFlags, Options, Perm, Permissions, Preallocation, Result, Step, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use crate::below::Below;
use options::Settings;
use space::Space;

/// The driver `preallocate`.
pub static PREALLOCATE: PreallocateFactory = PreallocateFactory;

/// Opens preallocate nodes.
#[derive(Debug)]
pub struct PreallocateFactory;

impl DriverFactory for PreallocateFactory {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.file()?;
            let settings = Settings::take(&mut context.options, &file)?;
            let filter = Filter {
                below: Below::new(&context.children),
                space: Arc::new(Space::new()),
                settings: Mutex::new(settings),
                prepared: Mutex::default(),
            };
            Ok(Box::new(filter) as Box<dyn Driver>)
        })
    }
}

/// An open preallocate node.
struct Filter {
    below: Below,
    space: Arc<Space>,
    settings: Mutex<Settings>,
    /// The settings of a reopen that is prepared.
    prepared: Mutex<Option<Settings>>,
}

const WRITES: Perm = Perm::WRITE.union(Perm::RESIZE);

impl Filter {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prepared(&self) -> MutexGuard<'_, Option<Settings>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the preallocated space off.
    async fn cut(&self) -> Result<()> {
        match self.space.is_preallocated() {
            true => self.space.cut(&*self.below.edge()?).await,
            false => Ok(()),
        }
    }

    /// Makes room for a write up to `end`, if the file must become longer.
    async fn make_room(&self, file: &Edge, end: u64) -> Result<()> {
        self.space.truncate_if_due(file).await?;
        let settings = *self.settings();
        self.space.make_room(file, end, settings).await;
        Ok(())
    }
}

impl Driver for Filter {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        match op {
            MapOp::Write if !self.space.is_written(offset.saturating_add(len)) => Step::Slow,
            _ => Step::Forward { child: ChildIdx::FILE, offset, len },
        }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.below.edge()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let end = offset.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
            let file = self.below.edge()?;
            if self.space.is_unused() {
                // Only a write of unchanged data needs no permission to write.
                return file.write(offset, data, flags).await;
            }
            self.make_room(&file, end).await?;
            self.space.begin_data(end);
            file.write(offset, data, flags).await?;
            self.space.reach(end);
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            let end = offset.saturating_add(len);
            let file = self.below.edge()?;
            if self.space.is_unused() {
                return file.write_zeroes(offset, len, flags).await;
            }
            self.make_room(&file, end).await?;
            if !self.space.is_zero(offset, end) {
                self.space.begin_data(end);
                file.write_zeroes(offset, len, flags).await?;
            }
            self.space.reach(end);
            Ok(())
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.below.edge()?.discard(offset, len).await }))
    }

    fn before_below_changes(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.cut()))
    }

    fn below_changed(&self) {
        self.space.file_changed(self.below.size());
    }

    fn size(&self) -> u64 {
        match self.space.is_unused() {
            true => self.below.size(),
            false => self.space.len(),
        }
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, ..self.below.limits() }
    }

    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let Permissions { mut taken, mut shared } = parents;
        if taken.contains(Perm::WRITE) || self.space.is_preallocated() {
            taken |= WRITES;
            shared -= Perm::RESIZE;
        }
        Some(Permissions { taken, shared })
    }

    fn commit_permissions(&self, permissions: Permissions) {
        if permissions.taken.contains(Perm::WRITE) {
            self.space.begin_writing(|| self.below.size());
        } else if self.space.end_writing()
            && let Ok(file) = self.below.edge()
        {
            let space = Arc::clone(&self.space);
            // A change of permissions does not wait for the host.
            let cut = async move {
                if let Err(error) = space.truncate_if_due(&file).await {
                    tracing::warn!(%error, "cannot cut off preallocated space yet");
                }
            };
            oxblk_ring::spawn(cut).detach();
        }
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.cut()))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }
}

impl Resize for Filter {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.space.resize(&*self.below.edge()?, size, preallocation).await })
    }
}

impl Reopen for Filter {
    fn prepare(&self, _: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let mut options = options.clone();
        Box::pin(async move {
            let file = self.below.edge()?;
            let settings = Settings::take(&mut options, &file)?;
            if let Some(key) = options.first_key() {
                return Err(Error::invalid(format!("Cannot change the option '{key}'")));
            }
            // The reopen may make the node read-only, or replace the file.
            self.cut().await?;
            *self.prepared() = Some(settings);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            if let Some(settings) = self.prepared().take() {
                *self.settings() = settings;
            }
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { *self.prepared() = None })
    }
}
