//! Events: conditions that drivers report to the users of a graph, for example a child with wrong data.
//!
//! A driver raises an event while it handles a request, on the thread of this request. So a listener must not block. If nobody
//! listens, the log reports the event.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A type of operation of the driver `quorum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuorumOperation {
    /// A read.
    Read,
    /// A write or a zero write.
    Write,
    /// A flush.
    Flush,
}

impl QuorumOperation {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// An event. The names of the fields are those of QEMU's events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockEvent {
    /// Too few children of a quorum agree (`QUORUM_FAILURE`).
    QuorumFailure {
        /// The name of the quorum node.
        reference: String,
        /// The first sector of the request.
        sector_num: u64,
        /// The number of sectors of the request.
        sectors_count: u64,
    },
    /// A child of a quorum has failed or has wrong data (`QUORUM_REPORT_BAD`).
    QuorumReportBad {
        /// The type of the operation.
        operation: QuorumOperation,
        /// The error of the child. `None`: the data of the child differs.
        error: Option<String>,
        /// The name of the child node.
        node_name: String,
        /// The first sector of the request.
        sector_num: u64,
        /// The number of sectors of the request.
        sectors_count: u64,
    },
}

impl fmt::Display for BlockEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QuorumFailure { reference, sector_num, sectors_count } => write!(
                f,
                "too few children of quorum '{reference}' agree on {sectors_count} sectors at sector {sector_num}"
            ),
            Self::QuorumReportBad { operation, error, node_name, sector_num, sectors_count } => {
                let name = operation.name();
                write!(f, "{name} of {sectors_count} sectors at sector {sector_num}: ")?;
                match error {
                    Some(error) => write!(f, "child '{node_name}' of a quorum failed: {error}"),
                    None => write!(f, "child '{node_name}' of a quorum has other data"),
                }
            }
        }
    }
}

type Listener = Arc<dyn Fn(&BlockEvent) + Send + Sync>;

#[derive(Default)]
struct Listeners {
    list: Vec<(u64, Listener)>,
    next: u64,
}

/// The events of a graph. Clones refer to the same listeners.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Listeners>>);

impl Events {
    /// Calls `listener` for each event, until the returned value is dropped. The listener is called on I/O threads, so it must not
    /// block.
    #[must_use]
    pub fn listen(&self, listener: impl Fn(&BlockEvent) + Send + Sync + 'static) -> Listening {
        let mut listeners = self.lock();
        let id = listeners.next;
        listeners.next = id.wrapping_add(1);
        listeners.list.push((id, Arc::new(listener)));
        Listening { events: self.clone(), id }
    }

    /// Reports an event.
    pub fn raise(&self, event: &BlockEvent) {
        // A listener may begin or end to listen, so no lock is held while it is called.
        let listeners: Vec<Listener> =
            self.lock().list.iter().map(|(_, listener)| Arc::clone(listener)).collect();
        if listeners.is_empty() {
            tracing::warn!("{event}");
        }
        for listener in listeners {
            listener(event);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// A listener of [`Events`]. Dropping this value ends the listening.
#[derive(Debug)]
pub struct Listening {
    events: Events,
    id: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut listeners = self.events.lock();
        let at = listeners.list.iter().position(|(id, _)| *id == self.id);
        let removed = at.map(|at| listeners.list.remove(at));
        // The drop of the listener may run code of the user.
        drop(listeners);
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[test]
    fn a_listener_gets_events_until_it_is_dropped() {
        let (events, count) = (Events::default(), Arc::new(AtomicUsize::new(0)));
        let seen = Arc::clone(&count);
        let listening = events.listen(move |_| {
            seen.fetch_add(1, Relaxed);
        });
        let event = BlockEvent::QuorumFailure {
            reference: "q".to_owned(),
            sector_num: 1,
            sectors_count: 2,
        };
        events.raise(&event);
        events.clone().raise(&event);
        drop(listening);
        events.raise(&event);
        assert_eq!(count.load(Relaxed), 2);
        assert_eq!(
            event.to_string(),
            "too few children of quorum 'q' agree on 2 sectors at sector 1"
        );
    }
}
