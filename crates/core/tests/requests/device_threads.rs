//! Tests of a device whose requests fail on several threads.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use futures_util::FutureExt;
use oxblk_core::{Backend, Errno, IoStatus, Limits, OnError, Result, WriteFlags};
use oxblk_ring::{IoBuf, block_on, yield_now};

use super::devices::{backend, policies};
use crate::memory::Memory;

async fn write(backend: &Backend) -> Result<()> {
    backend.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await
}

#[test]
fn the_io_status_is_ok_if_no_request_is_held() {
    let memory = Memory::new(4096, Limits::default());
    let (_graph, backend, _) = block_on(async { backend(&memory) });
    let _device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
    let writers = AtomicU32::new(3);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                block_on(async {
                    for _ in 0..5000 {
                        write(&backend).await.unwrap();
                    }
                });
                writers.fetch_sub(1, SeqCst);
            });
        }
        let mut violations = 0;
        let mut errors = [Errno::IO, 0].into_iter().cycle();
        while writers.load(SeqCst) != 0 {
            memory.errno.store(errors.next().unwrap(), SeqCst);
            // Only this thread resumes requests.
            let (status, held) = (backend.io_status(), backend.held_requests());
            violations += u32::from(status != Some(IoStatus::Ok) && held == 0);
            if held != 0 {
                backend.resume();
            }
        }
        assert_eq!(violations, 0, "the I/O status is not ok, but no request is held");
    });
    assert_eq!((backend.io_status(), backend.held_requests()), (Some(IoStatus::Ok), 0));
    memory.errno.store(0, SeqCst);
    block_on(backend.close()).unwrap();
}

#[test]
fn a_detach_fails_no_request_of_the_next_device() {
    let memory = Memory::new(4096, Limits::default());
    let (_graph, backend, _) = block_on(async { backend(&memory) });
    let is_done = AtomicBool::new(false);
    let attach = || backend.attach_device(policies(OnError::Stop, OnError::Stop));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(SeqCst) {
                drop(attach());
                std::thread::yield_now();
            }
        });
        let failed = block_on(async {
            let mut failed = 0;
            for _ in 0..1000 {
                let device = loop {
                    if let Ok(device) = attach() {
                        break device;
                    }
                };
                memory.errno.store(Errno::IO, SeqCst);
                let mut request = pin!(write(&backend));
                let mut outcome = request.as_mut().now_or_never();
                while backend.held_requests() == 0 && outcome.is_none() {
                    yield_now().await;
                    outcome = request.as_mut().now_or_never();
                }
                yield_now().await;
                memory.errno.store(0, SeqCst);
                backend.resume();
                let outcome = match outcome {
                    Some(outcome) => outcome,
                    None => request.await,
                };
                failed += u32::from(outcome.is_err());
                drop(device);
            }
            is_done.store(true, SeqCst);
            failed
        });
        assert_eq!(failed, 0);
    });
    block_on(backend.close()).unwrap();
}
