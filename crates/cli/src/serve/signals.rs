//! SIGINT and SIGTERM as a future.
//!
//! The first signal ends the wait; a second SIGINT or SIGTERM ends the process at once, for a user who does not want to wait.

use oxblk_ring::{IoBufMut, Stream};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Catches the signals from its making on.
pub(super) struct Signals {
    stream: Stream,
}

impl Signals {
    /// Begins to catch.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn new() -> io::Result<Signals> {
        let (read, write) = UnixStream::pair()?;
        let seen = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag clear and sets it.
            let status = 128 + signal;
            signal_hook::flag::register_conditional_shutdown(signal, status, Arc::clone(&seen))?;
            signal_hook::flag::register(signal, Arc::clone(&seen))?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(Signals { stream: Stream::from_fd(OwnedFd::from(read))? })
    }

    /// Waits for the first signal.
    pub(super) async fn next(self) {
        let (received, _) = self.stream.recv(IoBufMut::new(1)).await;
        if let Err(error) = received {
            tracing::error!(%error, "cannot wait for signals");
        }
    }
}
