//! Opens blkverify nodes.

use std::sync::Arc;

use oxblk_core::{
    BoxFuture, ChildIdx, ChildSpec, Driver, DriverFactory, DriverKind, Error, NodeAccess,
    OpenContext, Options, Permissions, Result, Roles,
};
use oxblk_ring::RangeLock;

use super::Blkverify;

/// The driver `blkverify`.
pub static BLKVERIFY: BlkverifyFactory = BlkverifyFactory;

/// Opens blkverify nodes.
#[derive(Debug)]
pub struct BlkverifyFactory;

const RAW: ChildSpec = ChildSpec { child: ChildIdx::FILE, name: "raw", roles: Roles::FILTER };
const TEST: &str = "test";

/// The options for the file names of the children, from the file name of the node.
const RAW_NAME: &str = "x-raw";
const TEST_NAME: &str = "x-image";

impl DriverFactory for BlkverifyFactory {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[RAW]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["blkverify"]
    }

    /// `blkverify:RAW:TEST`.
    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let mut options = Options::new();
        let Some(rest) = filename.strip_prefix("blkverify:") else {
            options.insert(TEST_NAME, filename);
            return Ok(options);
        };
        let Some((raw, test)) = rest.split_once(':') else {
            return Err(Error::invalid("blkverify requires raw copy and original image path"));
        };
        options.insert(RAW_NAME, raw);
        options.insert(TEST_NAME, test);
        Ok(options)
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<Blkverify> {
    let raw = context.options.take_str(RAW_NAME)?;
    let test = context.options.take_str(TEST_NAME)?;
    context.open_child(RAW, raw, false).await?;
    let option = context.options.take(TEST);
    let access = NodeAccess { writable: !context.flags.read_only, no_io: context.flags.no_io };
    let permissions = Permissions::for_child(Roles::DATA, Permissions::NONE, access);
    let test = context.open_further(TEST, option, test, Roles::DATA, permissions).await?;
    let children = Arc::clone(&context.children);
    Ok(Blkverify { children, test, changes: RangeLock::new() })
}
