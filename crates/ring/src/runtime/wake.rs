//! The lock-free mailbox of an I/O thread, with the flag that marks the thread as asleep.
//!
//! Many threads push messages. The owner takes all messages with one atomic operation. Before the owner blocks, it
//! sets the sleep flag and then checks the mailbox again. A pusher publishes its message and then reads the flag. The
//! owner and the pusher have a sequentially consistent fence between their two steps. So either the owner finds the
//! message, or the pusher finds the flag set. Of the pushers that find the flag set, only the pusher that clears the flag
//! must ring the bell. No wake-up is lost, and a push to an owner that is awake needs no system call.
//!
//! When the owner ends, it [closes](Mailbox::close) the mailbox: the head then contains a mark that no exchange
//! replaces. A pusher that finds the mark gets its message back. One swap closes the mailbox and takes the last
//! messages. So each message is either taken by the owner or returned to its pusher.

use std::ptr;

use super::atomics::{AtomicBool, AtomicPtr, Ordering, fence};

struct Node<T> {
    value: T,
    next: *mut Node<T>,
}

/// A mailbox with many producers and one owner, which takes all messages together.
pub(crate) struct Mailbox<T> {
    head: AtomicPtr<Node<T>>,
    sleeping: AtomicBool,
}

// SAFETY: nodes are reached only through the atomic head. The thread that swaps the head out owns the chain.
unsafe impl<T: Send> Send for Mailbox<T> {}
// SAFETY: as above; a shared mailbox only moves whole `T`s between threads.
unsafe impl<T: Send> Sync for Mailbox<T> {}

impl<T> Mailbox<T> {
    pub(crate) fn new() -> Self {
        Mailbox { head: AtomicPtr::new(ptr::null_mut()), sleeping: AtomicBool::new(false) }
    }

    /// Pushes a message. Returns true if the owner sleeps and the caller must ring its bell.
    ///
    /// # Errors
    /// Returns the message if the mailbox is closed.
    pub(crate) fn push(&self, value: T) -> Result<bool, T> {
        let node = Box::into_raw(Box::new(Node { value, next: ptr::null_mut() }));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head == closed() {
                // SAFETY: the node was made above, and no exchange has published it.
                return Err(unsafe { Box::from_raw(node) }.value);
            }
            // SAFETY: only this thread has the node until the exchange publishes it.
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

    /// Whether the owner sleeps and the caller must wake the owner. The caller must first publish the data that the
    /// owner should see.
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

    /// Owner: closes the mailbox and takes the last messages. Pushers get their messages back from now on. The owner
    /// makes no other call afterwards.
    pub(crate) fn close(&self) -> Mail<T> {
        Mail::of(self.head.swap(closed(), Ordering::Acquire))
    }

    /// Owner: whether the mailbox is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// Owner: sets the sleep flag. Returns false, and clears the flag, if there is a message.
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

    /// Owner: clears the sleep flag.
    pub(crate) fn awake(&self) {
        self.sleeping.swap(false, Ordering::AcqRel);
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        drop(self.close());
    }
}

/// The head of a closed mailbox: an address that no node has.
fn closed<T>() -> *mut Node<T> {
    ptr::without_provenance_mut(1)
}

/// A list of messages that were taken from the mailbox. Dropping the list drops the remaining messages, also after a
/// panic in the handling of a message.
pub(crate) struct Mail<T> {
    oldest: *mut Node<T>,
}

impl<T> Mail<T> {
    /// Builds the list from a chain that begins with the newest message.
    fn of(mut newest: *mut Node<T>) -> Mail<T> {
        let mut oldest: *mut Node<T> = ptr::null_mut();
        while !newest.is_null() && newest != closed() {
            // SAFETY: the chain was swapped out of the head, so no other thread has it.
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
        // SAFETY: each node comes from `Box::into_raw`, belongs to this chain and is visited once.
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
