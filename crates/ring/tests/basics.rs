//! Basic tests of tasks, files, sockets and timers with each engine.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use futures_util::future::join;
use oxblk_ring::{
    Address, Aio, Config, Engine, Falloc, File, IoBuf, IoBufMut, IoThread, Listener, Stream,
    TaskGone, block_on, block_on_with, offload, sim, sleep, spawn, thread_index, timeout,
    yield_now,
};

const ENGINES: [Engine; 2] = [Engine::Uring, Engine::Threads];

fn config(engine: Engine) -> Config {
    Config { engine, ..Config::default() }
}

fn on_each_engine<F: Future<Output = ()>>(mut make: impl FnMut() -> F) {
    for engine in ENGINES {
        block_on_with(config(engine), make()).unwrap();
    }
}

fn temporary(aio: Aio) -> File {
    File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), aio)
}

#[test]
fn a_file_reads_back_what_was_written_with_every_engine_and_aio() {
    for aio in [Aio::IoUring, Aio::Threads, Aio::Native] {
        on_each_engine(|| async move {
            let file = temporary(aio);
            let data: Vec<u8> = (0..100_000u32).map(|i| i.to_le_bytes()[0]).collect();
            file.write_all_at(IoBuf::from(data.clone()), 4096, true).await.unwrap();
            file.sync(false).await.unwrap();
            assert_eq!(file.len().await.unwrap(), 104_096);
            let (back, n) = file.read_full_at(IoBufMut::filled(110_000, 7), 0).await.unwrap();
            assert_eq!(n, 104_096);
            assert!(back[..4096].iter().all(|&b| b == 0), "the hole must read as zeroes");
            assert_eq!(&back[4096..104_096], &data[..]);
            assert!(back[104_096..].iter().all(|&b| b == 0), "bytes past the end must be zeroed");
            file.fallocate(Falloc::PunchHole, 4096, 4096).await.unwrap();
            let (result, back) = file.read_at(IoBufMut::new(4096), 4096).await;
            assert_eq!(result.unwrap(), 4096);
            assert!(oxblk_ring::is_zero(&back));
            file.set_len(10).await.unwrap();
            assert_eq!(file.len().await.unwrap(), 10);
        });
    }
}

#[test]
fn vectored_transfers_fill_and_drain_buffers_in_order() {
    on_each_engine(|| async {
        let file = temporary(Aio::IoUring);
        let bufs = [&b"abc"[..], b"", b"defgh"].map(|b| IoBufMut::copy_from(b).freeze());
        file.write_all_vectored_at(bufs.into_iter().collect(), 1, false).await.unwrap();
        let into = [2usize, 0, 7].map(IoBufMut::new);
        let (result, bufs) = file.read_vectored_at(into.into_iter().collect(), 0).await;
        assert_eq!(result.unwrap(), 9);
        assert_eq!((&bufs[0][..], &bufs[2][..]), (&b"\0a"[..], &b"bcdefgh"[..]));
    });
}

