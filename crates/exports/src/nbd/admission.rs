//! The rules that decide which clients may connect.
//!
//! If a client connects while the server has the maximum number of connections, the server closes the oldest connection that is
//! still in the handshake, and admits the new client. So clients that connect and send nothing cannot block other clients. If
//! no connection is in the handshake, the new client is refused immediately. The new client must not wait in the queue of the
//! listening socket: a client that opens several connections before it sends requests would wait forever.

use super::account::ALLOWANCE;
use super::flag::Flag;
use oxblk_ring::now;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Number of file descriptors that are kept free for the rest of the process.
const SPARE_DESCRIPTORS: u64 = 64;
/// Maximum memory for the allowances of all connections together, in bytes.
const MAX_ALLOWANCES: u64 = 1 << 30;
/// Minimum time between two log lines about refused connections.
const BETWEEN_WARNINGS: Duration = Duration::from_secs(60);

/// The number of connections that this process can serve, at least 16. The number is limited by the limit on open
/// files, and by the number of allowances that fit in a quarter of the machine's memory and in 1 GiB.
pub(super) fn possible_connections() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |open| open.count());
    let used = u64::try_from(open).unwrap_or(u64::MAX).saturating_add(SPARE_DESCRIPTORS);
    let descriptors = limit.unwrap_or(u64::MAX).saturating_sub(used);
    let system = rustix::system::sysinfo();
    #[expect(clippy::useless_conversion, reason = "the type differs between machines")]
    let memory = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit)) / 4;
    let allowance = u64::try_from(ALLOWANCE).unwrap_or(u64::MAX);
    let connections = descriptors.min(memory.min(MAX_ALLOWANCES) / allowance).max(16);
    usize::try_from(connections).unwrap_or(usize::MAX)
}

/// Switches TCP keepalive on. If the machine of a client is not reachable, the kernel detects this and the connection ends.
pub(super) fn keep_alive(socket: impl AsFd) {
    // This has no effect on Unix sockets. An error is ignored, because the connection works without keepalive.
    let _ = rustix::net::sockopt::set_socket_keepalive(socket, true);
}

/// Connections in the handshake, the oldest first.
#[derive(Default)]
pub(super) struct Handshakes(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    next: u64,
    cancels: BTreeMap<u64, Arc<Flag>>,
}

impl Handshakes {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a handshake begins.
    pub(super) fn enter(self: &Arc<Self>) -> Handshake {
        let cancelled = Arc::new(Flag::default());
        let mut waiting = self.lock();
        let id = waiting.next;
        waiting.next = id.wrapping_add(1);
        waiting.cancels.insert(id, Arc::clone(&cancelled));
        Handshake { among: Arc::clone(self), id, cancelled }
    }

    /// Cancels the oldest handshake. Returns false if no connection is in the handshake.
    pub(super) fn cancel_oldest(&self) -> bool {
        let oldest = self.lock().cancels.pop_first();
        oldest.map(|(_, cancelled)| cancelled.set()).is_some()
    }
}

/// A connection in the handshake. The handshake ends when this value is dropped.
pub(super) struct Handshake {
    among: Arc<Handshakes>,
    id: u64,
    cancelled: Arc<Flag>,
}

impl Handshake {
    /// Records that the handshake has succeeded, so that the handshake cannot be cancelled any more. Returns false if
    /// the handshake has already been cancelled.
    pub(super) fn finish(&self) -> bool {
        self.among.lock().cancels.remove(&self.id).is_some()
    }

    /// Completes when the handshake is cancelled to admit another client.
    pub(super) async fn cancelled(&self) {
        self.cancelled.wait().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Counts refused connections. The first refusal is logged immediately. Later refusals are counted, and the count is logged at
/// most once a minute.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Refused>);

#[derive(Default)]
struct Refused {
    warned: Option<Duration>,
    since: u64,
}

impl Refusals {
    /// Records that a connection was refused for this reason.
    pub(super) fn add(&self, reason: std::fmt::Arguments<'_>) {
        if let Some(count) = self.count(now()) {
            tracing::warn!("refusing NBD connections ({count}): {reason}");
        }
    }

    /// Counts one refusal. If a log line is due, returns the number of refusals since the last log line.
    fn count(&self, now: Duration) -> Option<u64> {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.since = refused.since.saturating_add(1);
        if refused.warned.is_some_and(|at| now.saturating_sub(at) < BETWEEN_WARNINGS) {
            return None;
        }
        refused.warned = Some(now);
        Some(std::mem::take(&mut refused.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_refusal_is_logged_and_later_ones_rarely() {
        let refusals = Refusals::default();
        let at = Duration::from_secs;
        assert_eq!(refusals.count(at(5)), Some(1));
        assert_eq!(refusals.count(at(6)), None);
        assert_eq!(refusals.count(at(64)), None);
        assert_eq!(refusals.count(at(65)), Some(3));
    }

    #[test]
    fn the_oldest_handshake_is_cancelled_and_a_finished_one_is_not() {
        let handshakes = Arc::new(Handshakes::default());
        assert!(!handshakes.cancel_oldest());
        let first = handshakes.enter();
        let second = handshakes.enter();
        drop(first);
        assert!(handshakes.cancel_oldest());
        assert!(second.cancelled.is_set());
        assert!(!second.finish());
        assert!(!handshakes.cancel_oldest());
    }

    #[test]
    fn more_than_a_hundred_connections_are_possible_by_default() {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        if limit.is_none_or(|limit| limit >= 1024) {
            assert!(possible_connections() > 100);
        }
    }
}
