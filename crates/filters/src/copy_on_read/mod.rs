//! The filter `copy-on-read`: data that a read gets from a backing file is also written to the image below the filter.
//!
//! With the option `bottom`, only data that an image of the chain has allocated down to this node is copied. The links of the
//! chain from the image to the bottom node are frozen. `oxblk_core` reads and copies ([`Edge::read_copying`]).

use std::sync::{Arc, Mutex, PoisonError, Weak};

use oxblk_core::driver::{Compress, Resize};
use oxblk_core::{
    BoxFuture, ChildIdx, CopyOnRead, Driver, DriverFactory, DriverKind, Edge, Errno, Error,
    ErrorKind, FrozenChain, Limits, MapOp, Node, OpenContext, Perm, Permissions, Result, Step,
    WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

use crate::below::Below;

/// The driver `copy-on-read`.
pub static COPY_ON_READ: CopyOnReadFactory = CopyOnReadFactory;

/// Opens copy-on-read nodes.
#[derive(Debug)]
pub struct CopyOnReadFactory;

impl DriverFactory for CopyOnReadFactory {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<Filter> {
    let file = context.file()?;
    if file.node().is_read_only() {
        return Err(Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::PERM));
    }
    let (mut bottom, mut frozen) = (None, None);
    if let Some(name) = context.options.take_str("bottom")? {
        let node = context.graph.node(&name);
        let node = node.ok_or_else(|| Error::invalid(format!("Bottom node '{name}' not found")))?;
        if node.factory().kind() == DriverKind::Filter {
            return Err(Error::invalid(format!("Bottom node '{name}' is a filter")));
        }
        frozen = Some(context.graph.freeze(file.node(), Some(&node))?);
        bottom = Some(Arc::downgrade(&node));
    }
    let ordered = file.begin_copy_on_read();
    // Other users of the node may have writes in flight that are not ordered.
    if file.node().parents().len() > 1 {
        file.node().wait_for_requests().await;
    }
    Ok(Filter {
        below: Below::new(&context.children),
        bottom,
        held: Mutex::new(Held { ordered: Some(ordered), _frozen: frozen }),
    })
}

/// An open copy-on-read node.
struct Filter {
    below: Below,
    bottom: Option<Weak<Node>>,
    held: Mutex<Held>,
}

/// What the filter holds until it is closed.
#[derive(Default)]
struct Held {
    ordered: Option<CopyOnRead>,
    _frozen: Option<FrozenChain>,
}

impl Filter {
    /// Orders the changes of the child, also if the child was replaced.
    fn order(&self, file: &Edge) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !held.ordered.as_ref().is_some_and(|ordered| ordered.is_of(file.node())) {
            held.ordered = Some(file.begin_copy_on_read());
        }
    }
}

impl Driver for Filter {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        match op {
            MapOp::Read => Step::Slow,
            MapOp::Write => Step::Forward { child: ChildIdx::FILE, offset, len },
        }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let file = self.below.edge()?;
            self.order(&file);
            match &self.bottom {
                None => file.read_copying(offset, buf, None).await,
                Some(bottom) => match bottom.upgrade() {
                    Some(bottom) => file.read_copying(offset, buf, Some(&bottom)).await,
                    None => file.read(offset, buf).await,
                },
            }
        })
    }

    fn reads_write(&self) -> bool {
        true
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
        self.below.limits()
    }

    /// Reads write data that does not change what readers see.
    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let taken = parents.taken | Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        Some(Permissions { taken, shared: parents.shared })
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Held::default();
        None
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(&self.below)
    }

    fn compress(&self) -> Option<&dyn Compress> {
        self.below.compress()
    }
}
