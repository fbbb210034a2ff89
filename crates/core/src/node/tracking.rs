//! Counting the reads and changes of a node, so that serialising requests can wait for those that overlap them.
//!
//! A node usually counts only the requests that its own rules need (see `request::align`). A user that orders requests by their
//! ranges (a backup to an overlay of its source, a read with copy-on-read) asks the node to count all of them.

use std::sync::{Arc, Mutex, PoisonError};

use super::SlowPathFlags;
use crate::Node;

/// The users of a node for which the node tracks its requests.
#[derive(Debug, Default)]
pub(super) struct Trackers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    users: usize,
    /// All requests in flight are tracked: those that began before the first user have ended.
    is_complete: bool,
}

/// As long as this value exists, the node tracks its reads and changes: it counts them with their ranges. Serialising requests
/// wait only for those that overlap them. All requests of the node take the slow path.
#[derive(Debug)]
pub struct RequestTracking(Arc<Node>);

impl RequestTracking {
    /// Begins to track, and waits for the requests in flight that are not tracked. The caller is not a part of a request.
    pub(crate) async fn begin(node: &Arc<Node>) -> Self {
        let tracking = Self(Arc::clone(node));
        let is_complete = {
            let mut state = node.trackers.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.users = state.users.saturating_add(1);
            node.set_slow_path(SlowPathFlags::TRACKS);
            state.is_complete
        };
        if !is_complete {
            node.epochs().grace().await;
            // A request enters the epochs of the formats below it.
            node.skip_filters().epochs().grace().await;
            node.trackers.0.lock().unwrap_or_else(PoisonError::into_inner).is_complete = true;
        }
        tracking
    }

    /// Whether the value belongs to this node.
    pub fn is_of(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.0, node)
    }
}

impl Drop for RequestTracking {
    fn drop(&mut self) {
        let mut state = self.0.trackers.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.users = state.users.saturating_sub(1);
        if state.users == 0 {
            state.is_complete = false;
            self.0.clear_slow_path(SlowPathFlags::TRACKS);
        }
    }
}
