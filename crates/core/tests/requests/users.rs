//! Tests of users that are attached and detached on several threads, and of the permissions that the driver receives.

use std::sync::{Arc, Barrier};

use futures_util::future::join;
use oxblk_core::{
    Attachment, Backend, ErrorKind, Limits, OpenFlags, Perm, Permissions, WriteFlags,
};
use oxblk_ring::{IoBuf, block_on, perturb};

use crate::memory::{Memory, graph, node, options};

fn taken(memory: &Memory) -> Perm {
    memory.permissions.lock().unwrap().map_or(Perm::empty(), |permissions| permissions.taken)
}

/// Each of two threads attaches a user and then detaches this user. While both users are attached, the driver has the
/// permissions of both.
fn attach_and_detach(rounds: u32) {
    let graph = graph();
    let memory = Memory::new(4096, Limits::default());
    let node = node(&graph, "m", &memory);
    let barrier = Barrier::new(2);
    let use_as = |perm: Perm| {
        for round in 0..rounds {
            barrier.wait();
            let permissions = Permissions::sharing_all(perm);
            let edge = Attachment::new(&node, "test", "root", permissions).unwrap();
            barrier.wait();
            let expected = Perm::CONSISTENT_READ | Perm::WRITE;
            assert_eq!(taken(&memory), expected, "round {round}");
            barrier.wait();
            drop(edge);
            barrier.wait();
            assert_eq!(taken(&memory), Perm::empty(), "round {round}");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| use_as(Perm::CONSISTENT_READ));
        use_as(Perm::WRITE);
    });
}

#[test]
fn the_driver_has_the_permissions_of_all_users_in_every_order_of_their_threads() {
    attach_and_detach(200);
    for seed in 1..=8 {
        perturb::start(seed);
        attach_and_detach(60);
    }
    perturb::stop();
}

#[test]
fn a_dropped_backend_releases_its_permissions() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        let node = node(&graph, "m", &memory);
        let reader = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let reader = Backend::new(&graph, "", Arc::clone(&node), reader).unwrap();
        let writer = Permissions { taken: Perm::WRITE, shared: Perm::CONSISTENT_READ };
        let writer = Backend::new(&graph, "", node, writer).unwrap();
        assert!(taken(&memory).contains(Perm::WRITE));
        drop(writer);
        assert_eq!(taken(&memory), Perm::CONSISTENT_READ);
        reader.close().await.unwrap();
    });
}

#[test]
fn one_of_two_concurrent_opens_with_the_same_node_name_succeeds() {
    block_on(async {
        let graph = graph();
        let open =
            || graph.open(options("driver=memory,size=512,node-name=x"), OpenFlags::default());
        let (one, other) = join(open(), open()).await;
        let node = one.unwrap();
        assert_eq!(other.unwrap_err().to_string(), "Duplicate nodes with node-name='x'");
        assert!(Arc::ptr_eq(&graph.node("x").unwrap(), &node));
        graph.release(node).await.unwrap();
        // A failed open releases the name.
        let bad = options("driver=memory,size=512,node-name=x,nonsense=1");
        graph.open(bad, OpenFlags::default()).await.unwrap_err();
        let node = open().await.unwrap();
        graph.release(node).await.unwrap();
    });
}

#[test]
fn a_write_that_makes_a_node_grow_needs_resize_permission() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(1000, Limits { grows: true, ..Limits::default() });
        let node = node(&graph, "m", &memory);
        let permissions = Permissions::sharing_all(Perm::WRITE);
        let edge = Attachment::new(&node, "test", "root", permissions).unwrap();
        let write = |offset| edge.write(offset, IoBuf::zeroes(8), WriteFlags::empty());
        assert_eq!(write(1020).await.unwrap_err().kind(), ErrorKind::Denied);
        // The last sector of a disk can always be written.
        write(1016).await.unwrap();
        edge.set_permissions(crate::all()).unwrap();
        write(1020).await.unwrap();
    });
}

#[test]
fn a_user_that_may_only_write_unchanged_data_changes_nothing() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(4096, Limits::default());
        let unchanged = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
        let disk = Backend::new(&graph, "", node(&graph, "m", &memory), unchanged).unwrap();
        let write = |flags| disk.write(0, IoBuf::zeroes(512), flags);
        write(WriteFlags::UNCHANGED).await.unwrap();
        for error in [
            write(WriteFlags::empty()).await.unwrap_err(),
            disk.write_zeroes(0, 512, oxblk_core::ZeroFlags::empty()).await.unwrap_err(),
            disk.discard(0, 512).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Denied);
        }
        assert_eq!(memory.take_log(), ["write 0+512"]);
        disk.close().await.unwrap();
    });
}
