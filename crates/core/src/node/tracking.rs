//! Counting the reads and changes of a node, so that serialising requests can wait for those that overlap them.
//!
//! A node usually counts only the requests that its own rules need (see `request::align`). A user that orders requests by their
//! ranges (a backup to an overlay of its source, a read with copy-on-read) asks the node to count all of them.

use std::sync::{Arc, Mutex, PoisonError};

use super::SlowPathFlags;
use crate::Node;
use crate::graph::epochs_above;

/// The users of a node for which the node tracks its requests.
#[derive(Debug, Default)]
pub(super) struct Trackers(Mutex<usize>);

/// As long as this value exists, the node tracks its reads and changes: it counts them with their ranges. Serialising requests
/// wait only for those that overlap them. All requests of the node take the slow path.
#[derive(Debug)]
pub struct RequestTracking(Arc<Node>);

impl Node {
    /// Waits until the requests of backends that began before this call and that may reach the node have ended. The caller is not
    /// a part of a request.
    pub async fn wait_for_requests(self: &Arc<Self>) {
        for epochs in epochs_above(self) {
            epochs.wait_for_earlier_requests().await;
        }
    }
}

impl RequestTracking {
    /// Begins to track, and waits for the requests in flight that are not tracked. The caller is not a part of a request.
    pub(crate) async fn begin(node: &Arc<Node>) -> Self {
        let tracking = Self(Arc::clone(node));
        {
            let mut users = node.trackers.0.lock().unwrap_or_else(PoisonError::into_inner);
            *users = users.saturating_add(1);
            node.set_slow_path(SlowPathFlags::TRACKS);
        }
        if !node.has_gate(SlowPathFlags::TRACKS_ALL) {
            node.wait_for_requests().await;
            // `tracking` is a user, so the first flag has been set since before the wait.
            node.set_slow_path(SlowPathFlags::TRACKS_ALL);
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
        let mut users = self.0.trackers.0.lock().unwrap_or_else(PoisonError::into_inner);
        *users = users.saturating_sub(1);
        if *users == 0 {
            self.0.clear_slow_path(SlowPathFlags::TRACKS | SlowPathFlags::TRACKS_ALL);
        }
    }
}
