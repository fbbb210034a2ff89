//! Locks on ranges of numbers (bytes, clusters).
//!
//! Requests are queued in the order of their arrival. A request is granted as soon as no earlier request in the
//! queue, granted or waiting, conflicts with it. Two requests conflict if they overlap and are not both shared. So
//! conflicting requests are granted in the order of their arrival, and a request does not wait for later requests.
//! When a guard is dropped or a request is cancelled, its entry leaves the queue. The waiting requests that then have
//! no conflict are granted and woken.
//!
//! The functions of a waker (clone, wake-up, destructor) are code of other modules and may use the lock again. So these
//! functions are called only while the queue is unlocked.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::atomics::{Mutex, lock};
use crate::runtime::foreign::contained;

struct Entry {
    ticket: u64,
    range: Range<u64>,
    shared: bool,
    granted: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn conflicts(&self, range: &Range<u64>, shared: bool) -> bool {
        !(self.shared && shared)
            && self.range.start.max(range.start) < self.range.end.min(range.end)
    }
}

#[derive(Default)]
struct Queue {
    entries: Vec<Entry>,
    next_ticket: u64,
    waiting: usize,
}

impl Queue {
    /// Adds a request. Takes `waker` if the request must wait.
    fn join(&mut self, range: Range<u64>, shared: bool, waker: &mut Option<Waker>) -> (u64, bool) {
        let granted = !self.entries.iter().any(|e| e.conflicts(&range, shared));
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting += usize::from(!granted);
        let waker = if granted { None } else { waker.take() };
        self.entries.push(Entry { ticket, range, shared, granted, waker });
        (ticket, granted)
    }

    fn position(&self, ticket: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&ticket, |e| e.ticket).ok()
    }

    /// Removes a request. Returns the request, and the wakers of the requests that are granted as a result.
    fn leave(&mut self, ticket: u64) -> Option<(Entry, Vec<Waker>)> {
        let at = self.position(ticket)?;
        let gone = self.entries.remove(at);
        self.waiting -= usize::from(!gone.granted);
        let mut wakers = Vec::new();
        if self.waiting == 0 {
            return Some((gone, wakers));
        }
        for i in at..self.entries.len() {
            let (earlier, later) = self.entries.split_at_mut(i);
            let Some(entry) = later.first_mut() else { break };
            if entry.granted || !gone.conflicts(&entry.range, entry.shared) {
                continue;
            }
            if !earlier.iter().any(|e| e.conflicts(&entry.range, entry.shared)) {
                entry.granted = true;
                self.waiting -= 1;
                wakers.extend(entry.waker.take());
            }
        }
        Some((gone, wakers))
    }
}

/// A fair lock on ranges, for exclusive or shared use. It works across threads and executors.
#[derive(Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
}

impl RangeLock {
    /// Creates a lock that nobody holds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits for exclusive use of a range. An empty range conflicts with nothing.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        Acquire { lock: self, request: Some((range, false)), ticket: None }.await
    }

    /// Waits for shared use of a range.
    pub async fn lock_shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        Acquire { lock: self, request: Some((range, true)), ticket: None }.await
    }

    /// Takes exclusive use of a range if no other request holds or waits for a part of it.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        self.try_acquire(range, false)
    }

    /// Takes shared use of a range if no exclusive request holds or waits for a part of it.
    pub fn try_lock_shared(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        self.try_acquire(range, true)
    }

    fn try_acquire(&self, range: Range<u64>, shared: bool) -> Option<RangeGuard<'_>> {
        let mut queue = lock(&self.queue);
        if queue.entries.iter().any(|e| e.conflicts(&range, shared)) {
            return None;
        }
        let (ticket, _) = queue.join(range, shared, &mut None);
        Some(RangeGuard { lock: self, ticket })
    }

    /// Whether no range is locked and no request waits.
    pub fn is_idle(&self) -> bool {
        lock(&self.queue).entries.is_empty()
    }

    fn leave(&self, ticket: u64) {
        let left = lock(&self.queue).leave(ticket);
        crate::perturb::point();
        let Some((gone, wakers)) = left else { return };
        // If a waker panics, the other requests are still woken.
        for waker in wakers {
            contained(|| waker.wake());
        }
        contained(|| drop(gone));
    }
}

impl std::fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RangeLock").finish_non_exhaustive()
    }
}

/// Exclusive or shared use of a range. Dropping the guard ends the use.
#[must_use = "the range is released at once when the guard is not kept"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl std::fmt::Debug for RangeGuard<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RangeGuard").finish_non_exhaustive()
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.leave(self.ticket);
    }
}

/// A request, which enters the queue at its first poll.
struct Acquire<'a> {
    lock: &'a RangeLock,
    request: Option<(Range<u64>, bool)>,
    ticket: Option<u64>,
}

impl<'a> Future for Acquire<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let mut waker = Some(cx.waker().clone());
        let mut queue = lock(&self.lock.queue);
        let (ticket, granted) = match (self.request.take(), self.ticket) {
            (Some((range, shared)), _) => queue.join(range, shared, &mut waker),
            (None, Some(ticket)) => {
                let entry = queue.position(ticket).and_then(|at| queue.entries.get_mut(at));
                let granted = entry.is_none_or(|entry| {
                    if !entry.granted {
                        std::mem::swap(&mut entry.waker, &mut waker);
                    }
                    entry.granted
                });
                (ticket, granted)
            }
            (None, None) => panic!("polled after completion"),
        };
        drop(queue);
        // The ticket is stored first: if the destructor of the waker panics, the request still leaves the queue.
        self.ticket = Some(ticket);
        drop(waker);
        if granted {
            self.ticket = None;
            return Poll::Ready(RangeGuard { lock: self.lock, ticket });
        }
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.lock.leave(ticket);
        }
    }
}
