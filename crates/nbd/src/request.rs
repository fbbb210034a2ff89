//! Transmission requests, and the rules that decide whether a request is valid.
//!
//! Parsing has two steps. [`RawRequest::parse`] fails only on a wrong magic number. After such a failure, the server
//! cannot find the next request in the stream. [`RawRequest::check`] returns the command, or the error to send: the
//! server answers an invalid request and continues. The server must read the payload of a write even if `check` fails;
//! [`RawRequest::payload`] returns the length of the payload.
//!
//! The errors follow the section "Error values": `EPERM` for writes, zero writes and discards on a read-only export;
//! past the end, `ENOSPC` for writes and zero writes and `EINVAL` for other commands; `EINVAL` for unknown commands and
//! flags, for transfers that are too long, and for invalid block status queries.

use crate::error::{ErrorCode, Malformed};
use crate::proto::{CommandFlags, CommandKind, REQUEST_MAGIC, TransmissionFlags};
use crate::wire::RequestHeader;
use zerocopy::{FromBytes, IntoBytes};

/// A request as received, before any rule is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRequest {
    /// Flags, including unknown bits.
    pub flags: u16,
    /// The command's number.
    pub kind: CommandKind,
    /// The client's cookie.
    pub cookie: u64,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

/// A valid request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The client's cookie.
    pub cookie: u64,
    /// Offset in bytes. `offset + length` lies within the export, except for `Flush` and `Disconnect`.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
    /// What to do.
    pub command: Command,
}

/// The operation of a valid request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read {
        /// Reply with at most one content chunk.
        dont_fragment: bool,
    },
    /// Write the payload that follows.
    Write {
        /// Reply after the data is on stable storage.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Reply after the zeroes are on stable storage.
        fua: bool,
        /// The server may punch a hole.
        may_unmap: bool,
        /// Fail with `ENOTSUP` if zeroes cannot be written fast.
        fast: bool,
    },
    /// Discard.
    Trim {
        /// Reply after the discard is on stable storage.
        fua: bool,
    },
    /// Write the data of all completed writes to stable storage.
    Flush,
    /// Prefetch.
    Cache,
    /// Query the selected metadata contexts.
    BlockStatus {
        /// Reply with one extent per context.
        one: bool,
    },
    /// End the session without a reply.
    Disconnect,
}

/// The negotiated parameters of a connection against which requests are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the export in bytes.
    pub size: u64,
    /// The flags that the server sent to the client.
    pub flags: TransmissionFlags,
    /// Largest read, write or prefetch in bytes.
    pub maximum: u32,
    /// Whether a metadata context was selected.
    pub contexts: bool,
}

impl RawRequest {
    /// Parses one request header.
    ///
    /// # Errors
    /// [`Malformed::BadMagic`] if the bytes are not a request. The next request in the stream can then not be found.
    pub fn parse(bytes: &[u8; RequestHeader::SIZE]) -> Result<RawRequest, Malformed> {
        let header = RequestHeader::ref_from_bytes(bytes)
            .map_err(|_| Malformed::Truncated("request header"))?;
        if header.magic.get() != REQUEST_MAGIC {
            return Err(Malformed::BadMagic("request header"));
        }
        Ok(RawRequest {
            flags: header.flags.get(),
            kind: CommandKind(header.command.get()),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            length: header.length.get(),
        })
    }

