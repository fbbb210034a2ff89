//! Frees cached memory when the process is idle.
//!
//! Freed buffers are kept for reuse. A thread that has run nothing for [`IDLE_AFTER`] frees the buffers that it keeps for
//! itself. The last thread of the process to become idle also frees the shared caches and makes the allocator return
//! its free pages to the system.
//!
//! A busy thread only sets a flag; it reads the clock when it is about to sleep anyway. Once a thread is idle, only
//! work wakes it.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::timer::real_now;
use crate::buf::{trim_shared, trim_thread};

/// How long a thread must run nothing before it counts as idle.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// Number of threads that are not idle.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// The idle detection of one thread.
#[derive(Default)]
pub(super) struct IdleTrim {
    /// The thread has run something since the last check.
    ran: Cell<bool>,
    /// Time of the next check. The thread counts as active while this is set.
    next_check: Cell<Option<Duration>>,
}

impl IdleTrim {
    /// Records that the thread runs something.
    pub(super) fn note(&self) {
        self.ran.set(true);
    }

    /// The latest time at which the thread, which is about to sleep, must wake.
    pub(super) fn deadline(&self) -> Option<Duration> {
        if self.next_check.get().is_none() && self.ran.get() {
            ACTIVE.fetch_add(1, Ordering::Relaxed);
            self.next_check.set(Some(real_now().saturating_add(IDLE_AFTER)));
        }
        self.next_check.get()
    }

    /// Checks, after the thread has slept, whether it is idle.
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

    /// Marks the thread as idle. Returns whether all threads are idle now.
    fn become_idle(&self) -> bool {
        self.next_check.take().is_some() && ACTIVE.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for IdleTrim {
    fn drop(&mut self) {
        self.become_idle();
    }
}
