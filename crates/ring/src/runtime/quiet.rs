//! Giving memory back when there is nothing to do.
//!
//! Freed buffers are kept for reuse. A thread that has run nothing for [`QUIET`] gives up those that it keeps for
//! itself, and the last thread of the process to fall quiet gives up those that all share and has the allocator return
//! its free pages to the system.
//!
//! A thread at work only notes that it is; the clock is looked at when it goes to sleep anyway. Once a thread has
//! fallen quiet, nothing wakes it but work.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::timer::real_now;
use crate::buf::{trim_shared, trim_thread};

/// How long nothing must have happened.
const QUIET: Duration = Duration::from_secs(1);

/// How many threads have not fallen quiet.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// Whether the thread has something to do.
#[derive(Default)]
pub(super) struct Quiet {
    /// Something was run since the last look.
    ran: Cell<bool>,
    /// When to look next; the thread counts as active while there is such a time.
    look_at: Cell<Option<Duration>>,
}

impl Quiet {
    /// Something is run.
    pub(super) fn note(&self) {
        self.ran.set(true);
    }

    /// When the thread, which is about to sleep, must wake at the latest.
    pub(super) fn deadline(&self) -> Option<Duration> {
        if self.look_at.get().is_none() && self.ran.get() {
            ACTIVE.fetch_add(1, Ordering::Relaxed);
            self.look_at.set(Some(real_now().saturating_add(QUIET)));
        }
        self.look_at.get()
    }

    /// The thread has slept.
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

    /// Returns whether all threads are quiet now.
    fn fall_quiet(&self) -> bool {
        self.look_at.take().is_some() && ACTIVE.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.fall_quiet();
    }
}
