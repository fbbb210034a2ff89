//! Opens blklogwrites nodes.

use std::sync::Arc;

use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, NodeAccess, OpenContext, Permissions,
    Result, Roles,
};
use oxblk_ring::{Mutex, RangeLock};

use super::Blklogwrites;
use super::format::check_sector_size;
use super::log::Log;

/// The driver `blklogwrites`.
pub static BLKLOGWRITES: BlklogwritesFactory = BlklogwritesFactory;

/// Opens blklogwrites nodes.
#[derive(Debug)]
pub struct BlklogwritesFactory;

/// The name of the child that contains the log.
const LOG: &str = "log";
const DEFAULT_SECTOR: u64 = 512;
const DEFAULT_INTERVAL: u64 = 4096;

impl DriverFactory for BlklogwritesFactory {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn sees_all_changes(&self) -> bool {
        true
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<Blklogwrites> {
    let options = &mut context.options;
    let appends = options.take_bool("log-append")?.unwrap_or(false);
    let sector_size = options.take_size("log-sector-size")?;
    let interval = options.take_number("log-super-update-interval")?;
    let option = options.take(LOG);
    let access = NodeAccess { writable: !context.flags.read_only, no_io: context.flags.no_io };
    let permissions = Permissions::for_child(Roles::METADATA, Permissions::NONE, access);
    let log_child = context.open_further(LOG, option, None, Roles::METADATA, permissions).await?;
    if appends && sector_size.is_some() {
        return Err(Error::invalid("log-append and log-sector-size are mutually exclusive"));
    }
    let interval = interval.unwrap_or(DEFAULT_INTERVAL);
    let log = match appends {
        true => Log::open(&*context.children.require(log_child)?, interval.max(1)).await?,
        false => {
            let sector_size = check_sector_size(sector_size.unwrap_or(DEFAULT_SECTOR))?;
            Log::new(sector_size, interval.max(1))
        }
    };
    if interval == 0 {
        return Err(Error::invalid("Invalid log superblock update interval 0"));
    }
    Ok(Blklogwrites {
        children: Arc::clone(&context.children),
        log_child,
        sector_size: log.sector_size(),
        changes: RangeLock::new(),
        log: Mutex::new(log),
    })
}
