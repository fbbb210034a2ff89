//! The error numbers of the protocol (section "Error values"), and the ways in which a message can be malformed.

use std::fmt;

/// An error number of the protocol. The numbers are the errno values of Linux for the same names, but only these
/// numbers are legal on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// `NBD_EPERM`: a write to a read-only export.
    Perm = 1,
    /// `NBD_EIO`.
    Io = 5,
    /// `NBD_ENOMEM`.
    NoMem = 12,
    /// `NBD_EINVAL`: also for an errno without a counterpart in NBD.
    Inval = 22,
    /// `NBD_ENOSPC`: also for a write past the end of the export.
    NoSpc = 28,
    /// `NBD_EOVERFLOW`: a read too large for `NBD_CMD_FLAG_DF`.
    Overflow = 75,
    /// `NBD_ENOTSUP`: the export cannot write zeroes fast.
    NotSup = 95,
    /// `NBD_ESHUTDOWN`.
    Shutdown = 108,
}

impl ErrorCode {
    /// The error to send for a Linux errno.
    #[must_use]
    pub fn from_errno(errno: i32) -> ErrorCode {
        match errno {
            // EPERM, EROFS
            1 | 30 => ErrorCode::Perm,
            5 => ErrorCode::Io,
            12 => ErrorCode::NoMem,
            // EFBIG, ENOSPC, EDQUOT
            27 | 28 | 122 => ErrorCode::NoSpc,
            75 => ErrorCode::Overflow,
            // EOPNOTSUPP (ENOTSUP is the same number on Linux)
            95 => ErrorCode::NotSup,
            // ESHUTDOWN; ENOMEDIUM and ECANCELED: the exported node was closed.
            108 | 123 | 125 => ErrorCode::Shutdown,
            _ => ErrorCode::Inval,
        }
    }

    /// The error for a received number. An unknown number becomes `EINVAL`, as the specification requires of clients.
    #[must_use]
    pub fn from_wire(code: u32) -> ErrorCode {
        match code {
            1 => ErrorCode::Perm,
            5 => ErrorCode::Io,
            12 => ErrorCode::NoMem,
            28 => ErrorCode::NoSpc,
            75 => ErrorCode::Overflow,
            95 => ErrorCode::NotSup,
            108 => ErrorCode::Shutdown,
            _ => ErrorCode::Inval,
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The Linux errno.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            ErrorCode::Perm => 1,
            ErrorCode::Io => 5,
            ErrorCode::NoMem => 12,
            ErrorCode::Inval => 22,
            ErrorCode::NoSpc => 28,
            ErrorCode::Overflow => 75,
            ErrorCode::NotSup => 95,
            ErrorCode::Shutdown => 108,
        }
    }

    /// A short human-readable text, used as the message of an error chunk.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            ErrorCode::Perm => "operation not permitted",
            ErrorCode::Io => "input/output error",
            ErrorCode::NoMem => "cannot allocate memory",
            ErrorCode::Inval => "invalid request",
            ErrorCode::NoSpc => "no space left on device",
            ErrorCode::Overflow => "read too large for one chunk",
            ErrorCode::NotSup => "operation not supported",
            ErrorCode::Shutdown => "server is shutting down",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

/// A message that violates the protocol. Each variant contains the name of the invalid field or structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// The magic number of the named structure is wrong.
    BadMagic(&'static str),
    /// The payload ends inside the named field.
    Truncated(&'static str),
    /// Bytes remain after the named field, which is the last one.
    TrailingBytes(&'static str),
    /// The named string is longer than the protocol allows.
    StringTooLong(&'static str),
    /// The named string is not UTF-8 or contains a NUL.
    BadString(&'static str),
    /// The named field has a value that the protocol forbids.
    BadValue(&'static str),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Malformed::BadMagic(what) => write!(f, "wrong magic number in {what}"),
            Malformed::Truncated(what) => write!(f, "message ends inside {what}"),
            Malformed::TrailingBytes(what) => write!(f, "bytes left over after {what}"),
            Malformed::StringTooLong(what) => write!(f, "{what} is longer than 4096 bytes"),
            Malformed::BadString(what) => write!(f, "{what} is not valid text"),
            Malformed::BadValue(what) => write!(f, "invalid {what}"),
        }
    }
}

impl std::error::Error for Malformed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_maps_to_the_closest_wire_error() {
        for (errno, code) in [
            (1, 1),
            (30, 1),
            (5, 5),
            (12, 12),
            (27, 28),
            (122, 28),
            (28, 28),
            (95, 95),
            (2, 22),
            (123, 108),
            (125, 108),
        ] {
            assert_eq!(ErrorCode::from_errno(errno).code(), code, "errno {errno}");
        }
    }

    #[test]
    fn every_wire_error_survives_a_round_trip() {
        for code in [1, 5, 12, 22, 28, 75, 95, 108] {
            let error = ErrorCode::from_wire(code);
            assert_eq!(error.code(), code);
            assert_eq!(ErrorCode::from_errno(error.errno()), error);
        }
        assert_eq!(ErrorCode::from_wire(7777), ErrorCode::Inval);
    }
}
