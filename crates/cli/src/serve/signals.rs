//! A future that completes when a signal requests the server to end.

use crate::signals::{self, Delivery};
use oxblk_ring::{IoBufMut, Stream};
use signal_hook::consts::SIGUSR1;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Catches the signals that end the server, from [`Signals::new`] on.
pub(super) struct Signals {
    stream: Stream,
    seen: Arc<AtomicBool>,
    /// Sends to `stream`.
    _delivery: Delivery,
}

impl Signals {
    /// Starts to catch the signals. SIGUSR1 ends the server too, because the server has no progress to print.
    ///
    /// # Errors
    /// If the descriptors cannot be created or a signal handler cannot be installed.
    pub(super) fn new() -> io::Result<Signals> {
        let seen = Arc::new(AtomicBool::new(false));
        signals::catch(&seen, &[SIGUSR1])?;
        let (from, to) = UnixStream::pair()?;
        let stream = Stream::from_fd(OwnedFd::from(from.try_clone()?))?;
        // `has_arrived` reports a signal that arrives before this line.
        let delivery = signals::deliver(&[SIGUSR1], from, to)?;
        Ok(Signals { stream, seen, _delivery: delivery })
    }

    /// Whether a signal has arrived.
    pub(super) fn has_arrived(&self) -> bool {
        self.seen.load(SeqCst)
    }

    /// Waits for the first signal.
    pub(super) async fn next(self) {
        let (received, _) = self.stream.recv(IoBufMut::new(1)).await;
        if let Err(error) = received {
            tracing::error!(%error, "cannot wait for signals");
        }
    }
}
