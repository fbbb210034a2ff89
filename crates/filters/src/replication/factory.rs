//! Opens replication nodes. The texts of errors are those of QEMU.

use std::sync::Arc;

use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, OpenContext, ReplicationMode, Result,
};
use oxblk_ring::Mutex;

use super::Filter;
use super::stage::StageCell;
use crate::below::Below;

/// The driver `replication`.
pub static REPLICATION: ReplicationFactory = ReplicationFactory;

/// Opens replication nodes.
#[derive(Debug)]
pub struct ReplicationFactory;

impl DriverFactory for ReplicationFactory {
    fn name(&self) -> &'static str {
        "replication"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context)?) as Box<dyn Driver>) })
    }
}

fn open(context: &mut OpenContext) -> Result<Filter> {
    let top = context.options.take_str("top-id")?;
    let mode = match context.options.take_str("mode")?.as_deref() {
        None => return Err(Error::invalid("Missing the option mode")),
        Some("primary") => ReplicationMode::Primary,
        Some("secondary") => ReplicationMode::Secondary,
        Some(_) => {
            return Err(Error::invalid("The option mode's value should be primary or secondary"));
        }
    };
    match (mode, &top) {
        (ReplicationMode::Primary, Some(_)) => {
            return Err(Error::invalid("The primary side does not support option top-id"));
        }
        (ReplicationMode::Secondary, None) => {
            return Err(Error::invalid("Missing the option top-id"));
        }
        _ => {}
    }
    Ok(Filter {
        below: Below::new(&context.children),
        mode,
        top,
        is_read_only: context.flags.read_only,
        stage: Arc::new(StageCell::new()),
        operation: Mutex::new(()),
        slot: std::sync::Mutex::default(),
    })
}
