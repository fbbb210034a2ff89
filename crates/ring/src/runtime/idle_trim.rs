//! Frees cached memory when the process is idle.
//!
//! Freed buffers are cached for reuse. A thread that has run no task for at least [`IDLE_AFTER`] frees its own cache.
//! If no other thread is active ([`ACTIVE`]) when a thread becomes idle, this thread also frees the shared caches and makes
//! the allocator return free pages to the system.
//!
//! A busy thread only sets a flag. For idle detection, a thread reads the clock only before and after it sleeps. An
//! idle thread has no timer for this purpose, so only work wakes it.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::timer::real_now;
use crate::buf::{trim_shared, trim_thread};

/// The time without a task after which a thread is idle.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// Number of active threads. A thread that has run a task becomes active when it next begins to sleep, and stays active until
/// it is idle.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// Detects whether one thread is idle.
#[derive(Default)]
pub(super) struct IdleTrim {
    /// The thread has run a task since the last check.
    ran: Cell<bool>,
    /// Time of the next check. The thread is active, and included in [`ACTIVE`], while this field is set.
    next_check: Cell<Option<Duration>>,
}

impl IdleTrim {
    /// Records that the thread runs a task.
    pub(super) fn note(&self) {
        self.ran.set(true);
    }

    /// The latest time at which the thread must wake; `None` if there is no such time. The thread calls this function
    /// before it sleeps.
    pub(super) fn deadline(&self) -> Option<Duration> {
        if self.next_check.get().is_none() && self.ran.get() {
            ACTIVE.fetch_add(1, Ordering::Relaxed);
            self.next_check.set(Some(real_now().saturating_add(IDLE_AFTER)));
        }
        self.next_check.get()
    }

    /// Checks whether the thread is idle. The thread calls this function after it has slept.
    pub(super) fn slept(&self) {
        let Some(next_check) = self.next_check.get() else { return };
        let now = real_now();
        if now < next_check {
            return;
        }
        if self.ran.replace(false) {
            self.next_check.set(Some(now.saturating_add(IDLE_AFTER)));
            return;
        }
        trim_thread();
        if self.become_idle() {
            trim_shared();
        }
    }

    /// Marks the thread as idle. Returns true if it was the only active thread.
    fn become_idle(&self) -> bool {
        self.next_check.take().is_some() && ACTIVE.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for IdleTrim {
    fn drop(&mut self) {
        self.become_idle();
    }
}
