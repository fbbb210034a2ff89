//! Tests of operations that a job blocks, and of filters that a job inserts.

use std::sync::Arc;

use oxblk_core::{Backend, Errno, ErrorKind, Limits, OpenFlags, Operations, Preallocation};
use oxblk_ring::block_on;

use crate::memory::{Memory, graph, node, options};

#[test]
fn a_blocked_operation_fails_with_the_reason_until_the_block_ends() {
    block_on(async {
        let graph = graph();
        let below = node(&graph, "m", &Memory::new(4096, Limits::default()));
        graph.keep_open(Arc::clone(&below)).unwrap();
        let disk = Backend::new(&graph, "", Arc::clone(&below), super::all()).unwrap();
        let reason = "block device is in use by block job: mirror";
        let block = graph.block_operations(&below, Operations::all(), reason);
        let second = graph.block_operations(&below, Operations::RESIZE, "another reason");
        let error = disk.resize(8192, Preallocation::Off).await.unwrap_err();
        assert_eq!(error.raw_errno(), Errno::BUSY);
        // The text of the installed qemu-storage-daemon.
        let text = "Node 'm' is busy: block device is in use by block job: mirror";
        assert_eq!(error.to_string(), text);
        let error = graph.allow_close(Arc::clone(&below)).await.unwrap_err();
        assert_eq!(error.to_string(), text);
        drop(block);
        below.check_operation(Operations::DELETE).unwrap();
        let error = disk.resize(8192, Preallocation::Off).await.unwrap_err();
        assert_eq!(error.to_string(), "Node 'm' is busy: another reason");
        drop(second);
        disk.resize(8192, Preallocation::Off).await.unwrap();
        disk.close().await.unwrap();
        graph.allow_close(below).await.unwrap();
    });
}

#[test]
fn a_resize_through_filters_is_refused_if_it_is_blocked_at_any_node() {
    block_on(async {
        let graph = graph();
        let below = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let open =
            async |dotted: &str| graph.open(options(dotted), OpenFlags::default()).await.unwrap();
        let lower = open("driver=pass,node-name=f,file=m").await;
        let upper = open("driver=pass,node-name=g,file=f").await;
        let disk = Backend::new(&graph, "", Arc::clone(&upper), super::all()).unwrap();
        for node in [below, lower, upper] {
            let block = graph.block_operations(&node, Operations::RESIZE, "no");
            let error = disk.resize(8192, Preallocation::Off).await.unwrap_err();
            assert_eq!(error.to_string(), format!("Node '{}' is busy: no", node.name()));
            drop(block);
        }
        // The filter of the test has no resize.
        let error = disk.resize(8192, Preallocation::Off).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_job_blocks_operations_of_others_and_may_change_the_size_itself() {
    block_on(async {
        let graph = graph();
        let below = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let disk = Backend::new(&graph, "", Arc::clone(&below), super::all()).unwrap();
        let job = disk.sole_writer("commit job").await.unwrap();
        let busy = "Node 'm' is busy: block device is in use by block job: commit";
        let error = disk.resize(8192, Preallocation::Off).await.unwrap_err();
        assert_eq!(error.to_string(), busy);
        let error = disk.sole_writer("rebase job").await.err().unwrap();
        assert_eq!(error.to_string(), busy);
        job.backend().resize(8192, Preallocation::Off).await.unwrap();
        job.end().await.unwrap();
        disk.resize(4096, Preallocation::Off).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn implicit_filters_are_skipped() {
    block_on(async {
        let graph = graph();
        let below = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let open =
            async |dotted: &str| graph.open(options(dotted), OpenFlags::default()).await.unwrap();
        let first = open("driver=pass,node-name=f,file=m").await;
        let second = open("driver=pass,node-name=g,file=f").await;
        second.make_implicit();
        assert!(Arc::ptr_eq(&second.skip_implicit_filters(), &first));
        first.make_implicit();
        assert!(Arc::ptr_eq(&second.skip_implicit_filters(), &below));
        graph.release(second).await.unwrap();
    });
}
