//! Tests of resumed requests that wait for their admission while the medium is removed or the device is detached.

use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{Errno, Limits, OnError, WriteFlags};
use oxblk_ring::{block_on, spawn, yield_now};

use super::devices::{backend, policies};
use crate::memory::{Memory, node};

#[test]
fn a_request_that_is_resumed_in_a_drained_section_never_reaches_another_medium() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let other = Memory::new(8192, Limits::default());
        let other_node = node(&graph, "other", &other);
        let _device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        memory.errno.store(Errno::NOSPC, SeqCst);
        let writer = backend.clone();
        let task =
            spawn(async move { writer.write(512, vec![7; 512].into(), WriteFlags::empty()).await });
        while backend.held_requests() < 1 {
            yield_now().await;
        }
        memory.errno.store(0, SeqCst);
        // A drained section, for example that of the medium change itself or of a job.
        let drained = graph.drain(&backend.node().unwrap()).await;
        let extra = graph.drain(&other_node).await;
        backend.resume();
        for _ in 0..50 {
            yield_now().await;
        }
        // The medium is removed and another one inserted before the drained section ends.
        backend.remove().await.unwrap();
        backend.insert(&other_node).await.unwrap();
        drop((drained, extra));
        let outcome = task.await;
        let log = other.take_log();
        assert_eq!(outcome.unwrap_err().raw_errno(), Errno::NOSPC);
        assert!(log.iter().all(|line| !line.starts_with("write")), "{log:?}");
        backend.close().await.unwrap();
    });
}

/// The same without a drained section of the test: one change removes the medium and inserts another one, and a `resume` comes
/// while this change waits for a request in flight.
#[test]
fn a_request_that_is_resumed_during_a_medium_change_never_reaches_the_new_medium() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let other = Memory::new(8192, Limits::default());
        let other_node = node(&graph, "other", &other);
        let _device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        memory.errno.store(Errno::NOSPC, SeqCst);
        let writer = backend.clone();
        let task =
            spawn(async move { writer.write(512, vec![7; 512].into(), WriteFlags::empty()).await });
        while backend.held_requests() < 1 {
            yield_now().await;
        }
        memory.errno.store(0, SeqCst);
        // A read in flight delays the change.
        memory.held.store(true, SeqCst);
        let reader = backend.clone();
        let read =
            spawn(async move { reader.read(0, oxblk_ring::IoBufMut::new(512)).await.map(drop) });
        for _ in 0..20 {
            yield_now().await;
        }
        let (changer, new) = (backend.clone(), other_node.clone());
        let change = spawn(async move {
            let mut change = changer.graph().change();
            change.remove_root(&changer);
            change.set_root(&changer, &new);
            change.run().await
        });
        for _ in 0..20 {
            yield_now().await;
        }
        // The manager resumes: the guest continues before the medium is out.
        backend.resume();
        for _ in 0..20 {
            yield_now().await;
        }
        memory.held.store(false, SeqCst);
        read.await.unwrap();
        change.await.unwrap();
        let outcome = task.await;
        let log = other.take_log();
        assert_eq!(outcome.unwrap_err().raw_errno(), Errno::NOSPC);
        assert!(log.iter().all(|line| !line.starts_with("write")), "{log:?}");
        backend.close().await.unwrap();
    });
}

#[test]
fn a_request_that_is_resumed_in_a_drained_section_fails_if_the_device_is_detached() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        memory.errno.store(Errno::NOSPC, SeqCst);
        let writer = backend.clone();
        let task =
            spawn(async move { writer.write(512, vec![7; 512].into(), WriteFlags::empty()).await });
        while backend.held_requests() < 1 {
            yield_now().await;
        }
        memory.errno.store(0, SeqCst);
        memory.take_log();
        let drained = graph.drain(&backend.node().unwrap()).await;
        backend.resume();
        for _ in 0..50 {
            yield_now().await;
        }
        drop(device);
        let _other = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        drop(drained);
        assert_eq!(task.await.unwrap_err().raw_errno(), Errno::NOSPC);
        assert_eq!((memory.take_log(), backend.held_requests()), (Vec::<String>::new(), 0));
        backend.close().await.unwrap();
    });
}
