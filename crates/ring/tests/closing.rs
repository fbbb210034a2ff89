//! Files are closed when the threads that used them have ended, not some time later.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;

use oxblk_ring::{Aio, Config, Engine, File, IoBuf, IoThread, block_on_with};

/// Nobody else has the file open: the kernel then grants a lease on it.
fn is_closed_by_all(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    // SAFETY: the descriptor is open; a lease is given up when it is closed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) == 0 }
}

async fn write(file: &File) {
    file.write_all_at(IoBuf::from(vec![7; 4096]), 0, false).await.unwrap();
}

#[test]
fn a_file_is_closed_when_the_threads_that_used_it_have_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    for engine in [Engine::Uring, Engine::Threads] {
        let config = || Config { engine, ..Config::default() };
        let helper = IoThread::start("helper", config()).unwrap();
        let host = std::fs::File::create(&path).unwrap();
        block_on_with(config(), async {
            let file = File::from_fd(host.into(), Aio::IoUring);
            write(&file).await;
            let shared = file.clone();
            helper.spawn(move || async move { write(&shared).await }).await.unwrap();
        })
        .unwrap();
        helper.join();
        assert!(is_closed_by_all(&path), "{engine:?}");
    }
}
