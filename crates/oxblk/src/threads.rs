//! Groups of I/O threads, which run the requests of disks.
//!
//! A disk belongs to one group. Each request goes to one thread of the group ([`IoThreads::spawn`]). The process has one shared
//! group, which is started when it is first used, and ends when no disk or handle uses it. A task has a reference to its group,
//! so that the threads of the group do not end before the task.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use oxblk_core::{Error, Result};
use oxblk_ring::{Config, IoThread, Remote, try_thread_index};

/// Maximum number of threads of the shared group.
const MAX_THREADS: usize = 16;

/// A group of I/O threads. Clones refer to the same group. The threads end when the last clone, the last disk and the last
/// running task of the group have ended.
#[derive(Clone)]
pub struct IoThreads(Arc<Group>);

struct Group {
    threads: Vec<IoThread>,
    /// The number of tasks that other threads have sent to the group. These tasks go to the threads of the group in turn.
    next: AtomicUsize,
}

/// The group for disks that are opened without an explicit group.
static SHARED: Mutex<Weak<Group>> = Mutex::new(Weak::new());

impl IoThreads {
    /// Starts `count` threads (at least one), or fewer if the system cannot start more.
    ///
    /// # Errors
    /// If no thread can be started, for example `EAGAIN`, `ENOMEM` or `EMFILE`.
    pub fn start(count: usize) -> Result<Self> {
        let (group, shortage) = Self::start_up_to(count.max(1));
        match (shortage, group.threads().len()) {
            (None, _) => {}
            (Some(error), 0) => return Err(error.prefix("Cannot start an I/O thread")),
            (Some(error), started) => {
                tracing::warn!("using {started} of {count} I/O threads: {error}");
            }
        }
        Ok(group)
    }

    /// Starts `count` threads, in addition to the calling I/O thread. If the system cannot start all of them, the group has
    /// fewer threads, possibly none, and the returned error is the reason.
    ///
    /// If a group has no threads, the requests of a [`Disk`](crate::Disk) that uses the group fail.
    pub fn start_up_to(count: usize) -> (Self, Option<Error>) {
        let (mut threads, mut shortage) = (Vec::new(), None);
        for index in 0..count {
            match IoThread::start(&format!("oxblk-{index}"), Config::default()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    shortage = Some(Error::from(error));
                    break;
                }
            }
        }
        (Self(Arc::new(Group { threads, next: AtomicUsize::new(0) })), shortage)
    }

    /// Waits until the threads have ended and have closed all files. If other clones of the group or disks of the group exist,
    /// the threads continue to run, and this returns immediately. A thread ends only after all handles to the thread that were
    /// cloned from [`threads`](Self::threads) have been dropped.
    pub fn join(self) {
        let group = Arc::into_inner(self.0);
        for thread in group.into_iter().flat_map(|group| group.threads) {
            thread.join();
        }
    }

    /// The shared group of the process, which disks use by default. It has one thread for each core, at most 16, and is started
    /// when it is first used.
    ///
    /// # Errors
    /// The errors of [`Self::start`].
    pub fn shared() -> Result<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = shared.upgrade() {
            return Ok(Self(group));
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let group = Self::start(cores.min(MAX_THREADS))?;
        *shared = Arc::downgrade(&group.0);
        Ok(group)
    }

    /// The threads.
    pub fn threads(&self) -> &[IoThread] {
        &self.0.threads
    }

    /// Runs `work` on a thread of the group: on the calling thread if it belongs to the group, otherwise on the threads of the
    /// group in turn. `None`: the group has no threads. The group exists until the work has ended.
    pub(crate) fn spawn<F, Fut, T>(&self, work: F) -> Option<Remote<T>>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let group = self.clone();
        Some(self.pick()?.spawn(move || async move {
            let outcome = work().await;
            drop(group);
            outcome
        }))
    }

    fn pick(&self) -> Option<&IoThread> {
        let threads = &self.0.threads;
        let caller = try_thread_index();
        let own = threads.iter().find(|thread| Some(thread.index()) == caller);
        own.or_else(|| {
            let turn = self.0.next.fetch_add(1, Relaxed);
            threads.get(turn.checked_rem(threads.len())?)
        })
    }
}

impl fmt::Debug for IoThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoThreads").field(&self.0.threads.len()).finish()
    }
}
