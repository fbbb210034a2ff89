//! Tests of requests that are held after an error: resuming, draining, closing, other media, cancelling, several threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use oxblk_core::{
    Backend, BlockEvent, Errno, Error, IoErrorAction, IoStatus, Limits, Notice, OnError, OpenFlags,
    Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, Task, block_on, sim, sleep, spawn, yield_now};

use super::devices::{backend, policies};
use crate::memory::{Memory, node};

const STOP: (OnError, OnError) = (OnError::Stop, OnError::Stop);

async fn yields(count: u32) {
    for _ in 0..count {
        yield_now().await;
    }
}

/// Starts a write of one sector.
fn write(backend: &Backend, sector: u64) -> Task<Result<()>> {
    let backend = backend.clone();
    let data = vec![u8::try_from(sector).unwrap() + 1; 512];
    spawn(async move { backend.write(sector * 512, data.into(), WriteFlags::empty()).await })
}

/// Writes to `sectors`, which fail with `errno` and are held in this order.
async fn hold(
    memory: &Memory,
    backend: &Backend,
    errno: i32,
    sectors: &[u64],
) -> Vec<Task<Result<()>>> {
    memory.errno.store(errno, SeqCst);
    let mut tasks = Vec::new();
    for sector in sectors {
        tasks.push(write(backend, *sector));
        while backend.held_requests() < tasks.len() {
            yield_now().await;
        }
    }
    memory.errno.store(0, SeqCst);
    memory.take_log();
    tasks
}

fn writes(sectors: &[u64]) -> Vec<String> {
    sectors.iter().map(|sector| format!("write {}+512", sector * 512)).collect()
}

#[test]
fn held_requests_begin_again_in_the_order_in_which_they_were_held() {
    {
        block_on(async {
            let memory = Memory::new(8192, Limits::default());
            let (_, backend, events) = backend(&memory);
            let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
            let order = [3, 1, 7, 5, 0, 2];
            let tasks = hold(&memory, &backend, Errno::NOSPC, &order).await;
            assert_eq!(backend.io_status(), Some(IoStatus::NoSpace));
            let Some(Notice::Event(BlockEvent::IoError { action, nospace, .. })) =
                events.try_next()
            else {
                panic!("no event");
            };
            assert_eq!((action, nospace), (IoErrorAction::Stop, Some(true)));
            // New requests are not held.
            backend.read(0, IoBufMut::new(512)).await.unwrap();
            memory.take_log();
            backend.resume();
            for task in tasks {
                task.await.unwrap();
            }
            assert_eq!(memory.take_log(), writes(&order));
            assert_eq!((backend.io_status(), backend.held_requests()), (Some(IoStatus::Ok), 0));
            assert_eq!(memory.bytes.lock().unwrap()[7 * 512], 8);
        });
    }
}

#[test]
fn a_request_that_fails_again_is_held_again() {
    sim::run(1, async {
        let memory = Memory::new(8192, Limits::default());
        let (_, backend, events) = backend(&memory);
        backend.set_accounting(Default::default()).unwrap();
        let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        let tasks = hold(&memory, &backend, Errno::IO, &[0, 1]).await;
        memory.errno.store(Errno::IO, SeqCst);
        sleep(Duration::from_secs(1)).await;
        backend.resume();
        while std::iter::from_fn(|| events.try_next()).count() == 0 {
            yield_now().await;
        }
        yields(100).await;
        assert_eq!((backend.io_status(), backend.held_requests()), (Some(IoStatus::Failed), 2));
        memory.errno.store(0, SeqCst);
        backend.resume();
        for task in tasks {
            task.await.unwrap();
        }
        let counts = backend.statistics().unwrap().counts.write;
        assert_eq!((counts.operations, counts.failed), (2, 0));
        // The time during which the requests were held is not counted.
        assert_eq!(counts.total_time, Duration::ZERO);
    });
}

#[test]
fn a_read_is_held_and_returns_its_data_later() {
    block_on(async {
        let memory = Memory::new(4096, Limits::default());
        memory.bytes.lock().unwrap().fill(9);
        let (_, backend, _) = backend(&memory);
        let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        memory.errno.store(Errno::IO, SeqCst);
        let read = {
            let backend = backend.clone();
            spawn(async move { backend.read(0, IoBufMut::new(1024)).await })
        };
        while backend.held_requests() == 0 {
            yield_now().await;
        }
        memory.errno.store(0, SeqCst);
        backend.resume();
        assert_eq!(&*read.await.unwrap(), &[9; 1024]);
    });
}

#[test]
fn a_drain_does_not_wait_for_held_requests_and_holds_them_back_after_a_resume() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        let tasks = hold(&memory, &backend, Errno::IO, &[2, 1]).await;
        let drained = graph.drain(&backend.node().unwrap()).await;
        backend.resume();
        yields(50).await;
        assert!(memory.take_log().is_empty());
        drop(drained);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(memory.take_log(), writes(&[2, 1]));
    });
}

