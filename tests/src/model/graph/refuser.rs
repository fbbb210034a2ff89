//! A filter that passes all requests on, and refuses every eighth change of its permissions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use oxblk_core::{
    BoxFuture, ChildIdx, Children, Driver, DriverFactory, DriverKind, Errno, Error, Limits, MapOp,
    OpenContext, Permissions, Preallocation, Result, Step, WriteFlags, driver::Resize,
};
use oxblk_ring::{IoBuf, IoBufMut};

use crate::random::Random;

pub(super) struct RefuserFactory;

impl DriverFactory for RefuserFactory {
    fn name(&self) -> &'static str {
        "refuser"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        let children = Arc::clone(&context.children);
        Box::pin(async move {
            let driver = Refuser { children, turn: AtomicU64::new(0) };
            Ok(Box::new(driver) as Box<dyn Driver>)
        })
    }
}

struct Refuser {
    children: Arc<Children>,
    turn: AtomicU64,
}

impl Driver for Refuser {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.children.require(ChildIdx::FILE)?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(
            async move { self.children.require(ChildIdx::FILE)?.write(offset, data, flags).await },
        )
    }

    fn size(&self) -> u64 {
        self.children.get(ChildIdx::FILE).map_or(0, |file| file.size())
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn limits(&self) -> Limits {
        let below = self.children.get(ChildIdx::FILE).map(|file| file.node().limits());
        let grows = below.is_some_and(|below| below.grows);
        Limits { grows, ..Limits::default() }
    }

    fn prepare_permissions(&self, _permissions: Permissions) -> Result<()> {
        let turn = self.turn.fetch_add(1, SeqCst);
        if Random::new(turn).one_in(8) {
            return Err(Error::from_errno(Errno::AGAIN).prefix("refused by the test"));
        }
        Ok(())
    }
}

impl Resize for Refuser {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(
            async move { self.children.require(ChildIdx::FILE)?.resize(size, preallocation).await },
        )
    }
}
