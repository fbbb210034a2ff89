//! Replies of the transmission phase: simple replies and structured reply chunks.
//!
//! For the data of a read, the server builds only the header that precedes the data. So the data is sent from its own
//! buffer without a copy. The client's parsers validate payloads; [`within`] checks that a chunk lies within the
//! range of its request.

use crate::error::{ErrorCode, Malformed};
use crate::option::{Fields, text};
use crate::proto::{ChunkFlags, ChunkKind, MAX_STRING, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use crate::wire::{
    ChunkError, ChunkHeader, OffsetDataHeader, OffsetHole, SimpleReply, StatusExtent,
};
use zerocopy::{FromBytes, IntoBytes};

/// A simple reply; the data of a successful read must follow it.
#[must_use]
pub fn simple(cookie: u64, error: Option<ErrorCode>) -> SimpleReply {
    SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.map_or(0, ErrorCode::code).into(),
        cookie: cookie.into(),
    }
}

fn chunk(cookie: u64, kind: ChunkKind, done: bool, length: u32) -> ChunkHeader {
    let flags = if done { ChunkFlags::DONE } else { ChunkFlags::empty() };
    ChunkHeader {
        magic: STRUCTURED_REPLY_MAGIC.into(),
        flags: flags.bits().into(),
        kind: kind.0.into(),
        cookie: cookie.into(),
        length: length.into(),
    }
}

/// The chunk that ends a successful reply without data.
#[must_use]
pub fn none(cookie: u64) -> ChunkHeader {
    chunk(cookie, ChunkKind::NONE, true, 0)
}

/// The header of a data chunk; `length` bytes must follow.
#[must_use]
pub fn offset_data(cookie: u64, offset: u64, length: u32, done: bool) -> OffsetDataHeader {
    OffsetDataHeader {
        chunk: chunk(cookie, ChunkKind::OFFSET_DATA, done, length.saturating_add(8)),
        offset: offset.into(),
    }
}

/// A chunk that states that `length` bytes (at least one) are zero.
#[must_use]
pub fn offset_hole(cookie: u64, offset: u64, length: u32, done: bool) -> OffsetHole {
    OffsetHole {
        chunk: chunk(cookie, ChunkKind::OFFSET_HOLE, done, 12),
        offset: offset.into(),
        length: length.into(),
    }
}

/// Appends a final error chunk with a human-readable message, truncated to the protocol's limit.
pub fn put_error(out: &mut Vec<u8>, cookie: u64, error: ErrorCode, message: &str) {
    let end = message.floor_char_boundary(MAX_STRING);
    let message = message.get(..end).unwrap_or("");
    let length = u16::try_from(message.len()).unwrap_or(0);
    out.extend_from_slice(chunk(cookie, ChunkKind::ERROR, true, u32::from(length) + 6).as_bytes());
    let front = ChunkError { error: error.code().into(), message_length: length.into() };
    out.extend_from_slice(front.as_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// Appends a block status chunk. `extents` is not empty and contains no extent of length zero.
pub fn put_block_status(
    out: &mut Vec<u8>,
    cookie: u64,
    context: u32,
    extents: &[StatusExtent],
    done: bool,
) {
    let bytes = extents.as_bytes();
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).saturating_add(4);
    out.extend_from_slice(chunk(cookie, ChunkKind::BLOCK_STATUS, done, length).as_bytes());
    out.extend_from_slice(&context.to_be_bytes());
    out.extend_from_slice(bytes);
}

/// The header of any reply, as a client receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; if a read succeeded, its data follows.
    Simple {
        /// The request's cookie.
        cookie: u64,
        /// The error, if the request failed.
        error: Option<ErrorCode>,
    },
    /// A structured reply chunk; `length` bytes of payload follow.
    Chunk {
        /// The request's cookie.
        cookie: u64,
        /// Whether this is the request's last chunk.
        done: bool,
        /// The kind of payload.
        kind: ChunkKind,
        /// Bytes of payload, as stated by the server.
        length: u32,
    },
}

impl ReplyHeader {
    /// Parses a header. Returns the header and its length in bytes, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// If the magic number belongs to neither kind of reply. The next reply in the stream can then not be found.
    pub fn parse(bytes: &[u8]) -> Result<Option<(ReplyHeader, usize)>, Malformed> {
        let Some(magic) = bytes.first_chunk() else { return Ok(None) };
        match u32::from_be_bytes(*magic) {
            SIMPLE_REPLY_MAGIC => Ok(SimpleReply::read(bytes).map(|reply| {
                let error = match reply.error.get() {
                    0 => None,
                    code => Some(ErrorCode::from_wire(code)),
                };
                let cookie = reply.cookie.get();
                (ReplyHeader::Simple { cookie, error }, SimpleReply::SIZE)
            })),
            STRUCTURED_REPLY_MAGIC => Ok(ChunkHeader::read(bytes).map(|head| {
                let flags = ChunkFlags::from_bits_retain(head.flags.get());
                let header = ReplyHeader::Chunk {
                    cookie: head.cookie.get(),
                    done: flags.contains(ChunkFlags::DONE),
                    kind: ChunkKind(head.kind.get()),
                    length: head.length.get(),
                };
                (header, ChunkHeader::SIZE)
            })),
            _ => Err(Malformed::BadMagic("reply")),
        }
    }
}

/// Parses the payload of a hole chunk into offset and length.
///
/// # Errors
/// If the payload does not have 12 bytes or the hole has length zero.
pub fn parse_hole(payload: &[u8]) -> Result<(u64, u32), Malformed> {
    let mut fields = Fields::new(payload);
    let offset = fields.u64("hole offset")?;
    let length = fields.u32("hole size")?;
    fields.end("hole size")?;
    if length == 0 {
        return Err(Malformed::BadValue("hole size"));
    }
    Ok((offset, length))
}

