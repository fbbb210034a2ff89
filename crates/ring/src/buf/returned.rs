//! A stack onto which any thread puts what its owner then takes, all at once.
//!
//! Nothing is ever taken off alone, so that there is no moment at which a stale link could be believed. Whatever a thread did
//! to an element before putting it there is visible to the one that takes it.

use std::ptr::{self, NonNull};

use super::atomics::{AtomicPtr, Ordering};

/// Something with room for a link, which means nothing while it is not in a stack.
pub(super) trait Linked: Sized {
    fn link(&self) -> &AtomicPtr<Self>;
}

/// A stack of elements that it does not own.
pub(super) struct Returned<T> {
    head: AtomicPtr<T>,
}

impl<T: Linked> Returned<T> {
    pub(super) fn new() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Puts an element there.
    ///
    /// # Safety
    /// The element is valid until it has been taken, is in no stack, and nobody else uses its link.
    pub(super) unsafe fn put(&self, element: NonNull<T>) {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: valid by the caller's promise, and ours until the exchange publishes it.
            unsafe { element.as_ref() }.link().store(head, Ordering::Relaxed);
            crate::perturb::point();
            match self.head.compare_exchange_weak(
                head,
                element.as_ptr(),
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }

    /// Takes all elements, the newest first.
    pub(super) fn take(&self, mut each: impl FnMut(NonNull<T>)) {
        let mut next = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        while let Some(element) = NonNull::new(next) {
            // SAFETY: who put it there promised that it is valid until it is taken, which is here: the whole stack is ours
            // after the swap. Its link is read before it is handed over.
            next = unsafe { element.as_ref() }.link().load(Ordering::Relaxed);
            each(element);
        }
    }
}