#[test]
fn a_cancelled_request_does_not_block_the_others() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        let mut tasks = hold(&memory, &backend, Errno::IO, &[0, 1, 2, 3]).await;
        // One is cancelled while it is held, one after the resume while it has the turn.
        drop(tasks.remove(1).cancel().await);
        assert_eq!(backend.held_requests(), 3);
        let drained = graph.drain(&backend.node().unwrap()).await;
        backend.resume();
        yields(20).await;
        drop(tasks.remove(0).cancel().await);
        yields(20).await;
        drop(drained);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(memory.take_log(), writes(&[2, 3]));
    });
}

/// Holds two requests, ends their use of the medium with `end`, and expects their errors.
fn fails_held(end: impl AsyncFnOnce(&Backend, oxblk_core::Device)) {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (_, backend, _) = backend(&memory);
        let device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        let tasks = hold(&memory, &backend, Errno::NOSPC, &[0, 1]).await;
        end(&backend, device).await;
        for task in tasks {
            assert_eq!(task.await.unwrap_err().raw_errno(), Errno::NOSPC);
        }
        assert_eq!(backend.held_requests(), 0);
        assert!(memory.take_log().iter().all(|line| !line.starts_with("write")));
    });
}

#[test]
fn held_requests_fail_when_the_device_is_detached() {
    fails_held(async |_, device| drop(device));
}

#[test]
fn held_requests_fail_when_the_backend_is_closed() {
    fails_held(async |backend, _device| backend.close().await.unwrap());
}

#[test]
fn held_requests_fail_when_the_medium_is_removed() {
    fails_held(async |backend, _device| {
        backend.remove().await.unwrap();
        let other = Memory::new(8192, Limits::default());
        backend.insert(&node(backend.graph(), "other", &other)).await.unwrap();
        backend.resume();
        yields(20).await;
        assert!(other.take_log().iter().all(|line| !line.starts_with("write")));
    });
}

#[test]
fn held_requests_continue_with_a_new_root_node_of_the_same_medium() {
    block_on(async {
        let memory = Memory::new(8192, Limits::default());
        let (graph, backend, _) = backend(&memory);
        let _device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
        let tasks = hold(&memory, &backend, Errno::IO, &[1]).await;
        let below = backend.node().unwrap();
        let options = crate::memory::options("driver=pass,node-name=filter,file=m");
        let filter = graph.open(options, OpenFlags::default()).await.unwrap();
        let mut change = graph.change();
        change.replace_node(&below, &filter, |_| true);
        change.run().await.unwrap();
        backend.resume();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(memory.take_log().contains(&"write 512+512".to_owned()));
        assert_eq!(backend.node().unwrap().name(), "filter");
    });
}

#[test]
fn requests_of_several_threads_survive_errors_resumes_and_media_changes() {
    let memory = Memory::new(64 * 512, Limits::default());
    let (graph, backend, _) = block_on(async { backend(&memory) });
    let device = backend.attach_device(policies(STOP.0, STOP.1)).unwrap();
    backend.set_accounting(Default::default()).unwrap();
    let done = AtomicBool::new(false);
    let failed = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3_u64)
            .map(|worker| {
                let (backend, memory) = (backend.clone(), &memory);
                scope.spawn(move || {
                    block_on(async {
                        let mut failed = 0;
                        for round in 0..300_u64 {
                            if round % 7 == worker {
                                memory.errno.store(Errno::IO, SeqCst);
                            }
                            let data = IoBuf::zeroes(512);
                            let at = (worker * 16 + round % 16) * 512;
                            let outcome = backend.write(at, data, WriteFlags::empty()).await;
                            failed += u64::from(outcome.as_ref().is_err_and(is_io));
                        }
                        failed
                    })
                })
            })
            .collect();
        let (graph, backend, memory, done) = (&graph, &backend, &memory, &done);
        scope.spawn(move || {
            block_on(async {
                let mut round = 0_u32;
                let node = backend.node().unwrap();
                graph.keep_open(Arc::clone(&node)).unwrap();
                while !done.load(SeqCst) {
                    memory.errno.store(0, SeqCst);
                    backend.resume();
                    if round % 16 == 7 {
                        drop(graph.drain(&node).await);
                    }
                    if round % 16 == 15 {
                        // The flush before the removal may fail.
                        if backend.remove().await.is_ok() {
                            backend.insert(&node).await.unwrap();
                        }
                    }
                    round = round.wrapping_add(1);
                    yields(10).await;
                }
                memory.errno.store(0, SeqCst);
                backend.close().await.unwrap();
                graph.allow_close(node).await.unwrap();
            });
        });
        let failed = workers.into_iter().map(|worker| worker.join().unwrap_or(0)).sum::<u64>();
        done.store(true, SeqCst);
        failed
    });
    let counts = backend.statistics().unwrap().counts.write;
    assert_eq!((counts.failed, backend.held_requests()), (failed, 0));
    assert_eq!(counts.operations + counts.failed + counts.invalid, 900);
    drop(device);
}

fn is_io(error: &Error) -> bool {
    error.raw_errno() == Errno::IO
}