#[test]
fn thousands_of_concurrent_operations_overflow_no_queue() {
    on_each_engine(|| async {
        let file = temporary(Aio::IoUring);
        let tasks: Vec<_> = (0..3000u32)
            .map(|i| {
                let file = file.clone();
                spawn(async move {
                    let buf = IoBufMut::copy_from(&i.to_le_bytes()).freeze();
                    assert_eq!(file.write_at(buf, u64::from(i) * 4, false).await.unwrap(), 4);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let (back, n) = file.read_full_at(IoBufMut::new(12_000), 0).await.unwrap();
        assert_eq!(n, 12_000);
        for (i, word) in (0u32..).zip(back.chunks(4)) {
            assert_eq!(word, i.to_le_bytes());
        }
    });
}

#[test]
fn operations_dropped_in_flight_do_not_disturb_the_engine() {
    on_each_engine(|| async {
        let file = temporary(Aio::IoUring);
        for i in 0..500u64 {
            drop(file.write_at(IoBufMut::filled(4096, 1).freeze(), i * 4096, false));
            drop(file.read_at(IoBufMut::new(4096), i * 4096));
            if i % 50 == 0 {
                yield_now().await;
            }
        }
        file.sync(true).await.unwrap();
    });
}

#[test]
fn a_socket_carries_bytes_both_ways_until_the_end_of_the_stream() {
    on_each_engine(|| async {
        let (a, b) = Stream::pair().unwrap();
        let echo = spawn(async move {
            loop {
                let (result, mut buf) = b.recv(IoBufMut::new(1000)).await;
                let n = result.unwrap();
                if n == 0 {
                    break;
                }
                buf.truncate(n);
                b.send_all(std::iter::once(buf.freeze()).collect()).await.unwrap();
            }
        });
        let message: Vec<u8> = (0..1_000_000u32).map(|i| i.to_le_bytes()[1]).collect();
        let send = a.send_all(std::iter::once(IoBuf::from(message.clone())).collect());
        let (sent, back) = join(send, a.recv_exact(IoBufMut::new(message.len()))).await;
        sent.unwrap();
        assert_eq!(&back.unwrap()[..], &message[..]);
        a.shutdown();
        echo.await;
        let eof = a.recv_exact(IoBufMut::new(1)).await.unwrap_err();
        assert_eq!(eof.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_receive_that_is_dropped_is_cancelled_and_its_socket_closes() {
    on_each_engine(|| async {
        let (a, b) = Stream::pair().unwrap();
        assert!(timeout(Duration::from_millis(5), a.recv(IoBufMut::new(10))).await.is_err());
        drop(a);
        let (result, _) = b.recv(IoBufMut::new(10)).await;
        assert_eq!(result.unwrap(), 0, "the peer must see the end of the stream");
    });
}

#[test]
fn a_listener_accepts_tcp_connections_on_a_port_of_the_kernels_choice() {
    on_each_engine(|| async {
        let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
        let address = listener.local_address();
        let (server, client) = join(listener.accept(), Stream::connect(&address)).await;
        let (server, client) = (Stream::from_fd(server.unwrap()).unwrap(), client.unwrap());
        client.send_all(std::iter::once(IoBuf::from(&b"hello"[..])).collect()).await.unwrap();
        assert_eq!(&server.recv_exact(IoBufMut::new(5)).await.unwrap()[..], b"hello");
    });
}

#[test]
fn tasks_run_on_another_thread_and_return_their_result() {
    for engine in ENGINES {
        let thread = IoThread::start("test", config(engine)).unwrap();
        let index = thread.spawn(|| async { thread_index() }).wait().unwrap();
        assert_eq!(index, thread.index());
        let other = thread.clone();
        let sum = block_on(async move {
            let parts: Vec<_> =
                (0..100u64).map(|i| other.spawn(move || async move { i })).collect();
            let mut sum = 0;
            for part in parts {
                sum += part.await.unwrap();
            }
            sum
        });
        assert_eq!(sum, 4950);
        thread.join();
    }
}

#[test]
fn a_task_whose_thread_ended_is_reported_as_gone() {
    let thread = IoThread::start("test", Config::default()).unwrap();
    let stuck = thread.spawn(std::future::pending::<()>);
    thread.join();
    assert_eq!(stuck.wait(), Err(TaskGone));
}

#[test]
fn a_panic_resumes_where_the_task_is_awaited() {
    let local = catch_unwind(|| block_on(async { spawn(async { panic!("local") }).await }));
    assert_eq!(local.unwrap_err().downcast_ref::<&str>(), Some(&"local"));
    let thread = IoThread::start("test", Config::default()).unwrap();
    let remote = thread.spawn(|| async { panic!("remote") });
    let remote = catch_unwind(AssertUnwindSafe(|| remote.wait()));
    assert!(remote.is_err());
    assert_eq!(thread.spawn(|| async { 5 }).wait(), Ok(5), "the thread must still run tasks");
    let offloaded = catch_unwind(|| block_on(async { offload(|| panic!("worker")).await }));
    assert!(offloaded.is_err());
}

#[test]
fn timers_fire_in_order_and_a_timeout_drops_a_late_future() {
    on_each_engine(|| async {
        let log = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let tasks: Vec<_> = [3u64, 1, 2]
            .map(|i| {
                let log = log.clone();
                spawn(async move {
                    sleep(Duration::from_millis(i * 20)).await;
                    log.borrow_mut().push(i);
                })
            })
            .into_iter()
            .collect();
        assert!(timeout(Duration::from_millis(1), std::future::pending::<()>()).await.is_err());
        assert_eq!(timeout(Duration::from_secs(60), async { 1 }).await, Ok(1));
        for task in tasks {
            task.await;
        }
        assert_eq!(*log.borrow(), [1, 2, 3]);
    });
}

#[test]
fn offloaded_work_returns_its_result() {
    assert_eq!(block_on(offload(|| 6 * 7)), 42);
    assert!(oxblk_ring::offload_threads() >= 1);
}

#[test]
fn a_file_closes_when_its_last_handle_is_dropped() {
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    block_on(async {
        let file = File::from_fd(
            OwnedFd::from(std::fs::File::options().read(true).write(true).open(&path).unwrap()),
            Aio::IoUring,
        );
        file.write_all_at(IoBuf::zeroes(512), 0, false).await.unwrap();
        let held = std::fs::File::open(&path).unwrap();
        let lease = || read_lease(&held);
        assert!(!lease(), "the file is open for writing, so the kernel must refuse a read lease");
        drop(file);
        sleep(Duration::from_millis(20)).await;
        assert!(lease(), "the last handle must have closed the file");
    });
}

/// Requests a read lease, and returns whether the kernel grants it. The kernel refuses the lease while a process has
/// the file open for writing.
fn read_lease(file: &std::fs::File) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: no memory involved.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0 }
}

#[test]
fn a_simulated_disk_works_inside_and_outside_of_a_simulation() {
    let body = |disk: sim::Disk| async move {
        let file = File::sim(&disk);
        file.write_all_at(IoBufMut::filled(1000, 9).freeze(), 100, false).await.unwrap();
        file.sync(false).await.unwrap();
        let (back, n) = file.read_full_at(IoBufMut::new(2000), 0).await.unwrap();
        assert_eq!(n, 2000);
        assert!(back[100..1100].iter().all(|&b| b == 9));
    };
    block_on(body(sim::Disk::new(1, 4096)));
    sim::run(1, body(sim::Disk::new(1, 4096)));
}

#[test]
fn a_deadlocked_simulation_panics() {
    let stuck = catch_unwind(|| sim::run(1, std::future::pending::<()>()));
    assert!(stuck.unwrap_err().downcast_ref::<String>().unwrap().contains("deadlock"));
}

#[test]
fn thousands_of_files_open_and_close_and_none_is_confused_with_another() {
    let thread = IoThread::start("files", Config::default()).unwrap();
    block_on(async {
        let mut open: Vec<(u64, File)> = Vec::new();
        for i in 0..3000u64 {
            let file = temporary(Aio::IoUring);
            file.write_all_at(IoBufMut::copy_from(&i.to_le_bytes()).freeze(), 0, false)
                .await
                .unwrap();
            open.push((i, file));
            if open.len() > 50 {
                let (number, file) = open.swap_remove(usize::try_from(i % 50).unwrap());
                let here = file.read_full_at(IoBufMut::new(8), 0).await.unwrap().0;
                assert_eq!(here[..], number.to_le_bytes());
                let there = thread
                    .spawn(move || async move { file.read_full_at(IoBufMut::new(8), 0).await });
                assert_eq!(there.await.unwrap().unwrap().0[..], number.to_le_bytes());
            }
        }
    });
    thread.join();
}

#[test]
fn sockets_work_in_simulation_before_virtual_time_advances() {
    sim::run(7, async {
        let (a, b) = Stream::pair().unwrap();
        let echo = spawn(async move {
            let buf = b.recv_exact(IoBufMut::new(100_000)).await.unwrap();
            b.send_all(std::iter::once(buf.freeze()).collect()).await.unwrap();
        });
        let exchange = async {
            let data = IoBuf::from(vec![4; 100_000]);
            let (sent, back) = join(
                a.send_all(std::iter::once(data).collect()),
                a.recv_exact(IoBufMut::new(100_000)),
            )
            .await;
            sent.unwrap();
            back.unwrap()
        };
        let back = timeout(Duration::from_millis(1), exchange).await.unwrap();
        assert!(back.iter().all(|&b| b == 4));
        echo.await;
        assert!(
            timeout(Duration::from_secs(9), a.recv(IoBufMut::new(1)))
                .await
                .is_ok_and(|(r, _)| matches!(r, Ok(0)))
        );
    });
}

#[test]
fn io_threads_of_a_simulation_are_part_of_it() {
    let order = sim::run(3, async {
        let threads: Vec<_> =
            (0..3).map(|i| IoThread::start(&format!("t{i}"), Config::default()).unwrap()).collect();
        let tasks: Vec<_> = threads
            .iter()
            .map(|t| {
                t.spawn(|| async {
                    sleep(Duration::from_secs(1)).await;
                    oxblk_ring::now()
                })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.push(task.await.unwrap());
        }
        times
    });
    assert_eq!(order, vec![Duration::from_secs(1); 3]);
}
