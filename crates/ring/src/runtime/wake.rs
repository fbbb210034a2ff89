//! The lock-free mailbox of an I/O thread and the flag that says it sleeps.
//!
//! Many threads push, one takes everything at once. Before it blocks, the owner announces that it sleeps and looks
//! again; a pusher first publishes its message and then looks at the flag. Both do so with a sequentially consistent fence in
//! between, so that at least one of them sees the other: either the owner finds the message, or the pusher finds the
//! flag and is told to ring the bell (exactly one pusher is). No wake-up is lost and none is paid for while the owner is awake.

use std::ptr;

use super::atomics::{AtomicBool, AtomicPtr, Ordering, fence};

struct Node<T> {
    value: T,
    next: *mut Node<T>,
}

/// A multi-producer mailbox whose single owner takes everything at once.
pub(crate) struct Mailbox<T> {
    head: AtomicPtr<Node<T>>,
    sleeping: AtomicBool,
}

// SAFETY: nodes are reached only through the atomic head; whoever swaps the head out owns the chain.
unsafe impl<T: Send> Send for Mailbox<T> {}
// SAFETY: as above; a shared mailbox only moves whole `T`s between threads.
unsafe impl<T: Send> Sync for Mailbox<T> {}

impl<T> Mailbox<T> {
    pub(crate) fn new() -> Self {
        Mailbox { head: AtomicPtr::new(ptr::null_mut()), sleeping: AtomicBool::new(false) }
    }

    /// Leaves a message. True when the owner sleeps and the caller must ring its bell.
    #[must_use]
    pub(crate) fn push(&self, value: T) -> bool {
        let node = Box::into_raw(Box::new(Node { value, next: ptr::null_mut() }));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: the node is ours until the exchange publishes it.
            unsafe { (*node).next = head };
            match self.head.compare_exchange(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => head = seen,
            }
        }
        self.must_ring()
    }

    /// Whether the owner sleeps and the caller is the one to wake it. To be called after publishing what it should see.
    #[must_use]
    pub(crate) fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed)
            && self
                .sleeping
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// Owner: takes all messages and hands them over in the order of their arrival.
    pub(crate) fn drain(&self, mut each: impl FnMut(T)) {
        if self.is_empty() {
            return;
        }
        let mut newest = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        let mut oldest: *mut Node<T> = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: after the swap the chain is ours.
            let next = unsafe { std::mem::replace(&mut (*newest).next, oldest) };
            oldest = newest;
            newest = next;
        }
        while !oldest.is_null() {
            // SAFETY: each node came from `Box::into_raw` and is visited once.
            let node = unsafe { Box::from_raw(oldest) };
            oldest = node.next;
            each(node.value);
        }
    }

    /// Owner: whether there is no message.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// Owner: announces sleep. False when there is something to do after all.
    #[must_use]
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return true;
        }
        self.awake();
        false
    }

    /// Owner: takes the announcement back.
    pub(crate) fn awake(&self) {
        self.sleeping.swap(false, Ordering::AcqRel);
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        self.drain(drop);
    }
}
