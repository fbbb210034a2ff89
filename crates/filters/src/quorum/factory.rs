//! Opens quorum nodes.

use std::sync::{Arc, Mutex};

use oxblk_core::{
    BoxFuture, ChildSpec, Driver, DriverFactory, DriverKind, Errno, Error, OpenContext,
    Permissions, Result, Roles,
};
use oxblk_ring::RangeLock;

use super::settings::{Settings, take_children};
use super::{Quorum, members};

/// The driver `quorum`.
pub static QUORUM: QuorumFactory = QuorumFactory;

/// Opens quorum nodes.
#[derive(Debug)]
pub struct QuorumFactory;

impl DriverFactory for QuorumFactory {
    fn name(&self) -> &'static str {
        "quorum"
    }

    /// No child is the one that the node shows, so the node is no filter.
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn opens_children(&self) -> bool {
        true
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[]
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<Quorum> {
    let given = take_children(&mut context.options)?;
    let settings = Settings::take(&mut context.options, given.len())?;
    let mut next = 0_u32;
    for child in given {
        let name = members::name(next);
        let permissions = settings.permissions(Permissions::NONE);
        context.open_further(&name, Some(child), None, Roles::DATA, permissions).await?;
        next = next.checked_add(1).ok_or_else(members::too_many)?;
    }
    let quorum = Quorum {
        name: context.node_name.clone(),
        children: Arc::clone(&context.children),
        settings,
        changes: RangeLock::new(),
        next: Mutex::new(next),
        events: context.graph.events().clone(),
    };
    if quorum.members().iter().any(|edge| !quorum.fits(edge.node())) {
        return Err(Error::from_errno(Errno::IO).prefix("Could not refresh total sector count"));
    }
    Ok(quorum)
}
