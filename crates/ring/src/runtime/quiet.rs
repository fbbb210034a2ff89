//! Frees cached memory when the process is idle.
//!
//! Freed buffers are kept for reuse. A thread that has run nothing for [`QUIET`] frees the buffers that it keeps for
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
const QUIET: Duration = Duration::from_secs(1);

/// Number of threads that are not idle.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// The idle detection of one thread.
#[derive(Default)]
pub(super) struct Quiet {
    /// The thread has run something since the last check.
    ran: Cell<bool>,
    /// Time of the next check. The thread counts as active while this is set.
    look_at: Cell<Option<Duration>>,
}

impl Quiet {
    /// Records that the thread runs something.
    pub(super) fn note(&self) {
        self.ran.set(true);
    }

    /// The latest time at which the thread, which is about to sleep, must wake.
    pub(super) fn deadline(&self) -> Option<Duration> {
        if self.look_at.get().is_none() && self.ran.get() {
            ACTIVE.fetch_add(1, Ordering::Relaxed);
            self.look_at.set(Some(real_now().saturating_add(QUIET)));
        }
        self.look_at.get()
    }

    /// Checks, after the thread has slept, whether it is idle.
    pub(super) fn slept(&self) {
        let Some(look_at) = self.look_at.get() else { return };
        let now = real_now();
        if now < look_at {
            return;
        }
        if self.ran.replace(false) {
            self.look_at.set(Some(now.saturating_add(QUIET)));
            return;
        }
        trim_thread();
        if self.fall_quiet() {
            trim_shared();
        }
    }

    /// Marks the thread as idle. Returns whether all threads are idle now.
    fn fall_quiet(&self) -> bool {
        self.look_at.take().is_some() && ACTIVE.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.fall_quiet();
    }
}
