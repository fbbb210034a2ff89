//! A stack to which all threads push elements. Its owner takes all elements with one atomic operation.
//!
//! Elements are never popped one by one, so no thread ever follows a stale link (the ABA problem). Everything that a
//! thread did to an element before pushing it is visible to the thread that takes it.

use std::ptr::{self, NonNull};

use super::atomics::{AtomicPtr, Ordering};

/// An element that contains a link to the next element. The link has no meaning while the element is not in a stack.
pub(super) trait Linked: Sized {
    fn link(&self) -> &AtomicPtr<Self>;
}

/// A stack that all threads may push to, and that one thread empties. The stack does not own its elements.
pub(super) struct Returned<T> {
    head: AtomicPtr<T>,
}

impl<T: Linked> Returned<T> {
    pub(super) fn new() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Pushes an element.
    ///
    /// # Safety
    /// The element is in no stack, nobody else uses its link, and the element stays valid until it is taken.
    pub(super) unsafe fn put(&self, element: NonNull<T>) {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: valid by the caller's promise, and nobody else uses it until the exchange publishes it.
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
            // SAFETY: the pusher promised that the element is valid until it is taken. After the swap, all elements
            // belong to this call. The link is read before the element is passed to `each`.
            next = unsafe { element.as_ref() }.link().load(Ordering::Relaxed);
            each(element);
        }
    }
}
