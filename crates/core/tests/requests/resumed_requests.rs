//! Tests of resumed requests that wait for their admission while the medium is removed or the device is detached.

use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{Backend, Errno, Error, Limits, OnError, WriteFlags};
use oxblk_ring::{Task, block_on, spawn, yield_now};

use super::devices::{backend, policies};
use crate::memory::{Memory, node};

/// Begins a write that fails for lack of space and is held. Further requests to the memory succeed.
async fn hold_write(backend: &Backend, memory: &Memory) -> Task<Result<(), Error>> {
    memory.errno.store(Errno::NOSPC, SeqCst);
    let writer = backend.clone();
    let task =
        spawn(async move { writer.write(512, vec![7; 512].into(), WriteFlags::empty()).await });
    while backend.held_requests() < 1 {
        yield_now().await;
    }
    memory.errno.store(0, SeqCst);
    task
}

/// Lets the other tasks run `rounds` times.
async fn let_run(rounds: usize) {
    for _ in 0..rounds {
        yield_now().await;
    }
}

fn assert_not_written(memory: &Memory) {
    let log = memory.take_log();
    assert!(log.iter().all(|line| !line.starts_with("write")), "{log:?}");
}

#[test]
fn a_request_that_is_resumed_in_a_drained_section_never_reaches_another_medium() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let other = Memory::new(8192, Limits::default());
        let other_node = node(&graph, "other", &other);
        let _device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        let task = hold_write(&backend, &memory).await;
        // A drained section, for example that of the medium change itself or of a job.
        let drained = graph.drain(&backend.node().unwrap()).await;
        let extra = graph.drain(&other_node).await;
        backend.resume();
        let_run(50).await;
        // The medium is removed and another one inserted before the drained section ends.
        backend.remove().await.unwrap();
        backend.insert(&other_node).await.unwrap();
        drop((drained, extra));
        assert_eq!(task.await.unwrap_err().raw_errno(), Errno::NOSPC);
        assert_not_written(&other);
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
        let task = hold_write(&backend, &memory).await;
        // A read in flight delays the change.
        memory.held.store(true, SeqCst);
        let reader = backend.clone();
        let read =
            spawn(async move { reader.read(0, oxblk_ring::IoBufMut::new(512)).await.map(drop) });
        let_run(20).await;
        let (changer, new) = (backend.clone(), other_node.clone());
        let change = spawn(async move {
            let mut change = changer.graph().change();
            change.remove_root(&changer);
            change.set_root(&changer, &new);
            change.run().await
        });
        let_run(20).await;
        // The manager resumes: the guest continues before the medium is out.
        backend.resume();
        let_run(20).await;
        memory.held.store(false, SeqCst);
        read.await.unwrap();
        change.await.unwrap();
        assert_eq!(task.await.unwrap_err().raw_errno(), Errno::NOSPC);
        assert_not_written(&other);
        backend.close().await.unwrap();
    });
}

#[test]
fn a_request_that_is_resumed_in_a_drained_section_fails_if_the_device_is_detached() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        let task = hold_write(&backend, &memory).await;
        memory.take_log();
        let drained = graph.drain(&backend.node().unwrap()).await;
        backend.resume();
        let_run(50).await;
        drop(device);
        let _other = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        drop(drained);
        assert_eq!(task.await.unwrap_err().raw_errno(), Errno::NOSPC);
        assert_eq!((memory.take_log(), backend.held_requests()), (Vec::<String>::new(), 0));
        backend.close().await.unwrap();
    });
}
