//! The lock-free mailbox of an I/O thread and the flag that says it sleeps.
//!
//! Many threads push, one takes everything at once. Before it blocks, the owner announces that it sleeps and looks
//! again; a pusher first publishes its message and then looks at the flag. Both do so with a sequentially consistent fence in
//! between, so that at least one of them sees the other: either the owner finds the message, or the pusher finds the
//! flag and is told to ring the bell (exactly one pusher is). No wake-up is lost and none is paid for while the owner is awake.
//!
//! An owner that ends [closes](Mailbox::close) its mailbox: the head then is a mark that no exchange replaces, and a pusher
//! that finds it gets its message back. Closing and taking the last messages is one swap, so that each message is either
//! handed to the owner or given back, and never lies in a mailbox that nobody looks into.

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
    ///
    /// # Errors
    /// Gives the message back when the mailbox is closed.
    pub(crate) fn push(&self, value: T) -> Result<bool, T> {
        let node = Box::into_raw(Box::new(Node { value, next: ptr::null_mut() }));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head == closed() {
                // SAFETY: made above, and no exchange has published it.
                return Err(unsafe { Box::from_raw(node) }.value);
            }
            // SAFETY: the node is ours until the exchange publishes it.
            unsafe { (*node).next = head };
            crate::perturb::point();
            match self.head.compare_exchange(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => head = seen,
            }
        }
        crate::perturb::point();
        Ok(self.must_ring())
    }

    /// Whether the owner sleeps and the caller is the one to wake it. To be called after publishing what it should see.
    #[must_use]
    pub(crate) fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        crate::perturb::point();
        self.sleeping.load(Ordering::Relaxed)
            && self
                .sleeping
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// Owner: takes all messages, in the order of their arrival.
    pub(crate) fn take(&self) -> Mail<T> {
        if self.is_empty() {
            return Mail { oldest: ptr::null_mut() };
        }
        Mail::of(self.head.swap(ptr::null_mut(), Ordering::Acquire))
    }

    /// Owner: takes the last messages; whoever pushes from now on gets the message back. The owner calls nothing else
    /// afterwards.
    pub(crate) fn close(&self) -> Mail<T> {
        Mail::of(self.head.swap(closed(), Ordering::Acquire))
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
        crate::perturb::point();
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
        drop(self.close());
    }
}

/// The head of a mailbox that is closed: an address at which no node lies.
fn closed<T>() -> *mut Node<T> {
    ptr::without_provenance_mut(1)
}

/// Messages that were taken. What is not asked for is dropped with it, also when one that was asked for panics.
pub(crate) struct Mail<T> {
    oldest: *mut Node<T>,
}

impl<T> Mail<T> {
    /// The messages of a chain that begins with the newest.
    fn of(mut newest: *mut Node<T>) -> Mail<T> {
        let mut oldest: *mut Node<T> = ptr::null_mut();
        while !newest.is_null() && newest != closed() {
            // SAFETY: the chain was swapped out of the head, and is ours.
            let next = unsafe { std::mem::replace(&mut (*newest).next, oldest) };
            oldest = newest;
            newest = next;
        }
        Mail { oldest }
    }
}

impl<T> Iterator for Mail<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.oldest.is_null() {
            return None;
        }
        // SAFETY: each node came from `Box::into_raw`, belongs to this chain and is visited once.
        let node = unsafe { Box::from_raw(self.oldest) };
        self.oldest = node.next;
        Some(node.value)
    }
}

impl<T> Drop for Mail<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
