//! The filter `throttle`: limits the bytes and the requests per second that pass the node.
//!
//! | file | concern |
//! |---|---|
//! | this file | the driver |
//! | `limits` | the limits as options, and the checks of limits |
//! | `bucket` | one limit: a leaky bucket |
//! | `group` | the nodes that share limits, and the order of their waiting requests |
//!
//! The node refers to a [`Group`] by the identifier of the object (`throttle-group=ID`). All nodes with the same identifier
//! share the limits of the group. The driver only lets requests wait ([`Admission`]); it does not pass them on itself.

mod bucket;
mod group;
mod limits;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use oxblk_core::driver::{Compress, Drain, Reopen, Resize};
use oxblk_core::{
    Admission, BoxFuture, ChildIdx, Driver, DriverFactory, DriverKind, Error, IncomingRequest,
    Limits, MapOp, Objects, OpenContext, OpenFlags, Options, RequestKind, Result, Step, WriteFlags,
    ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use crate::below::Below;

pub use group::{Direction, Group, Member};
pub use limits::{BucketLimits, GroupLimits, KINDS, Notation};

/// The driver `throttle`.
pub static THROTTLE: ThrottleFactory = ThrottleFactory;

/// Opens throttle nodes.
#[derive(Debug)]
pub struct ThrottleFactory;

impl DriverFactory for ThrottleFactory {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let Some(id) = context.options.take_str("throttle-group")? else {
                return Err(Error::invalid("Please specify a throttle group"));
            };
            let objects = context.graph.objects().clone();
            let member = ArcSwap::from_pointee(Member::new(find(&objects, &id)?));
            let below = Below::new(&context.children);
            let driver = Throttle { below, member, objects, prepared: Mutex::default() };
            Ok(Box::new(driver) as Box<dyn Driver>)
        })
    }
}

/// An open throttle node.
struct Throttle {
    below: Below,
    member: ArcSwap<Member>,
    objects: Objects,
    /// The new group of a reopen that is prepared.
    prepared: Mutex<Option<Arc<Group>>>,
}

/// The throttle group with this identifier.
fn find(objects: &Objects, id: &str) -> Result<Arc<Group>> {
    let group = objects.get::<Group>(id);
    group.ok_or_else(|| Error::invalid(format!("Throttle group '{id}' does not exist")))
}

impl Throttle {
    fn prepared(&self) -> MutexGuard<'_, Option<Arc<Group>>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<RequestKind> for Direction {
    fn from(kind: RequestKind) -> Self {
        match kind {
            RequestKind::Read => Self::Read,
            RequestKind::Write | RequestKind::WriteZeroes | RequestKind::Discard => Self::Write,
        }
    }
}

impl Admission for Throttle {
    fn try_admit(&self, request: &IncomingRequest) -> bool {
        self.member.load().try_admit(request.kind.into(), request.len)
    }

    fn admit(&self, request: IncomingRequest) -> BoxFuture<'_, ()> {
        let member = self.member.load_full();
        Box::pin(async move { member.admit(request.kind.into(), request.len).await })
    }
}

impl Driver for Throttle {
    fn map(&self, _op: MapOp, offset: u64, len: u64) -> Step {
        Step::Forward { child: ChildIdx::FILE, offset, len }
    }

    fn admission(&self) -> Option<&dyn Admission> {
        Some(self)
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.below.edge()?.read(offset, buf).await })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.below.edge()?.write(offset, data, flags).await })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.below.edge()?.write_zeroes(offset, len, flags).await }))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move { self.below.edge()?.discard(offset, len).await }))
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, ..self.below.limits() }
    }

    fn drain(&self) -> Option<&dyn Drain> {
        Some(self)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(&self.below)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn compress(&self) -> Option<&dyn Compress> {
        self.below.compress()
    }
}

impl Drain for Throttle {
    fn begin(&self) {
        self.member.load().begin_drain();
    }

    fn end(&self) {
        self.member.load().end_drain();
    }
}

impl Reopen for Throttle {
    fn prepare(&self, _flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let mut options = options.clone();
        Box::pin(async move {
            let Some(id) = options.take_str("throttle-group")? else {
                return Err(Error::invalid("Please specify a throttle group"));
            };
            let group = find(&self.objects, &id)?;
            if let Some(key) = options.first_key() {
                return Err(Error::invalid(format!("Cannot change the option '{key}'")));
            }
            *self.prepared() = Some(group);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let group = self.prepared().take();
            let current = self.member.load_full();
            if let Some(group) =
                group.filter(|group| !std::ptr::eq(&raw const **group, current.group()))
            {
                self.member.store(Arc::new(current.moved_to(group)));
            }
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { *self.prepared() = None })
    }
}
