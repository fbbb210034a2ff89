//! What happens to a request of a device that has failed: QEMU's `rerror` and `werror`.

use crate::{Errno, IoErrorAction};

/// The policy for failed requests of a device (`rerror`, `werror`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The device gets the error.
    Report,
    /// The request completes as if it had succeeded. A read returns zeroes.
    Ignore,
    /// Like `Stop` for `ENOSPC`, otherwise like `Report`.
    Enospc,
    /// The request is held until [`Backend::resume`](crate::Backend::resume).
    Stop,
    /// `Report` for reads, `Enospc` for writes.
    #[default]
    Auto,
}

impl OnError {
    /// Replaces `Auto` by the policy that it means for reads.
    pub(super) fn for_reads(self) -> Self {
        if self == Self::Auto { Self::Report } else { self }
    }

    /// Replaces `Auto` by the policy that it means for writes.
    pub(super) fn for_writes(self) -> Self {
        if self == Self::Auto { Self::Enospc } else { self }
    }

    /// The action for an error. `Auto` must have been replaced; otherwise it reports the error.
    pub(super) fn action(self, errno: i32) -> IoErrorAction {
        match self {
            Self::Report | Self::Auto => IoErrorAction::Report,
            Self::Ignore => IoErrorAction::Ignore,
            Self::Stop => IoErrorAction::Stop,
            Self::Enospc if errno == Errno::NOSPC => IoErrorAction::Stop,
            Self::Enospc => IoErrorAction::Report,
        }
    }
}

/// The I/O status of a device (`io-status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// No request is held because of an error.
    #[default]
    Ok,
    /// A request was held because of an error other than `ENOSPC`.
    Failed,
    /// A request was held because of `ENOSPC`.
    NoSpace,
}

impl IoStatus {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enospc_stops_only_for_lack_of_space() {
        use IoErrorAction::{Ignore, Report, Stop};
        for (policy, nospace, other) in [
            (OnError::Report, Report, Report),
            (OnError::Ignore, Ignore, Ignore),
            (OnError::Enospc, Stop, Report),
            (OnError::Stop, Stop, Stop),
            (OnError::Auto.for_reads(), Report, Report),
            (OnError::Auto.for_writes(), Stop, Report),
        ] {
            assert_eq!((policy.action(Errno::NOSPC), policy.action(Errno::IO)), (nospace, other));
        }
    }
}
