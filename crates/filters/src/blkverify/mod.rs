//! The filter `blkverify`: compares an image with a raw copy. Each write goes to both, and each read reads both.
//!
//! If the data or the results differ, the request fails, and the log contains the place of the difference. Zero writes become
//! writes of data, so that both files see the same requests.

use std::sync::Arc;

use futures_util::future::join;
use oxblk_core::{
    BoxFuture, ChildIdx, ChildSpec, ChildrenRef, Driver, DriverFactory, DriverKind, Edge, Errno,
    Error, OpenContext, Options, Perm, Permissions, Result, Roles, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};

/// The driver `blkverify`.
pub static BLKVERIFY: BlkverifyFactory = BlkverifyFactory;

/// Opens blkverify nodes.
#[derive(Debug)]
pub struct BlkverifyFactory;

/// The raw copy.
const RAW: ChildSpec = ChildSpec { child: ChildIdx::FILE, name: "raw", roles: Roles::FILTER };
/// The image that is tested.
const TEST: ChildSpec = ChildSpec { child: ChildIdx::DATA, name: "test", roles: Roles::DATA };

/// The options for the file names, from the file name of the node.
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
        &[RAW, TEST]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["blkverify"]
    }

    /// `blkverify:RAW:IMAGE`.
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
        Box::pin(async move {
            let raw = context.options.take_str(RAW_NAME)?;
            let test = context.options.take_str(TEST_NAME)?;
            context.open_child(RAW, raw, false).await?;
            context.open_child(TEST, test, true).await?;
            let children = Arc::clone(&context.children);
            Ok(Box::new(Blkverify { children }) as Box<dyn Driver>)
        })
    }
}

/// An open blkverify node.
struct Blkverify {
    children: ChildrenRef,
}

impl Blkverify {
    fn pair(&self) -> Result<(Arc<Edge>, Arc<Edge>)> {
        Ok((self.children.require(RAW.child)?, self.children.require(TEST.child)?))
    }
}

/// Logs a difference. Returns the error of the request.
fn differs(request: &str, offset: u64, len: usize, difference: &str) -> Error {
    let text = format!("blkverify: {request} offset={offset} bytes={len} {difference}");
    tracing::error!("{text}");
    Error::from_errno(Errno::IO).prefix(text)
}

/// The results of a request to both children, if they are equal.
fn both<T>(
    request: &str,
    offset: u64,
    len: usize,
    (raw, test): (Result<T>, Result<T>),
) -> Result<(T, T)> {
    let number = |result: &Result<T>| result.as_ref().map_or_else(|e| -e.raw_errno(), |_| 0);
    match (number(&test), number(&raw)) {
        (one, other) if one != other => {
            let difference = format!("return value mismatch {one} != {other}");
            Err(differs(request, offset, len, &difference))
        }
        _ => Ok((raw?, test?)),
    }
}

impl Driver for Blkverify {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move {
            let (raw, test) = self.pair()?;
            let len = buf.len();
            let results = join(raw.read(offset, IoBufMut::new(len)), test.read(offset, buf)).await;
            let (copy, data) = both("read", offset, len, results)?;
            match copy.iter().zip(data.iter()).position(|(one, other)| one != other) {
                None => Ok(data),
                Some(at) => {
                    let at = offset.saturating_add(u64::try_from(at).unwrap_or(u64::MAX));
                    let difference = format!("contents mismatch at offset {at}");
                    Err(differs("read", offset, len, &difference))
                }
            }
        })
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let (raw, test) = self.pair()?;
            let len = data.len();
            let copy = raw.write(offset, data.clone(), flags);
            let results = join(copy, test.write(offset, data, flags)).await;
            both("write", offset, len, results).map(drop)
        })
    }

    fn size(&self) -> u64 {
        self.children.get(TEST.child).map_or(0, |test| test.size())
    }

    fn filename(&self) -> Option<String> {
        let (raw, test) = self.pair().ok()?;
        Some(format!("blkverify:{}:{}", raw.node().filename()?, test.node().filename()?))
    }

    /// The raw copy may be shorter than the image, so writes may make it longer.
    fn child_permissions(&self, _child: ChildIdx, parents: Permissions) -> Option<Permissions> {
        let mut taken = parents.taken;
        if taken.contains(Perm::WRITE) {
            taken |= Perm::RESIZE;
        }
        Some(Permissions { taken, shared: parents.shared })
    }
}