/// Parses the payload of a block status chunk into context id and extents, without a copy.
///
/// # Errors
/// If the context id is incomplete, or if there is no extent, an incomplete extent, or an extent of length zero.
pub fn parse_block_status(payload: &[u8]) -> Result<(u32, &[StatusExtent]), Malformed> {
    let mut fields = Fields::new(payload);
    let context = fields.u32("metadata context id")?;
    let extents = <[StatusExtent]>::ref_from_bytes(fields.rest())
        .map_err(|_| Malformed::Truncated("block status extent"))?;
    if extents.is_empty() || extents.iter().any(|extent| extent.length.get() == 0) {
        return Err(Malformed::BadValue("block status extent"));
    }
    Ok((context, extents))
}

/// The content of an error chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkFailure<'a> {
    /// The error.
    pub error: ErrorCode,
    /// The server's message; may be empty.
    pub message: &'a str,
    /// The offset of the error, for `NBD_REPLY_TYPE_ERROR_OFFSET`.
    pub offset: Option<u64>,
}

/// Parses the payload of an error chunk, also of an unknown type of error chunk.
///
/// # Errors
/// If a field is incomplete, if the message is too long or not valid text, or if the error number is zero.
pub fn parse_error(kind: ChunkKind, payload: &[u8]) -> Result<ChunkFailure<'_>, Malformed> {
    let mut fields = Fields::new(payload);
    let code = fields.u32("error number")?;
    let length = usize::from(fields.u16("error message length")?);
    let message = text(fields.bytes(length, "error message")?, "error message")?;
    if code == 0 {
        return Err(Malformed::BadValue("error number"));
    }
    let offset = match kind {
        ChunkKind::ERROR_OFFSET => Some(fields.u64("error offset")?),
        _ => None,
    };
    Ok(ChunkFailure { error: ErrorCode::from_wire(code), message, offset })
}

/// Whether a chunk at `offset` lies within the request at `request_offset`.
#[must_use]
pub fn within(request_offset: u64, request_length: u32, offset: u64, length: u32) -> bool {
    let Some(start) = offset.checked_sub(request_offset) else { return false };
    start.checked_add(u64::from(length)).is_some_and(|end| end <= u64::from(request_length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_replies_survive_a_round_trip() {
        for error in [None, Some(ErrorCode::NoSpc)] {
            let bytes = simple(42, error);
            let (header, used) = ReplyHeader::parse(bytes.as_bytes()).unwrap().unwrap();
            assert_eq!(header, ReplyHeader::Simple { cookie: 42, error });
            assert_eq!(used, 16);
        }
    }

    #[test]
    fn data_and_hole_chunks_survive_a_round_trip() {
        let data = offset_data(1, 8192, 4096, false);
        let (header, used) = ReplyHeader::parse(data.as_bytes()).unwrap().unwrap();
        assert_eq!(
            header,
            ReplyHeader::Chunk {
                cookie: 1,
                done: false,
                kind: ChunkKind::OFFSET_DATA,
                length: 4104
            }
        );
        assert_eq!(&data.as_bytes()[used..], 8192_u64.to_be_bytes());
        let hole = offset_hole(1, 4096, 512, true);
        assert_eq!(parse_hole(&hole.as_bytes()[20..]), Ok((4096, 512)));
    }

    #[test]
    fn error_chunks_survive_a_round_trip() {
        let mut out = Vec::new();
        put_error(&mut out, 3, ErrorCode::Io, "bad sector");
        let (header, used) = ReplyHeader::parse(&out).unwrap().unwrap();
        let ReplyHeader::Chunk { done: true, kind: ChunkKind::ERROR, length, .. } = header else {
            panic!("{header:?}");
        };
        assert_eq!(length as usize, out.len() - used);
        let failure = parse_error(ChunkKind::ERROR, &out[used..]).unwrap();
        assert_eq!(
            failure,
            ChunkFailure { error: ErrorCode::Io, message: "bad sector", offset: None }
        );
    }

    #[test]
    fn block_status_survives_a_round_trip() {
        let extents = [
            StatusExtent { length: 4096.into(), flags: 0.into() },
            StatusExtent { length: 512.into(), flags: 3.into() },
        ];
        let mut out = Vec::new();
        put_block_status(&mut out, 3, 1, &extents, true);
        let (context, parsed) = parse_block_status(&out[20..]).unwrap();
        assert_eq!(context, 1);
        assert_eq!(parsed.as_bytes(), extents.as_bytes());
        assert!(parse_block_status(&out[20..out.len() - 1]).is_err());
        assert!(parse_block_status(&out[20..24]).is_err());
    }

    #[test]
    fn an_unknown_reply_magic_is_an_error() {
        assert_eq!(ReplyHeader::parse(&[0; 20]), Err(Malformed::BadMagic("reply")));
        assert_eq!(ReplyHeader::parse(&[0; 3]), Ok(None));
    }

    #[test]
    fn a_chunk_outside_its_request_is_detected() {
        assert!(within(4096, 4096, 4096, 4096));
        assert!(within(4096, 4096, 8191, 1));
        assert!(!within(4096, 4096, 4095, 1));
        assert!(!within(4096, 4096, 8191, 2));
        assert!(!within(0, u32::MAX, u64::MAX, 1));
    }

    #[test]
    fn an_error_message_longer_than_its_chunk_is_refused() {
        let mut payload = 5_u32.to_be_bytes().to_vec();
        payload.extend_from_slice(&100_u16.to_be_bytes());
        payload.extend_from_slice(b"short");
        assert_eq!(
            parse_error(ChunkKind::ERROR, &payload),
            Err(Malformed::Truncated("error message"))
        );
    }
}
