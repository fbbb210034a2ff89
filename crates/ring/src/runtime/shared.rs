//! The part of an I/O thread that other threads may access: the mailbox, and the bell (an eventfd that wakes the
//! thread). Also the table of all I/O threads.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_task::Runnable;

use super::local;
use super::wake::Mailbox;
use crate::perturb;
use crate::reactor::Key;

/// The maximum number of I/O threads that a process may have at the same time.
pub const MAX_IO_THREADS: usize = 64;

/// A message in the mailbox.
pub(crate) enum Message {
    /// A task was woken from another thread.
    Run(Runnable),
    /// A closure to run on the thread (it starts a task).
    Call(Box<dyn FnOnce() + Send>),
    /// A blocking operation has completed with this result (a count or a negative errno).
    Complete(Key, i32),
    /// The last handle of a file was dropped: remove the file from the table of registered files. Another file may
    /// use the id when all copies of the second field are dropped.
    Unregister(u32, Arc<dyn Any + Send + Sync>),
    /// Only wakes the main future of the thread, which then checks a flag.
    Wake,
}

/// The shared part of an I/O thread.
pub(crate) struct Shared {
    pub(crate) mailbox: Mailbox<Message>,
    bell: OwnedFd,
    index: usize,
    /// No handle of the thread is left, so the loop must end.
    pub(crate) stop: AtomicBool,
    /// The thread has begun to close. It runs no further calls.
    closing: AtomicBool,
}

static THREADS: Mutex<[Option<Arc<Shared>>; MAX_IO_THREADS]> =
    Mutex::new([const { None }; MAX_IO_THREADS]);

impl Shared {
    /// Claims the lowest free index for a new I/O thread.
    pub(crate) fn register() -> io::Result<Arc<Shared>> {
        // SAFETY: no pointers involved; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that is ours.
        let bell = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = threads.iter().position(Option::is_none) else {
            return Err(io::Error::other(format!("more than {MAX_IO_THREADS} I/O threads")));
        };
        let (mailbox, stop, closing) =
            (Mailbox::new(), AtomicBool::default(), AtomicBool::default());
        let shared = Arc::new(Shared { mailbox, bell, index, stop, closing });
        threads[index] = Some(Arc::clone(&shared));
        Ok(shared)
    }

    /// Releases the index.
    pub(crate) fn unregister(&self) {
        let gone = THREADS.lock().unwrap_or_else(PoisonError::into_inner)[self.index].take();
        drop(gone);
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Records that the thread begins to close.
    pub(super) fn begin_to_close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Whether the thread has begun to close, or has ended.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Puts a message in the mailbox and wakes the thread if it sleeps. If the thread has ended, the message is
    /// dropped here. When a call is dropped, its waiter receives [`TaskGone`](super::TaskGone). A runnable is never
    /// dropped here (see [`spawn`](super::spawn)).
    pub(crate) fn send(&self, message: Message) {
        match self.mailbox.push(message) {
            Ok(true) => {
                perturb::point();
                self.ring();
            }
            Ok(false) => {}
            Err(refused) => drop(refused),
        }
    }

    /// Wakes the thread if it sleeps. The caller has changed a flag that the thread must check.
    pub(crate) fn wake_if_asleep(&self) {
        perturb::point();
        if self.mailbox.must_ring() {
            self.ring();
        }
    }

    fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. The write fails only if the counter is about to overflow. In this case the
        // bell is already readable.
        unsafe { libc::write(self.bell(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes the loop of the thread end.
    pub(crate) fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.send(Message::Wake);
    }
}

/// Sends a message to each I/O thread whose bit is set.
pub(crate) fn send_to(threads: u64, mut message: impl FnMut() -> Message) {
    if threads == 0 {
        return;
    }
    let table = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    for (index, shared) in table.iter().enumerate() {
        if threads & (1 << index) != 0
            && let Some(shared) = shared
        {
            shared.send(message());
        }
    }
}

/// The dense index of the current I/O thread, below [`MAX_IO_THREADS`]. An index is reused after its thread has
/// ended.
///
/// # Panics
/// If the caller is not on an I/O thread.
pub fn thread_index() -> usize {
    match try_thread_index() {
        Some(index) => index,
        None => panic!("not on an I/O thread"),
    }
}

/// The dense index of the current I/O thread; `None` if the caller is not on an I/O thread.
pub fn try_thread_index() -> Option<usize> {
    local::try_with(|local| local.shared.index())
}
