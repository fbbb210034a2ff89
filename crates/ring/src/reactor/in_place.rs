//! Decides which reads and writes of files on tmpfs a thread executes inline.
//!
//! The kernel cannot guarantee that a transfer on tmpfs does not block, so io_uring passes each transfer to a kernel
//! worker. This costs several times as much as copying a few pages. Therefore small transfers are executed inline,
//! unless many tasks are ready on the thread. Long transfers are passed to a worker, which copies while this thread
//! continues. A thread that copies in bulk should also execute long transfers inline ([`transfer_in_place`]), so that
//! the data is in the caches of the core that processes it.

use std::marker::PhantomData;
use std::rc::Rc;

use crate::runtime::local::try_with;

/// Limits of the transfers that are executed inline.
#[derive(Clone, Copy, Debug)]
pub(super) struct InlineLimits {
    /// The longest transfer, in bytes.
    pub(super) longest: usize,
    /// Number of bytes to transfer inline in one iteration of the loop. The future of each transfer above this number yields
    /// once to other tasks.
    pub(super) budget: usize,
    /// Number of [`InPlace`] guards that exist.
    holders: u32,
}

/// The limits without a guard.
pub(super) const DEFAULT_LIMITS: InlineLimits =
    InlineLimits { longest: 16 << 10, budget: 1 << 20, holders: 0 };

/// A shorter transfer counts as this number of bytes against the budget, because the system call itself costs as much
/// as copying this number of bytes.
pub(super) const MIN_MOVED: usize = 16 << 10;

/// Minimum value of `budget` on a thread with a guard, in bytes. To transfer this number of bytes takes some hundreds of
/// microseconds.
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

/// Makes the calling I/O thread execute reads and writes of up to `longest` bytes on tmpfs inline until the guard is
/// dropped, instead of passing them to kernel workers. If the thread has several guards, the highest limit applies
/// until the last guard is dropped.
///
/// This is useful for threads that copy or compare in bulk. It has no effect if the caller is not on an I/O thread.
pub fn transfer_in_place(longest: usize) -> InPlace {
    let held = try_with(|local| local.reactor.change_inline_limits(|limits| limits.hold(longest)))
        .is_some();
    InPlace { held, thread: PhantomData }
}

/// Guard of [`transfer_in_place`]. Dropping the last guard of a thread ends the effect. A guard cannot be sent to
/// another thread.
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
