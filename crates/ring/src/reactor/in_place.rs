//! Which transfers of files in memory (tmpfs) a thread carries out itself, on the spot.
//!
//! The kernel cannot complete a transfer of tmpfs without blocking in principle, so io_uring hands each one to a worker
//! thread, which costs several times what copying a few pages does. Small transfers are therefore carried out at once. Long
//! ones are worth a worker: it copies while this thread goes on. A thread that copies in bulk is better off to move long
//! ones itself too ([`transfer_in_place`]): then the data is in the caches of the core that goes on with it.

use std::marker::PhantomData;
use std::rc::Rc;

use crate::runtime::local::try_with;

/// What is carried out on the spot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spot {
    /// The longest transfer, in bytes.
    pub(super) longest: usize,
    /// Bytes in one turn before tasks must let others run.
    pub(super) budget: usize,
    /// How many ask for long ones.
    holders: u32,
}

/// What holds where nothing else is asked for.
pub(super) const ORDINARY: Spot = Spot { longest: 16 << 10, budget: 1 << 20, holders: 0 };

/// What a transfer counts for at least, in bytes: the call costs as much as moving this much.
pub(super) const LEAST_MOVED: usize = 16 << 10;

/// Bytes in one turn of a thread that transfers in place: some hundreds of microseconds.
const BUDGET: usize = 4 << 20;

impl Spot {
    /// One more asks for transfers of up to `longest` bytes.
    fn hold(self, longest: usize) -> Spot {
        Spot {
            longest: self.longest.max(longest),
            budget: self.budget.max(longest).max(BUDGET),
            holders: self.holders.saturating_add(1),
        }
    }

    /// One of them is gone.
    fn release(self) -> Spot {
        match self.holders.saturating_sub(1) {
            0 => ORDINARY,
            holders => Spot { holders, ..self },
        }
    }
}

/// Has the calling I/O thread carry out transfers of files in memory (tmpfs) of up to `longest` bytes itself until the
/// guard is dropped, rather than hand them to the kernel's workers.
///
/// For threads that copy or compare in bulk. Off an I/O thread it does nothing.
pub fn transfer_in_place(longest: usize) -> InPlace {
    let held = try_with(|local| local.reactor.change_spot(|spot| spot.hold(longest))).is_some();
    InPlace { held, thread: PhantomData }
}

/// Ends what [`transfer_in_place`] began. It belongs to its thread.
#[derive(Debug)]
pub struct InPlace {
    held: bool,
    thread: PhantomData<Rc<()>>,
}

impl Drop for InPlace {
    fn drop(&mut self) {
        if self.held {
            let _ = try_with(|local| local.reactor.change_spot(Spot::release));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ordinary_way_comes_back_when_the_last_holder_is_gone() {
        let two = ORDINARY.hold(1 << 18).hold(1 << 19);
        assert_eq!((two.longest, two.release().longest), (1 << 19, 1 << 19));
        assert_eq!(two.release().release().longest, ORDINARY.longest);
    }
}
