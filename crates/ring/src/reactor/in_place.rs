//! Decides which transfers of files in memory (tmpfs) a thread executes itself, inline.
//!
//! The kernel cannot guarantee that a transfer on tmpfs does not block, so io_uring hands each one to a worker
//! thread, which costs several times as much as copying a few pages. Small transfers are therefore executed inline. A
//! long transfer is worth a worker: the worker copies while this thread continues. A thread that copies in bulk
//! should execute long transfers inline as well ([`transfer_in_place`]): then the data is in the caches of the core
//! that processes it.

use std::marker::PhantomData;
use std::rc::Rc;

use crate::runtime::local::try_with;

/// Limits of the transfers that are executed inline.
#[derive(Clone, Copy, Debug)]
pub(super) struct InlineLimits {
    /// The longest transfer, in bytes.
    pub(super) longest: usize,
    /// Bytes in one turn of the loop, after which a task must let others run.
    pub(super) budget: usize,
    /// Number of guards that ask for long transfers inline.
    holders: u32,
}

/// The limits without any guard.
pub(super) const DEFAULT_LIMITS: InlineLimits =
    InlineLimits { longest: 16 << 10, budget: 1 << 20, holders: 0 };

/// The least number of bytes for which a transfer counts: the call itself costs as much as copying this many.
pub(super) const LEAST_MOVED: usize = 16 << 10;

/// Bytes in one turn of a thread that holds a guard: some hundreds of microseconds.
const BUDGET: usize = 4 << 20;

impl InlineLimits {
    /// Adds a guard that asks for transfers of up to `longest` bytes.
    fn hold(self, longest: usize) -> InlineLimits {
        InlineLimits {
            longest: self.longest.max(longest),
            budget: self.budget.max(longest).max(BUDGET),
            holders: self.holders.saturating_add(1),
        }
    }

    /// Removes a guard.
    fn release(self) -> InlineLimits {
        match self.holders.saturating_sub(1) {
            0 => DEFAULT_LIMITS,
            holders => InlineLimits { holders, ..self },
        }
    }
}

/// Makes the calling I/O thread execute transfers of files in memory (tmpfs) of up to `longest` bytes itself until
/// the guard is dropped, instead of handing them to the kernel's workers.
///
/// For threads that copy or compare in bulk. On other threads than I/O threads it has no effect.
pub fn transfer_in_place(longest: usize) -> InPlace {
    let held = try_with(|local| local.reactor.change_inline_limits(|limits| limits.hold(longest)))
        .is_some();
    InPlace { held, thread: PhantomData }
}

/// Guard of [`transfer_in_place`]; dropping it ends the effect. It cannot leave its thread.
#[derive(Debug)]
pub struct InPlace {
    held: bool,
    thread: PhantomData<Rc<()>>,
}

impl Drop for InPlace {
    fn drop(&mut self) {
        if self.held {
            let _ = try_with(|local| local.reactor.change_inline_limits(InlineLimits::release));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_limits_return_when_the_last_guard_is_dropped() {
        let two = DEFAULT_LIMITS.hold(1 << 18).hold(1 << 19);
        assert_eq!((two.longest, two.release().longest), (1 << 19, 1 << 19));
        assert_eq!(two.release().release().longest, DEFAULT_LIMITS.longest);
    }
}
