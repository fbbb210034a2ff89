//! Opens copy-before-write nodes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_core::bitmap::{Checks, DirtyBitmap};
use oxblk_core::{
    BoxFuture, ChildSpec, Driver, DriverFactory, DriverKind, Error, Graph, Node, OpenContext,
    Options, Result, Roles,
};
use oxblk_ring::RangeLock;

use super::clusters::Clusters;
use super::deadline::Running;
use super::options::CopyOptions;
use super::snapshot::Snapshot;
use super::{CopyBeforeWrite, target_permissions};
use crate::below::Below;

/// The driver `copy-before-write`.
pub static COPY_BEFORE_WRITE: CopyBeforeWriteFactory = CopyBeforeWriteFactory;

/// Opens copy-before-write nodes.
#[derive(Debug)]
pub struct CopyBeforeWriteFactory;

impl DriverFactory for CopyBeforeWriteFactory {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn sees_all_changes(&self) -> bool {
        true
    }

    fn opens_children(&self) -> bool {
        true
    }

    /// The file name is that of the disk.
    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let mut options = Options::new();
        options.set("file.filename", filename)?;
        Ok(options)
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<CopyBeforeWrite> {
    if !context.options.contains("file") {
        return Err(Error::invalid("Parameter 'file' is missing"));
    }
    context.open_child(ChildSpec::FILTERED, None, false).await?;
    let options = CopyOptions::take(&mut context.options)?;
    let described = Some(options.target.clone());
    let permissions = target_permissions();
    let target = context.open_further("target", described, None, Roles::DATA, permissions).await?;
    let bitmap = match &options.bitmap {
        Some((node, name)) => Some(find_bitmap(&context.graph, node, name)?),
        None => None,
    };
    let cluster = cluster_of(context.children.require(target)?.node());
    let size = context.file()?.size();
    let clusters = Clusters::new(size, options.cluster(cluster)?, bitmap.as_deref());
    let clusters = clusters.map_err(|error| match &options.bitmap {
        Some((_, name)) => error
            .prefix(format!("Failed to merge bitmap '{name}' to internal copy-bitmap"))
            .prefix("Cannot create block-copy-state"),
        None => error.prefix("Cannot create block-copy-state"),
    })?;
    let snapshot = Snapshot {
        name: context.node_name.clone(),
        children: Arc::clone(&context.children),
        target,
        clusters,
        on_error: options.on_error,
        timeout: options.timeout,
        is_broken: AtomicBool::new(false),
        copies: RangeLock::new(),
        reads: RangeLock::new(),
        background: Running::default(),
    };
    let below = Below::new(&context.children);
    Ok(CopyBeforeWrite { below, snapshot: Arc::new(snapshot) })
}

/// The bitmap that selects the clusters of the snapshot.
fn find_bitmap(graph: &Graph, node: &str, name: &str) -> Result<Arc<DirtyBitmap>> {
    let found = graph.node(node);
    let found = found.ok_or_else(|| Error::invalid(format!("Node '{node}' not found")))?;
    let bitmap = found.bitmaps().find(name)?;
    bitmap.check(Checks::INCONSISTENT)?;
    Ok(bitmap)
}

/// The cluster size of a target in bytes, or 0: the largest of the nodes that store its data.
fn cluster_of(node: &Arc<Node>) -> u64 {
    let own = node.driver().info().cluster_size;
    if own != 0 {
        return own;
    }
    let children = node.children().iter();
    let storage = children.filter(|(_, edge)| !edge.roles().contains(Roles::COW));
    storage.map(|(_, edge)| cluster_of(edge.node())).max().unwrap_or(0)
}
