//! Zero writes and discards on the host, and a record of the operations that the host does not support.
//!
//! Each operation has a flag. When the host has reported an operation as unsupported, the flag is set, and the
//! operation is not tried again. Other errors (alignment, quota) do not set the flag, because the operation may succeed
//! for another range or at a later time.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::{Error, Result};
use oxblk_ring::{Falloc, File, host};
use rustix::io::Errno;

use super::handle::Kind;

/// The operations that the host has reported as unsupported.
#[derive(Default)]
pub(super) struct Refused {
    zero_range: AtomicBool,
    punch_hole: AtomicBool,
    allocate: AtomicBool,
    discard: AtomicBool,
}

fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY];
    unsupported.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn unsupported() -> Error {
    Error::from_errno(Errno::OPNOTSUPP.raw_os_error())
}

impl Refused {
    /// Executes `call` if `refused` is not set. Returns `None` if the host does not support the operation, or does
    /// not support it for this range.
    async fn attempt(
        refused: &AtomicBool,
        call: impl Future<Output = io::Result<()>>,
    ) -> Option<io::Result<()>> {
        if refused.load(Relaxed) {
            return None;
        }
        match call.await {
            Err(error) if is_unsupported(&error) => {
                refused.store(true, Relaxed);
                None
            }
            // The host refuses this range, for example an unaligned range of a block device. The host may accept
            // another range.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => None,
            outcome => Some(outcome),
        }
    }

    /// Makes a range read as zeroes. With `unmap`, the range becomes a hole if possible.
    pub(super) async fn zero(
        &self,
        file: &File,
        kind: Kind,
        range: (u64, u64),
        unmap: bool,
        grows: bool,
    ) -> Result<()> {
        let (offset, len) = range;
        // Punching a hole does not extend the file.
        if unmap && !grows {
            let punch = file.fallocate(Falloc::PunchHole, offset, len);
            if let Some(outcome) = Self::attempt(&self.punch_hole, punch).await {
                return outcome.map_err(Error::from);
            }
        }
        let mode = if kind == Kind::Block { Falloc::ZeroRangeKeepSize } else { Falloc::ZeroRange };
        let zero = file.fallocate(mode, offset, len);
        if let Some(outcome) = Self::attempt(&self.zero_range, zero).await {
            return outcome.map_err(Error::from);
        }
        if kind == Kind::Block || grows {
            return Err(unsupported());
        }
        self.punch_and_allocate(file, offset, len).await
    }

    /// Has the effect of `FALLOC_FL_ZERO_RANGE` in two steps, for file systems that do not support this mode.
    async fn punch_and_allocate(&self, file: &File, offset: u64, len: u64) -> Result<()> {
        let punch = file.fallocate(Falloc::PunchHole, offset, len);
        match Self::attempt(&self.punch_hole, punch).await {
            None => Err(unsupported()),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(())) => {
                // The hole already reads as zeroes. If the host cannot allocate space in advance, the range stays a
                // hole.
                let allocate = file.fallocate(Falloc::AllocateKeepSize, offset, len);
                match Self::attempt(&self.allocate, allocate).await {
                    None => Ok(()),
                    Some(outcome) => outcome.map_err(Error::from),
                }
            }
        }
    }

    /// Frees a range on the host.
    pub(super) async fn discard(
        &self,
        file: &File,
        kind: Kind,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let outcome = if kind == Kind::Block {
            let call = discard_blocks(file.clone(), offset, len);
            Self::attempt(&self.discard, call).await
        } else {
            let call = file.fallocate(Falloc::PunchHole, offset, len);
            Self::attempt(&self.punch_hole, call).await
        };
        match outcome {
            None => Err(unsupported()),
            Some(outcome) => outcome.map_err(Error::from),
        }
    }
}

async fn discard_blocks(file: File, offset: u64, len: u64) -> io::Result<()> {
    file.call(move |file| match file.as_fd() {
        Some(fd) => host::discard_blocks(fd, offset, len),
        None => Err(Errno::OPNOTSUPP.into()),
    })
    .await
}
