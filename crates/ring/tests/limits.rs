//! Tests of resource limits (processes, locked memory, address space, descriptors), and of a sandbox that refuses
//! `io_uring_enter`. The engine works within the limit, or reports an error.
//!
//! A limit cannot be raised again, and a system-call filter cannot be removed. So each test runs itself as a child
//! process that sets the limit or the filter.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

mod child;

use std::os::fd::OwnedFd;
use std::path::Path;

use child::{is_child, refuse};
use oxblk_ring::{
    Aio, Config, Falloc, File, IoBufMut, IoThread, block_on, block_on_with, host, offload, spawn,
};

/// Becomes a user without privileges. `RLIMIT_NPROC` and `RLIMIT_MEMLOCK` do not apply to root.
fn become_nobody() {
    // SAFETY: no memory involved.
    unsafe {
        if libc::geteuid() == 0 {
            assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
            assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
        }
    }
}

fn limit(resource: libc::__rlimit_resource_t, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the kernel reads the structure.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}

fn temporary(directory: &str) -> Option<File> {
    let host = tempfile::tempfile_in(Path::new(directory)).ok()?;
    Some(File::from_fd(OwnedFd::from(host), Aio::IoUring))
}

/// Operations for which the kernel or the engine might start a thread.
async fn work(files: &[File]) {
    for file in files {
        let writes: Vec<_> = (0..16_u64)
            .map(|i| {
                let file = file.clone();
                spawn(async move {
                    let data = IoBufMut::filled(256 << 10, 7).freeze();
                    file.write_all_at(data, i << 18, false).await
                })
            })
            .collect();
        for write in writes {
            write.await.unwrap();
        }
        file.sync(false).await.unwrap();
        // Not every file system supports punching holes.
        let _ = file.fallocate(Falloc::PunchHole, 0, 4096).await.inspect_err(|error| {
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}");
        });
        file.set_len(5 << 20).await.unwrap();
        file.seek_extent(4096).await.unwrap();
        let (read, n) = file.read_full_at(IoBufMut::new(4 << 20), 0).await.unwrap();
        assert_eq!(n, 4 << 20);
        assert!(read[4096..].iter().all(|byte| *byte == 7));
    }
    assert_eq!(offload(|| 1).await, 1);
}

fn files() -> Vec<File> {
    ["/dev/shm", "/var/tmp"].into_iter().filter_map(temporary).collect()
}

#[test]
fn the_engine_works_if_no_other_thread_can_be_started() {
    if !is_child("the_engine_works_if_no_other_thread_can_be_started") {
        return;
    }
    let files = files();
    become_nobody();
    limit(libc::RLIMIT_NPROC, 0);
    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
    block_on(work(&files));
    assert!(IoThread::start("helper", Config::default()).is_err());
    block_on(work(&files));
}

#[test]
fn the_engine_works_without_locked_memory() {
    if !is_child("the_engine_works_without_locked_memory") {
        return;
    }
    let files = files();
    become_nobody();
    limit(libc::RLIMIT_MEMLOCK, 0);
    block_on(work(&files));
}

#[test]
fn a_ring_that_cannot_be_entered_is_not_used() {
    if !is_child("a_ring_that_cannot_be_entered_is_not_used") {
        return;
    }
    refuse(&[libc::SYS_io_uring_enter]);
    let files = files();
    block_on(work(&files));
    let thread = IoThread::start("helper", Config::default()).unwrap();
    thread.spawn(move || async move { work(&files).await }).wait().unwrap();
    thread.join();
}

#[test]
fn threads_are_refused_before_the_address_space_is_exhausted() {
    if !is_child("threads_are_refused_before_the_address_space_is_exhausted") {
        return;
    }
    let size = || {
        let sizes = std::fs::read_to_string("/proc/self/statm").unwrap();
        sizes.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 4096
    };
    // Skip the test under a sanitizer, whose shadow memory occupies terabytes of addresses.
    if size() > 1 << 40 {
        return;
    }
    host::limit_allocator_arenas();
    let files = files();
    block_on(work(&files));
    limit(libc::RLIMIT_AS, size() + (256 << 20));
    let threads: Vec<_> =
        (0..63).map_while(|_| IoThread::start("helper", Config::default()).ok()).collect();
    assert!(!threads.is_empty() && threads.len() < 63, "{}", threads.len());
    let remotes: Vec<_> = threads
        .iter()
        .map(|thread| {
            let files = files.clone();
            thread.spawn(move || async move {
                let read = files[0].read_full_at(IoBufMut::new(512 << 10), 1 << 20).await;
                assert_eq!(read.unwrap().1, 512 << 10);
                offload(|| 1).await
            })
        })
        .collect();
    for remote in remotes {
        assert_eq!(remote.wait(), Ok(1));
    }
    threads.into_iter().for_each(IoThread::join);
    block_on(work(&files));
}

#[test]
fn threads_leave_descriptors_for_files() {
    if !is_child("threads_leave_descriptors_for_files") {
        return;
    }
    let files = files();
    limit(libc::RLIMIT_NOFILE, 40);
    let threads: Vec<_> =
        (0..63).map_while(|_| IoThread::start("helper", Config::default()).ok()).collect();
    assert!(!threads.is_empty() && threads.len() < 63, "{}", threads.len());
    let spare: Vec<_> = (0..8).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    block_on(work(&files));
    drop(spare);
    threads.into_iter().for_each(IoThread::join);
}

#[test]
fn an_io_thread_without_free_descriptors_is_an_error() {
    if !is_child("an_io_thread_without_free_descriptors_is_an_error") {
        return;
    }
    let files = files();
    for left in 0..4 {
        let mut taken = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            taken.push(file);
            if taken.len() > 4096 {
                // The limit of the process is high, so set a lower limit.
                limit(libc::RLIMIT_NOFILE, 4000);
                taken.truncate(100);
            }
        }
        taken.truncate(taken.len() - left);
        match block_on_with(Config::default(), work(&files)) {
            Ok(()) => assert!(left > 0),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EMFILE)),
        }
    }
    block_on(work(&files));
}
