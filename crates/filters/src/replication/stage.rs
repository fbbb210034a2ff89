//! The stages of a replication.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};

use oxblk_core::{Errno, Error, ErrorKind, Result};

/// The stage of a replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    /// All requests fail.
    NotStarted,
    Running,
    /// A checkpoint or a stop of a secondary has failed after it had discarded data. All requests fail.
    Unusable,
    /// A failover has failed. The secondary disk may have a part of the guest's data. The guest still sees its data.
    FailoverFailed,
    /// A failover has succeeded. The filter passes all requests on, and further operations have no effect.
    Complete,
    /// The replication has ended without a failover, or on the primary.
    Stopped,
}

const ALL: [Stage; 6] = [
    Stage::NotStarted,
    Stage::Running,
    Stage::Unusable,
    Stage::FailoverFailed,
    Stage::Complete,
    Stage::Stopped,
];

impl Stage {
    /// Whether a secondary passes the requests of its guest on.
    pub(super) fn passes_guest(self) -> bool {
        !matches!(self, Self::NotStarted | Self::Unusable)
    }
}

/// The current stage.
#[derive(Debug)]
pub(super) struct StageCell {
    stage: AtomicU8,
    /// A primary could not replicate a write.
    has_failed: AtomicBool,
}

impl StageCell {
    pub(super) fn new() -> Self {
        Self { stage: AtomicU8::new(Stage::NotStarted as u8), has_failed: AtomicBool::new(false) }
    }

    pub(super) fn get(&self) -> Stage {
        let number = usize::from(self.stage.load(SeqCst));
        ALL.get(number).copied().unwrap_or(Stage::Unusable)
    }

    /// Begins a stage. A replication that begins or ends forgets the errors of writes.
    pub(super) fn set(&self, stage: Stage) {
        self.has_failed.store(false, SeqCst);
        self.stage.store(stage as u8, SeqCst);
    }

    /// Records that a write was not replicated.
    pub(super) fn set_failed(&self) {
        self.has_failed.store(true, SeqCst);
    }

    /// # Errors
    /// When the replication has not been started, or when an error occurred.
    pub(super) fn check(&self) -> Result<()> {
        match self.get() {
            Stage::NotStarted => Err(not_running()),
            Stage::Unusable | Stage::FailoverFailed => Err(io_error()),
            Stage::Running if self.has_failed.load(SeqCst) => Err(io_error()),
            Stage::Running | Stage::Complete | Stage::Stopped => Ok(()),
        }
    }
}

/// The error of an operation that needs a replication that runs.
pub(super) fn not_running() -> Error {
    Error::invalid("Block replication is not running")
}

fn io_error() -> Error {
    Error::new(ErrorKind::Io, "I/O error occurred").errno(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_is_stored_and_found() {
        let cell = StageCell::new();
        assert_eq!(cell.get(), Stage::NotStarted);
        for stage in ALL {
            cell.set(stage);
            assert_eq!(cell.get(), stage);
        }
    }

    #[test]
    fn errors_are_reported_until_the_replication_ends() {
        let cell = StageCell::new();
        assert_eq!(cell.check().unwrap_err().to_string(), "Block replication is not running");
        cell.set(Stage::Running);
        assert!(cell.check().is_ok());
        cell.set_failed();
        assert_eq!(cell.check().unwrap_err().to_string(), "I/O error occurred");
        cell.set(Stage::Stopped);
        assert!(cell.check().is_ok());
    }
}
