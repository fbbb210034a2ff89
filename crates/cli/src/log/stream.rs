//! A thread that writes the log to standard error, so that threads that log never block.
//!
//! I/O threads write log lines. These threads must not block, even if standard error is a full pipe that no process
//! reads. So a line goes to a bounded queue, and a separate thread writes the queue to standard error.
//!
//! Invariant: no thread waits for standard error while it holds the lock of the queue, so [`LogStream`] never waits for
//! standard error. Before the program prints a message to standard error, it calls [`wait_until_written`], so that log lines
//! and messages stay in order.
//!
//! If the thread cannot be started, lines stay in the queue. Each new line tries to start the thread again, and
//! [`wait_until_written`] writes the lines on the calling thread.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oxblk_core::names;

use super::queue::Queue;

/// Stack size of the writing thread.
const STACK: usize = 128 << 10;

struct Shared {
    queue: Queue,
    has_writer: bool,
    /// The thread is writing a line.
    is_writing: bool,
    /// The time that [`wait_until_written`] waits for a line to be written. `None`: no limit.
    patience: Option<Duration>,
}

static SHARED: Mutex<Shared> = Mutex::new(Shared {
    queue: Queue::new(),
    has_writer: false,
    is_writing: false,
    patience: None,
});
/// Notified when a line was added.
static ADDED: Condvar = Condvar::new();
/// Notified when a line was written.
static WRITTEN: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, Shared> {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the writing thread if it does not run, and limits the time that [`wait_until_written`] waits for a line to
/// `patience`.
pub(super) fn start_writer(patience: Duration) {
    let mut shared = lock();
    shared.patience = Some(patience);
    ensure_writer(&mut shared);
}

fn ensure_writer(shared: &mut Shared) {
    if !shared.has_writer {
        let thread = std::thread::Builder::new().name("log".to_owned()).stack_size(STACK);
        shared.has_writer = thread.spawn(write_lines).is_ok();
    }
}

/// Writes lines until the process ends.
fn write_lines() {
    let mut shared = lock();
    loop {
        if let Some(line) = shared.queue.pop() {
            shared.is_writing = true;
            drop(shared);
            write(&line);
            shared = lock();
            shared.is_writing = false;
            WRITTEN.notify_all();
        } else {
            shared = ADDED.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes a line to standard error. If the write fails, the line is lost.
fn write(line: &[u8]) {
    drop(io::stderr().lock().write_all(line));
}

/// Waits until all lines are written. In a server, the wait ends if a line is not written in time.
pub(crate) fn wait_until_written() {
    let mut shared = lock();
    loop {
        if shared.has_writer {
            if !shared.is_writing && shared.queue.is_empty() {
                return;
            }
            let Some(patience) = shared.patience else {
                shared = WRITTEN.wait(shared).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let waited = WRITTEN.wait_timeout(shared, patience);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return;
            }
            shared = guard;
        } else {
            let Some(line) = shared.queue.pop() else { return };
            drop(shared);
            write(&line);
            shared = lock();
        }
    }
}

/// A writer that puts each log line into the queue.
#[derive(Debug)]
pub(crate) struct LogStream;

impl Write for LogStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = names::to_bytes(&String::from_utf8_lossy(bytes)).into_owned();
        let mut shared = lock();
        shared.queue.push(line);
        ensure_writer(&mut shared);
        ADDED.notify_one();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