    /// Encodes the request, for clients.
    #[must_use]
    pub fn to_bytes(self) -> [u8; RequestHeader::SIZE] {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: self.flags.into(),
            command: self.kind.0.into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: self.length.into(),
        };
        let mut bytes = [0; RequestHeader::SIZE];
        bytes.copy_from_slice(header.as_bytes());
        bytes
    }

    /// Bytes of payload that follow the header, also if the request is invalid.
    #[must_use]
    pub fn payload(&self) -> u32 {
        if self.kind == CommandKind::WRITE { self.length } else { 0 }
    }

    /// Applies the rules of the protocol.
    ///
    /// # Errors
    /// The error to send.
    pub fn check(&self, limits: &Limits) -> Result<Request, ErrorCode> {
        let command = self.command(limits)?;
        let request =
            Request { cookie: self.cookie, offset: self.offset, length: self.length, command };
        match command {
            Command::Disconnect | Command::Flush => {}
            Command::Read { .. } | Command::Cache => {
                self.check_length(limits)?;
                self.check_end(limits, ErrorCode::Inval)?;
            }
            Command::Write { .. } => {
                self.check_writable(limits)?;
                self.check_length(limits)?;
                self.check_end(limits, ErrorCode::NoSpc)?;
            }
            Command::WriteZeroes { .. } => {
                self.check_writable(limits)?;
                self.check_end(limits, ErrorCode::NoSpc)?;
            }
            Command::Trim { .. } => {
                self.check_writable(limits)?;
                self.check_end(limits, ErrorCode::Inval)?;
            }
            Command::BlockStatus { .. } => {
                if !limits.contexts || self.length == 0 {
                    return Err(ErrorCode::Inval);
                }
                self.check_end(limits, ErrorCode::Inval)?;
            }
        }
        Ok(request)
    }

    /// The command with its flags. Fails if the command or a flag is unknown, or if the command does not allow a flag. A
    /// disconnect allows every known flag.
    fn command(&self, limits: &Limits) -> Result<Command, ErrorCode> {
        let flags = CommandFlags::from_bits(self.flags).ok_or(ErrorCode::Inval)?;
        let has = |flag| limits.flags.contains(flag);
        let mut valid = CommandFlags::empty();
        // The specification says "valid for all commands", and existing clients set FUA on reads.
        valid.set(CommandFlags::FUA, has(TransmissionFlags::SEND_FUA));
        let fua = flags.contains(CommandFlags::FUA);
        let command = match self.kind {
            CommandKind::READ => {
                valid.set(CommandFlags::DF, has(TransmissionFlags::SEND_DF));
                Command::Read { dont_fragment: flags.contains(CommandFlags::DF) }
            }
            CommandKind::WRITE => Command::Write { fua },
            CommandKind::DISC => return Ok(Command::Disconnect),
            CommandKind::FLUSH => Command::Flush,
            CommandKind::TRIM => Command::Trim { fua },
            CommandKind::CACHE => Command::Cache,
            CommandKind::WRITE_ZEROES => {
                valid |= CommandFlags::NO_HOLE;
                valid.set(CommandFlags::FAST_ZERO, has(TransmissionFlags::SEND_FAST_ZERO));
                Command::WriteZeroes {
                    fua,
                    may_unmap: !flags.contains(CommandFlags::NO_HOLE),
                    fast: flags.contains(CommandFlags::FAST_ZERO),
                }
            }
            CommandKind::BLOCK_STATUS => {
                valid |= CommandFlags::REQ_ONE;
                Command::BlockStatus { one: flags.contains(CommandFlags::REQ_ONE) }
            }
            _ => return Err(ErrorCode::Inval),
        };
        if valid.contains(flags) { Ok(command) } else { Err(ErrorCode::Inval) }
    }

    fn check_writable(&self, limits: &Limits) -> Result<(), ErrorCode> {
        if limits.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(ErrorCode::Perm);
        }
        Ok(())
    }

    fn check_length(&self, limits: &Limits) -> Result<(), ErrorCode> {
        if self.length > limits.maximum { Err(ErrorCode::Inval) } else { Ok(()) }
    }

    fn check_end(&self, limits: &Limits, error: ErrorCode) -> Result<(), ErrorCode> {
        match self.offset.checked_add(u64::from(self.length)) {
            Some(end) if end <= limits.size => Ok(()),
            _ => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            size: 1 << 30,
            flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
            maximum: 32 << 20,
            contexts: true,
        }
    }

    fn raw(kind: CommandKind, flags: CommandFlags, offset: u64, length: u32) -> RawRequest {
        RawRequest { flags: flags.bits(), kind, cookie: 7, offset, length }
    }

    fn error(kind: CommandKind, offset: u64, length: u32) -> Option<ErrorCode> {
        raw(kind, CommandFlags::empty(), offset, length).check(&limits()).err()
    }

    #[test]
    fn a_request_survives_a_round_trip() {
        let request = raw(CommandKind::WRITE, CommandFlags::FUA, 4096, 512);
        assert_eq!(RawRequest::parse(&request.to_bytes()), Ok(request));
        assert_eq!(request.payload(), 512);
        assert_eq!(request.check(&limits()).unwrap().command, Command::Write { fua: true });
    }

    #[test]
    fn a_wrong_magic_is_not_a_request() {
        let mut bytes = raw(CommandKind::READ, CommandFlags::empty(), 0, 1).to_bytes();
        bytes[0] ^= 1;
        assert_eq!(RawRequest::parse(&bytes), Err(Malformed::BadMagic("request header")));
    }

    #[test]
    fn past_the_end_writes_fail_with_enospc_and_other_commands_with_einval() {
        let end = 1 << 30;
        for (kind, expected) in [
            (CommandKind::READ, ErrorCode::Inval),
            (CommandKind::CACHE, ErrorCode::Inval),
            (CommandKind::TRIM, ErrorCode::Inval),
            (CommandKind::BLOCK_STATUS, ErrorCode::Inval),
            (CommandKind::WRITE, ErrorCode::NoSpc),
            (CommandKind::WRITE_ZEROES, ErrorCode::NoSpc),
        ] {
            assert_eq!(error(kind, end - 512, 512), None);
            assert_eq!(error(kind, end - 511, 512), Some(expected), "{kind:?}");
            assert_eq!(error(kind, u64::MAX, 512), Some(expected), "{kind:?}");
        }
    }

    #[test]
    fn writing_to_a_read_only_export_fails_with_eperm_even_past_the_end() {
        let mut limits = limits();
        limits.flags |= TransmissionFlags::READ_ONLY;
        for kind in [CommandKind::WRITE, CommandKind::TRIM, CommandKind::WRITE_ZEROES] {
            for offset in [0, u64::MAX] {
                let request = raw(kind, CommandFlags::empty(), offset, 512);
                assert_eq!(request.check(&limits), Err(ErrorCode::Perm), "{kind:?}");
            }
        }
        assert!(raw(CommandKind::FLUSH, CommandFlags::empty(), 0, 0).check(&limits).is_ok());
    }

    #[test]
    fn unknown_commands_and_flags_fail_with_einval() {
        assert_eq!(error(CommandKind(8), 0, 0), Some(ErrorCode::Inval));
        assert_eq!(error(CommandKind(0xffff), 0, 0), Some(ErrorCode::Inval));
        let mut request = raw(CommandKind::READ, CommandFlags::empty(), 0, 512);
        request.flags = 1 << 9;
        assert_eq!(request.check(&limits()), Err(ErrorCode::Inval));
        let misplaced = raw(CommandKind::READ, CommandFlags::NO_HOLE, 0, 512);
        assert_eq!(misplaced.check(&limits()), Err(ErrorCode::Inval));
    }

    #[test]
    fn flags_that_the_server_did_not_offer_fail_with_einval() {
        let mut limits = limits();
        limits.flags = TransmissionFlags::HAS_FLAGS;
        for (kind, flag) in [
            (CommandKind::READ, CommandFlags::DF),
            (CommandKind::WRITE, CommandFlags::FUA),
            (CommandKind::WRITE_ZEROES, CommandFlags::FAST_ZERO),
        ] {
            assert_eq!(raw(kind, flag, 0, 512).check(&limits), Err(ErrorCode::Inval), "{kind:?}");
        }
    }

    #[test]
    fn the_maximum_size_applies_only_to_reads_writes_and_prefetches() {
        let over = (32 << 20) + 1;
        for kind in [CommandKind::READ, CommandKind::WRITE, CommandKind::CACHE] {
            assert_eq!(error(kind, 0, over), Some(ErrorCode::Inval), "{kind:?}");
        }
        for kind in [CommandKind::TRIM, CommandKind::WRITE_ZEROES, CommandKind::BLOCK_STATUS] {
            assert_eq!(error(kind, 0, over), None, "{kind:?}");
        }
    }

    #[test]
    fn block_status_requires_a_context_and_a_length() {
        assert_eq!(error(CommandKind::BLOCK_STATUS, 0, 0), Some(ErrorCode::Inval));
        let mut limits = limits();
        limits.contexts = false;
        let request = raw(CommandKind::BLOCK_STATUS, CommandFlags::empty(), 0, 512);
        assert_eq!(request.check(&limits), Err(ErrorCode::Inval));
    }
}
