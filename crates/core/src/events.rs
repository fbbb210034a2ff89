//! Events: what nodes and backends report to the users of a graph, for example a child with wrong data, or another medium.
//!
//! An event is raised on the thread that handles the request or the control operation. So a listener must not block. A
//! [`Subscription`] keeps events in a queue for a reader that takes its time. If nobody listens, the log reports the event.

mod subscription;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use subscription::{Notice, Subscription};

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
    /// A write has exceeded the write threshold of a node (`BLOCK_WRITE_THRESHOLD`). The node has no threshold afterwards.
    WriteThreshold {
        /// The name of the node.
        node_name: String,
        /// The number of bytes between the threshold and the end of the write.
        amount_exceeded: u64,
        /// The threshold in bytes.
        write_threshold: u64,
    },
    /// A request of a device has failed (`BLOCK_IO_ERROR`).
    IoError {
        /// The backend of the device.
        source: EventSource,
        /// The name of the root node to which the request was sent.
        node_name: String,
        /// The type of the operation.
        operation: IoOperation,
        /// What happens to the request.
        action: IoErrorAction,
        /// Whether the error is `ENOSPC`. `None` if the device has no I/O status.
        nospace: Option<bool>,
        /// The errno of the error.
        errno: i32,
        /// The text of the error.
        reason: String,
    },
    /// An empty backend has got a root node.
    MediumInserted {
        /// The backend.
        source: EventSource,
        /// The name of the root node.
        node_name: String,
        /// The size of the disk in bytes.
        size: u64,
    },
    /// A backend has lost its root node.
    MediumRemoved {
        /// The backend.
        source: EventSource,
        /// The name of the former root node.
        node_name: String,
    },
    /// The tray of a device has been opened or closed (`DEVICE_TRAY_MOVED`).
    TrayMoved {
        /// The backend of the device.
        source: EventSource,
        /// Whether the tray is open now.
        tray_open: bool,
    },
    /// The size of a disk has changed: the root node was resized, or the backend has another root node. A node that grows because
    /// another user writes past its end does not report this.
    Resized {
        /// The backend.
        source: EventSource,
        /// The name of the root node.
        node_name: String,
        /// The new size in bytes.
        size: u64,
    },
}

/// The backend that has raised an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventSource {
    /// The number of the backend ([`Backend::id`](crate::Backend::id)).
    pub backend: u64,
    /// The name of the backend; may be empty. QEMU's member `device`.
    pub device: String,
    /// The identifier of the attached device. QEMU's members `id` and `qom-path`.
    pub id: Option<String>,
}

impl fmt::Display for EventSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.id, self.device.as_str()) {
            (Some(id), _) => write!(f, "device '{id}'"),
            (None, "") => f.write_str("an unnamed block device"),
            (None, name) => write!(f, "block device '{name}'"),
        }
    }
}

/// The type of an operation in [`BlockEvent::IoError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOperation {
    /// A read.
    Read,
    /// A write, a zero write, a discard or a flush.
    Write,
}

impl IoOperation {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What happens to a request of a device that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorAction {
    /// The request completes as if it had succeeded.
    Ignore,
    /// The device gets the error.
    Report,
    /// The request is held until [`Backend::resume`](crate::Backend::resume).
    Stop,
}

impl IoErrorAction {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
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
            Self::IoError { source, operation, action, reason, .. } => {
                let (operation, action) = (operation.name(), action.name());
                write!(f, "{operation} of {source} failed: {reason} (action: {action})")
            }
            Self::MediumInserted { source, node_name, size } => {
                write!(f, "{source} has the medium '{node_name}' of {size} bytes now")
            }
            Self::MediumRemoved { source, node_name } => {
                write!(f, "the medium '{node_name}' was removed from {source}")
            }
            Self::TrayMoved { source, tray_open } => {
                let state = if *tray_open { "open" } else { "closed" };
                write!(f, "the tray of {source} is {state} now")
            }
            Self::Resized { source, node_name, size } => {
                write!(f, "node '{node_name}' of {source} has {size} bytes now")
            }
            Self::WriteThreshold { node_name, amount_exceeded, write_threshold } => write!(
                f,
                "a write to '{node_name}' ends {amount_exceeded} bytes beyond the write threshold {write_threshold}"
            ),
        }
    }
}

impl BlockEvent {
    /// Whether the event reports a fault, or something that a person should know.
    fn is_warning(&self) -> bool {
        !matches!(
            self,
            Self::MediumInserted { .. }
                | Self::MediumRemoved { .. }
                | Self::TrayMoved { .. }
                | Self::Resized { .. }
        )
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
            match event.is_warning() {
                true => tracing::warn!("{event}"),
                false => tracing::debug!("{event}"),
            }
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
