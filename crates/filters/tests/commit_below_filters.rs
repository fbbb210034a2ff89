//! Tests of commits whose backing file is below a filter that must see all changes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory;

use std::sync::Arc;

use oxblk_core::{
    Backend, BoxFuture, ChildIdx, ChildSpec, ChildrenRef, Driver, DriverFactory, DriverKind,
    DriverTable, Error, Gate, Graph, MapOp, Node, OpenContext, OpenFlags, Options, Perm,
    Permissions, Result, Step, WriteFlags,
};
use oxblk_filters::blkdebug::BLKDEBUG;
use oxblk_filters::blklogwrites::BLKLOGWRITES;
use oxblk_filters::copy_before_write::COPY_BEFORE_WRITE;
use oxblk_filters::snapshot_access::SNAPSHOT_ACCESS;
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use memory::add;

/// An overlay without data.
struct Overlay(ChildrenRef);

impl Driver for Overlay {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        match op {
            MapOp::Read => Step::Forward { child: ChildIdx::BACKING, offset, len },
            MapOp::Write => Step::Slow,
        }
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(async move { self.0.require(ChildIdx::BACKING)?.read(offset, buf).await })
    }

    fn write(&self, _: u64, _: IoBuf, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::invalid("The overlay stores no data")) })
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }
}

struct OverlayFactory;

impl DriverFactory for OverlayFactory {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[ChildSpec::IMAGE, ChildSpec::BACKING]
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(
            async move { Ok(Box::new(Overlay(Arc::clone(&context.children))) as Box<dyn Driver>) },
        )
    }
}

static DRIVERS: DriverTable =
    &[&BLKDEBUG, &BLKLOGWRITES, &COPY_BEFORE_WRITE, &SNAPSHOT_ACCESS, &OverlayFactory];

const SIZE: usize = 256 << 10;

/// A graph with the nodes `base`, `further` and `top-file`, which are disks in memory.
fn graph() -> (Graph, Arc<Node>) {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    for name in ["further", "mid-file", "top-file"] {
        add(&graph, name, SIZE);
    }
    let (_, base) = add(&graph, "base", SIZE);
    (graph, base)
}

async fn open(graph: &Graph, text: &str) -> Arc<Node> {
    let options = Options::from_dotted(text, None).unwrap();
    graph.open(options, OpenFlags::default()).await.unwrap()
}

fn reader(graph: &Graph, node: Arc<Node>) -> Backend {
    Backend::new(graph, "", node, Permissions::sharing_all(Perm::CONSISTENT_READ)).unwrap()
}

/// Opens the chain of nodes, from the base up, and makes `base` writable for a commit of the last node. Returns the error.
async fn refused(nodes: &[&str]) -> String {
    let (graph, base) = graph();
    let mut top = Arc::clone(&base);
    for text in nodes {
        top = open(&graph, text).await;
        graph.keep_open(Arc::clone(&top)).unwrap();
    }
    let _user = reader(&graph, Arc::clone(&top));
    let Err(error) = graph.write_base(&top, &base).await else { return String::new() };
    error.to_string()
}

const CBW: &str = "driver=copy-before-write,node-name=cbw,target=further,file=";

#[test]
fn a_commit_past_a_filter_that_must_see_all_changes_is_refused() {
    block_on(async {
        let conflict = |above: &str, child: &str| {
            format!(
                "Permission conflict on node 'base': permissions 'write, resize' are both required by an unnamed block \
                 device (uses node 'base' as 'root' child) and unshared by node '{above}' (uses node 'base' as '{child}' \
                 child)."
            )
        };
        let top = "driver=overlay,node-name=top,file=top-file,backing=";
        let cbw_base = format!("{CBW}base");
        let found = refused(&[&cbw_base, &format!("{top}cbw")]).await;
        assert!(found.contains(&conflict("cbw", "file")), "{found}");
        // Another filter is between.
        let debug = "driver=blkdebug,node-name=debug,image=base";
        let found = refused(&[debug, &format!("{CBW}debug"), &format!("{top}cbw")]).await;
        assert!(found.contains(&conflict("debug", "image")), "{found}");
        // The filter sees the base through another overlay.
        let mid = "driver=overlay,node-name=mid,file=mid-file,backing=base";
        let found = refused(&[mid, &format!("{CBW}mid"), &format!("{top}cbw")]).await;
        assert!(found.contains(&conflict("mid", "backing")), "{found}");
        let log = "driver=blklogwrites,node-name=log,file=base,log=further";
        let found = refused(&[log, &format!("{top}log")]).await;
        assert!(found.contains(&conflict("log", "file")), "{found}");
        // The filter is not in the chain, but above a node of the chain.
        let snapshot = "driver=snapshot-access,node-name=snap,file=cbw";
        let found = refused(&[mid, &format!("{CBW}mid"), snapshot, &format!("{top}mid")]).await;
        assert!(found.contains(&conflict("mid", "backing")), "{found}");
    });
}

#[test]
fn a_commit_below_an_overlay_with_filters_above_is_allowed() {
    block_on(async {
        let overlay = "driver=overlay,node-name=top,file=top-file,backing=base";
        assert_eq!(refused(&[overlay, &format!("{CBW}top")]).await, "");
        let log = "driver=blklogwrites,node-name=log,file=top,log=further";
        assert_eq!(refused(&[overlay, log]).await, "");
        // The base is the filter itself.
        let (graph, _) = graph();
        let filter = open(&graph, &format!("{CBW}base")).await;
        let top = "driver=overlay,node-name=top,file=top-file,backing=cbw";
        let top = open(&graph, top).await;
        let _user = reader(&graph, Arc::clone(&top));
        let snapshot = open(&graph, "driver=snapshot-access,node-name=snap,file=cbw").await;
        let snapshot = reader(&graph, snapshot);
        let writable = graph.write_base(&top, &filter).await.unwrap();
        let data = vec![0xee; 64 << 10];
        writable.backend().write(0, data.into(), WriteFlags::empty()).await.unwrap();
        writable.close().await.unwrap();
        let old = snapshot.read(0, IoBufMut::new(SIZE)).await.unwrap();
        assert!(old.iter().all(|byte| *byte == 0), "the snapshot has changed");
    });
}

#[test]
fn a_refused_commit_leaves_the_snapshot_and_the_base_as_they_were() {
    block_on(async {
        let (graph, base) = graph();
        let filter = open(&graph, &format!("{CBW}base")).await;
        graph.keep_open(filter).unwrap();
        let snapshot = open(&graph, "driver=snapshot-access,node-name=snap,file=cbw").await;
        let snapshot = reader(&graph, snapshot);
        let top = "driver=overlay,node-name=top,file=top-file,backing=cbw";
        let top = open(&graph, top).await;
        let user = reader(&graph, Arc::clone(&top));
        for _ in 0..3 {
            assert!(graph.write_base(&top, &base).await.is_err());
        }
        for disk in [&user, &snapshot] {
            let data = disk.read(0, IoBufMut::new(SIZE)).await.unwrap();
            assert!(data.iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn no_other_user_writes_below_blklogwrites() {
    block_on(async {
        let (graph, base) = graph();
        let writes = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE);
        let log = open(&graph, "driver=blklogwrites,node-name=log,file=base,log=further").await;
        let disk = Backend::new(&graph, "", log, writes).unwrap();
        let error = Backend::new(&graph, "", Arc::clone(&base), writes).unwrap_err().to_string();
        assert!(
            error.contains("unshared by node 'log' (uses node 'base' as 'file' child)"),
            "{error}"
        );
        disk.close().await.unwrap();
        Backend::new(&graph, "", base, writes).unwrap();
    });
}
