//! [`Subscription`]: a bounded queue of events for one reader.
//!
//! Raising an event never waits for a reader. If the queue is full, new events are dropped and counted; the reader gets the count
//! in their place ([`Notice::Lost`]). A reader that gets a count reads the state again: everything that an event about a backend
//! or a threshold reports is also a state ([`Backend::io_status`](crate::Backend::io_status), `device`, `size`, `node`,
//! [`Node::write_threshold`](crate::Node::write_threshold)). So a slow reader misses no condition that still exists.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BlockEvent, Events, Listening};

/// An entry of the queue of a [`Subscription`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// An event.
    Event(BlockEvent),
    /// This number of events was dropped, because the queue was full.
    Lost(u64),
}

#[derive(Debug)]
struct Queue {
    notices: Mutex<VecDeque<Notice>>,
    /// Maximum number of events in the queue. One count of lost events may follow them.
    capacity: usize,
    filled: oxblk_ring::Event,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Notice>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: &BlockEvent) {
        let mut notices = self.lock();
        // Events after a count would appear to be older than they are, so the count stays last until it is taken.
        if let Some(Notice::Lost(count)) = notices.back_mut() {
            *count = count.saturating_add(1);
        } else if notices.len() < self.capacity {
            notices.push_back(Notice::Event(event.clone()));
        } else {
            notices.push_back(Notice::Lost(1));
        }
        drop(notices);
        self.filled.notify(usize::MAX);
    }
}

/// The events of a graph in a bounded queue, in the order in which they were raised. Dropping this value ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    queue: Arc<Queue>,
    _listening: Listening,
}

impl Events {
    /// Collects the events that `wants` accepts in a queue of at most `capacity` events (at least 1). `wants` is called on I/O
    /// threads, so it must not block.
    #[must_use]
    pub fn subscribe(
        &self,
        capacity: usize,
        wants: impl Fn(&BlockEvent) -> bool + Send + Sync + 'static,
    ) -> Subscription {
        let (notices, filled) = (Mutex::default(), oxblk_ring::Event::new());
        let queue = Arc::new(Queue { notices, capacity: capacity.max(1), filled });
        let to = Arc::clone(&queue);
        let listening = self.listen(move |event| {
            if wants(event) {
                to.push(event);
            }
        });
        Subscription { queue, _listening: listening }
    }
}

impl Subscription {
    /// Takes the next entry of the queue. `None`: the queue is empty.
    pub fn try_next(&self) -> Option<Notice> {
        self.queue.lock().pop_front()
    }

    /// Waits for the next entry of the queue and takes it.
    pub async fn next(&self) -> Notice {
        loop {
            let filled = self.queue.filled.listen();
            if let Some(notice) = self.try_next() {
                return notice;
            }
            filled.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(sector_num: u64) -> BlockEvent {
        BlockEvent::QuorumFailure { reference: "q".to_owned(), sector_num, sectors_count: 1 }
    }

    #[test]
    fn a_full_queue_counts_the_events_that_it_drops() {
        let events = Events::default();
        let subscription = events.subscribe(2, |_| true);
        (1..=5).for_each(|number| events.raise(&event(number)));
        let expected = [Notice::Event(event(1)), Notice::Event(event(2)), Notice::Lost(3)];
        assert_eq!(subscription.try_next().as_ref(), expected.first());
        // The count stays last, although there is room again.
        events.raise(&event(6));
        assert_eq!(subscription.try_next().as_ref(), expected.get(1));
        assert_eq!(subscription.try_next(), Some(Notice::Lost(4)));
        events.raise(&event(7));
        assert_eq!(subscription.try_next(), Some(Notice::Event(event(7))));
        assert_eq!(subscription.try_next(), None);
    }

    #[test]
    fn a_subscription_gets_only_the_events_that_it_wants() {
        let events = Events::default();
        let subscription = events
            .subscribe(9, |event| matches!(event, BlockEvent::QuorumFailure { sector_num: 2, .. }));
        (1..=3).for_each(|number| events.raise(&event(number)));
        assert_eq!(subscription.try_next(), Some(Notice::Event(event(2))));
        assert_eq!(subscription.try_next(), None);
    }

    #[test]
    fn a_reader_that_waits_gets_an_event_of_another_thread() {
        let events = Events::default();
        let subscription = events.subscribe(1, |_| true);
        std::thread::scope(|scope| {
            scope.spawn(|| events.raise(&event(1)));
            assert_eq!(oxblk_ring::block_on(subscription.next()), Notice::Event(event(1)));
        });
    }
}
