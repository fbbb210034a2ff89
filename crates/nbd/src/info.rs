//! Option replies: the server writes them, the client parses them.
//!
//! The writers append complete replies (header and payload) to a buffer, which the server sends in one piece. The
//! parsers take the payload of one reply. The client has already read the header of the reply and checked the length
//! against a limit.

use crate::error::Malformed;
use crate::option::{Fields, text};
use crate::proto::{InfoKind, OPTION_REPLY_MAGIC, OptionKind, ReplyKind, TransmissionFlags};
use crate::wire::{InfoBlockSize, InfoExport, OptionReplyHeader};
use zerocopy::IntoBytes;

/// Request sizes that an export advertises (section "Block size constraints"), in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest addressable unit, a power of two up to 65,536.
    pub minimum: u32,
    /// Size and alignment that make requests efficient, a power of two. At least 512, and at least `minimum`.
    pub preferred: u32,
    /// Largest request: a multiple of `minimum`, or `u32::MAX` for no limit.
    pub maximum: u32,
}

impl Default for BlockSizes {
    fn default() -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }
}

/// Appends one reply, whose payload is the concatenation of `parts`. The callers limit the payload to a few
/// kilobytes.
fn put_reply(out: &mut Vec<u8>, option: OptionKind, kind: ReplyKind, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let header = OptionReplyHeader {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.0.into(),
        kind: kind.0.into(),
        length: u32::try_from(length).unwrap_or(u32::MAX).into(),
    };
    out.extend_from_slice(header.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends `NBD_REP_ACK`.
pub fn put_ack(out: &mut Vec<u8>, option: OptionKind) {
    put_reply(out, option, ReplyKind::ACK, &[]);
}

/// Appends an error reply with a human-readable message.
pub fn put_error(out: &mut Vec<u8>, option: OptionKind, kind: ReplyKind, message: &str) {
    let message = truncated(message);
    put_reply(out, option, kind, &[message.as_bytes()]);
}

/// Appends `NBD_REP_SERVER` for one export.
pub fn put_server(out: &mut Vec<u8>, option: OptionKind, name: &str, description: &str) {
    let (name, description) = (truncated(name), truncated(description));
    let len = u32::try_from(name.len()).unwrap_or(0).to_be_bytes();
    let parts: [&[u8]; 3] = [&len, name.as_bytes(), description.as_bytes()];
    put_reply(out, option, ReplyKind::SERVER, &parts);
}

/// Appends `NBD_INFO_EXPORT`.
pub fn put_info_export(out: &mut Vec<u8>, option: OptionKind, size: u64, flags: TransmissionFlags) {
    let info = InfoExport {
        kind: InfoKind::EXPORT.0.into(),
        size: size.into(),
        flags: flags.bits().into(),
    };
    put_reply(out, option, ReplyKind::INFO, &[info.as_bytes()]);
}

/// Appends `NBD_INFO_NAME` or `NBD_INFO_DESCRIPTION`.
pub fn put_info_text(out: &mut Vec<u8>, option: OptionKind, kind: InfoKind, value: &str) {
    let parts: [&[u8]; 2] = [&kind.0.to_be_bytes(), truncated(value).as_bytes()];
    put_reply(out, option, ReplyKind::INFO, &parts);
}

/// Appends `NBD_INFO_BLOCK_SIZE`.
pub fn put_info_block_size(out: &mut Vec<u8>, option: OptionKind, sizes: BlockSizes) {
    let info = InfoBlockSize {
        kind: InfoKind::BLOCK_SIZE.0.into(),
        minimum: sizes.minimum.into(),
        preferred: sizes.preferred.into(),
        maximum: sizes.maximum.into(),
    };
    put_reply(out, option, ReplyKind::INFO, &[info.as_bytes()]);
}

/// Appends `NBD_REP_META_CONTEXT`.
pub fn put_meta_context(out: &mut Vec<u8>, option: OptionKind, id: u32, name: &str) {
    let parts: [&[u8]; 2] = [&id.to_be_bytes(), truncated(name).as_bytes()];
    put_reply(out, option, ReplyKind::META_CONTEXT, &parts);
}

/// Truncates a string to the protocol's limit, at a character boundary.
fn truncated(string: &str) -> &str {
    let end = string.floor_char_boundary(crate::proto::MAX_STRING);
    string.get(..end).unwrap_or("")
}

/// Information of one type about an export, as a client receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size and capabilities of the export.
    Export {
        /// Size in bytes.
        size: u64,
        /// Transmission flags, including unknown bits.
        flags: TransmissionFlags,
    },
    /// Canonical name.
    Name(&'a str),
    /// Human-readable description.
    Description(&'a str),
    /// Request sizes, validated.
    BlockSize(BlockSizes),
    /// An unknown type, which clients ignore.
    Unknown(InfoKind),
}

impl<'a> Info<'a> {
    /// Parses the payload of `NBD_REP_INFO`.
    ///
    /// # Errors
    /// If the payload does not have the length that its type requires, or if a string or the block sizes are invalid.
    pub fn parse(payload: &'a [u8]) -> Result<Info<'a>, Malformed> {
        let mut fields = Fields::new(payload);
        let kind = InfoKind(fields.u16("information type")?);
        match kind {
            InfoKind::EXPORT => {
                let size = fields.u64("export size")?;
                let flags = TransmissionFlags::from_bits_retain(fields.u16("transmission flags")?);
                fields.end("transmission flags")?;
                Ok(Info::Export { size, flags })
            }
            InfoKind::NAME => Ok(Info::Name(text(fields.rest(), "export name")?)),
            InfoKind::DESCRIPTION => Ok(Info::Description(text(fields.rest(), "description")?)),
            InfoKind::BLOCK_SIZE => {
                let minimum = fields.u32("minimum block size")?;
                let preferred = fields.u32("preferred block size")?;
                let maximum = fields.u32("maximum block size")?;
                fields.end("maximum block size")?;
                Ok(Info::BlockSize(checked_sizes(minimum, preferred, maximum)?))
            }
            other => Ok(Info::Unknown(other)),
        }
    }
}

fn checked_sizes(minimum: u32, preferred: u32, maximum: u32) -> Result<BlockSizes, Malformed> {
    if !minimum.is_power_of_two() || minimum > 65536 {
        return Err(Malformed::BadValue("minimum block size"));
    }
    if !preferred.is_power_of_two() || preferred < minimum.max(512) {
        return Err(Malformed::BadValue("preferred block size"));
    }
    if maximum == 0 || (maximum != u32::MAX && !maximum.is_multiple_of(minimum)) {
        return Err(Malformed::BadValue("maximum block size"));
    }
    Ok(BlockSizes { minimum, preferred, maximum })
}

/// Parses the payload of `NBD_REP_SERVER` into name and description.
///
/// # Errors
/// If the name extends past the payload or a string is invalid.
pub fn parse_server(payload: &[u8]) -> Result<(&str, &str), Malformed> {
    let mut fields = Fields::new(payload);
    let name = fields.string("export name")?;
    Ok((name, text(fields.rest(), "description")?))
}

/// Parses the payload of `NBD_REP_META_CONTEXT` into id and name.
///
/// # Errors
/// If the payload is too short or the name is invalid.
pub fn parse_meta_context(payload: &[u8]) -> Result<(u32, &str), Malformed> {
    let mut fields = Fields::new(payload);
    let id = fields.u32("metadata context id")?;
    Ok((id, text(fields.rest(), "metadata context name")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(out: &[u8], kind: ReplyKind) -> &[u8] {
        let header = OptionReplyHeader::read(out).unwrap();
        assert_eq!(header.magic.get(), OPTION_REPLY_MAGIC);
        assert_eq!(ReplyKind(header.kind.get()), kind);
        let payload = &out[OptionReplyHeader::SIZE..];
        assert_eq!(header.length.get() as usize, payload.len());
        payload
    }

    #[test]
    fn information_survives_a_round_trip() {
        let mut out = Vec::new();
        put_info_export(&mut out, OptionKind::GO, 77, TransmissionFlags::HAS_FLAGS);
        assert_eq!(
            Info::parse(payload(&out, ReplyKind::INFO)),
            Ok(Info::Export { size: 77, flags: TransmissionFlags::HAS_FLAGS })
        );
        out.clear();
        put_info_block_size(&mut out, OptionKind::GO, BlockSizes::default());
        assert_eq!(
            Info::parse(payload(&out, ReplyKind::INFO)),
            Ok(Info::BlockSize(BlockSizes::default()))
        );
        out.clear();
        put_info_text(&mut out, OptionKind::GO, InfoKind::DESCRIPTION, "a disk");
        assert_eq!(Info::parse(payload(&out, ReplyKind::INFO)), Ok(Info::Description("a disk")));
        out.clear();
        put_server(&mut out, OptionKind::LIST, "name", "text");
        assert_eq!(parse_server(payload(&out, ReplyKind::SERVER)), Ok(("name", "text")));
        out.clear();
        put_meta_context(&mut out, OptionKind::SET_META_CONTEXT, 9, "base:allocation");
        assert_eq!(
            parse_meta_context(payload(&out, ReplyKind::META_CONTEXT)),
            Ok((9, "base:allocation"))
        );
    }

    #[test]
    fn invalid_block_sizes_are_refused() {
        for (minimum, preferred, maximum) in [
            (0, 4096, 4096),
            (3, 4096, 4096),
            (1, 256, 4096),
            (512, 512, 100),
            (1 << 17, 1 << 17, 0),
        ] {
            assert!(checked_sizes(minimum, preferred, maximum).is_err());
        }
        assert!(checked_sizes(512, 4096, u32::MAX).is_ok());
    }

    #[test]
    fn long_messages_are_truncated_at_a_character_boundary() {
        let mut out = Vec::new();
        let message = "é".repeat(4000);
        put_error(&mut out, OptionKind::GO, ReplyKind::ERR_UNKNOWN, &message);
        let text = payload(&out, ReplyKind::ERR_UNKNOWN);
        assert_eq!(text.len(), 4096);
        assert!(std::str::from_utf8(text).is_ok());
    }
}
