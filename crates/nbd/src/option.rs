//! Payloads of option requests: the server parses them, the client writes them.
//!
//! A payload is parsed only when it is completely in memory. Every length and every count is checked against the
//! remaining bytes of the payload. Names and queries are borrowed from the payload, so no number from the peer causes
//! an allocation.

use crate::error::Malformed;
use crate::proto::{InfoKind, MAX_STRING, OPTION_MAGIC, OptionKind};
use crate::wire::OptionHeader;
use zerocopy::IntoBytes;

/// Takes fields from the front of a payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Fields<'a> {
        Fields { rest: payload }
    }

    pub(crate) fn bytes(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.rest.split_at_checked(len).ok_or(Malformed::Truncated(what))?;
        self.rest = tail;
        Ok(head)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(Malformed::Truncated(what))?;
        self.rest = tail;
        Ok(u16::from_be_bytes(*head))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(Malformed::Truncated(what))?;
        self.rest = tail;
        Ok(u32::from_be_bytes(*head))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(Malformed::Truncated(what))?;
        self.rest = tail;
        Ok(u64::from_be_bytes(*head))
    }

    /// A string preceded by its 32-bit length.
    pub(crate) fn string(&mut self, what: &'static str) -> Result<&'a str, Malformed> {
        let len = usize::try_from(self.u32(what)?).map_err(|_| Malformed::StringTooLong(what))?;
        text(self.bytes(len, what)?, what)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(self, what: &'static str) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::TrailingBytes(what)) }
    }
}

/// Checks the rules for strings (section "Conventions"): UTF-8, no NUL, at most 4096 bytes.
pub(crate) fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed::StringTooLong(what));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Malformed::BadString(what)),
    }
}

/// Payload of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Name of the export; empty for the default export.
    pub name: &'a str,
    /// The information types that the client asks for, in wire format.
    kinds: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// Parses a complete payload.
    ///
    /// # Errors
    /// If a field is incomplete, bytes remain, or the name is not a valid string.
    pub fn parse(payload: &'a [u8]) -> Result<InfoRequest<'a>, Malformed> {
        let mut fields = Fields::new(payload);
        let name = fields.string("export name")?;
        let count = usize::from(fields.u16("number of information requests")?);
        let kinds = fields.bytes(count * 2, "information requests")?;
        fields.end("information requests")?;
        Ok(InfoRequest { name, kinds })
    }

    /// Whether the client asked for `kind`.
    #[must_use]
    pub fn wants(&self, kind: InfoKind) -> bool {
        self.kinds.chunks_exact(2).any(|pair| pair == kind.0.to_be_bytes())
    }
}

/// Payload of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// Name of the queried export.
    pub name: &'a str,
    /// Number of queries.
    pub count: u32,
    queries: &'a [u8],
}

impl<'a> MetaContextRequest<'a> {
    /// Parses a complete payload with all its queries.
    ///
    /// # Errors
    /// If a field is incomplete, bytes remain, or a string is invalid.
    pub fn parse(payload: &'a [u8]) -> Result<MetaContextRequest<'a>, Malformed> {
        let mut fields = Fields::new(payload);
        let name = fields.string("export name")?;
        let count = fields.u32("number of queries")?;
        let queries = fields.rest();
        // A query takes at least four bytes, so the loop runs at most once per four bytes of payload.
        for _ in 0..count {
            fields.string("metadata context query")?;
        }
        fields.end("metadata context queries")?;
        Ok(MetaContextRequest { name, count, queries })
    }

    /// The queries in the client's order.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> {
        let mut fields = Fields::new(self.queries);
        std::iter::from_fn(move || fields.string("metadata context query").ok())
    }
}

/// Appends an option request with any payload.
///
/// # Errors
/// If the payload's length does not fit in 32 bits.
pub fn put_option(out: &mut Vec<u8>, option: OptionKind, payload: &[u8]) -> Result<(), Malformed> {
    let length =
        u32::try_from(payload.len()).map_err(|_| Malformed::BadValue("option payload length"))?;
    let header =
        OptionHeader { magic: OPTION_MAGIC.into(), option: option.0.into(), length: length.into() };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// The payload of `NBD_OPT_INFO` or `NBD_OPT_GO`.
///
/// # Errors
/// If the name is not a valid string (longer than [`MAX_STRING`], or with a NUL), or if there are more than 65,535
/// kinds.
pub fn info_request(name: &str, kinds: &[InfoKind]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(6 + name.len() + 2 * kinds.len());
    put_string(&mut out, name, "export name")?;
    let count =
        u16::try_from(kinds.len()).map_err(|_| Malformed::BadValue("information requests"))?;
    out.extend_from_slice(&count.to_be_bytes());
    for kind in kinds {
        out.extend_from_slice(&kind.0.to_be_bytes());
    }
    Ok(out)
}

/// The payload of `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`.
///
/// # Errors
/// If a string is longer than [`MAX_STRING`] or contains a NUL, or if the number of queries does not fit in 32 bits.
pub fn meta_context_request(name: &str, queries: &[&str]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::new();
    put_string(&mut out, name, "export name")?;
    let count = u32::try_from(queries.len()).map_err(|_| Malformed::BadValue("queries"))?;
    out.extend_from_slice(&count.to_be_bytes());
    for query in queries {
        put_string(&mut out, query, "metadata context query")?;
    }
    Ok(out)
}

fn put_string(out: &mut Vec<u8>, string: &str, what: &'static str) -> Result<(), Malformed> {
    text(string.as_bytes(), what)?;
    let len = u32::try_from(string.len()).map_err(|_| Malformed::StringTooLong(what))?;
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(string.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_request_survives_a_round_trip() {
        let payload = info_request("disk", &[InfoKind::BLOCK_SIZE, InfoKind::NAME]).unwrap();
        let request = InfoRequest::parse(&payload).unwrap();
        assert_eq!(request.name, "disk");
        assert!(request.wants(InfoKind::BLOCK_SIZE));
        assert!(request.wants(InfoKind::NAME));
        assert!(!request.wants(InfoKind::DESCRIPTION));
    }

    #[test]
    fn info_request_refuses_every_truncation_and_every_extra_byte() {
        let mut payload = info_request("disk", &[InfoKind::BLOCK_SIZE]).unwrap();
        for cut in 0..payload.len() {
            assert!(InfoRequest::parse(&payload[..cut]).is_err(), "cut at {cut}");
        }
        payload.push(0);
        assert_eq!(
            InfoRequest::parse(&payload),
            Err(Malformed::TrailingBytes("information requests"))
        );
    }

    #[test]
    fn a_name_length_of_four_gigabytes_is_a_truncated_payload() {
        let mut payload = u32::MAX.to_be_bytes().to_vec();
        payload.extend_from_slice(b"disk\0\0");
        assert_eq!(InfoRequest::parse(&payload), Err(Malformed::Truncated("export name")));
    }

    #[test]
    fn strings_with_nul_or_bad_utf8_or_over_the_limit_are_refused() {
        assert_eq!(text(b"a\0b", "x"), Err(Malformed::BadString("x")));
        assert_eq!(text(b"\xff", "x"), Err(Malformed::BadString("x")));
        assert_eq!(text(&[b'a'; 4097], "x"), Err(Malformed::StringTooLong("x")));
        assert!(text(&[b'a'; 4096], "x").is_ok());
    }

    #[test]
    fn meta_context_request_survives_a_round_trip() {
        let payload = meta_context_request("d", &["base:allocation", "qemu:", ""]).unwrap();
        let request = MetaContextRequest::parse(&payload).unwrap();
        assert_eq!((request.name, request.count), ("d", 3));
        assert_eq!(request.queries().collect::<Vec<_>>(), ["base:allocation", "qemu:", ""]);
    }

    #[test]
    fn a_count_of_four_billion_queries_ends_at_the_end_of_the_payload() {
        let mut payload = meta_context_request("d", &["base:"]).unwrap();
        payload[5..9].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(
            MetaContextRequest::parse(&payload),
            Err(Malformed::Truncated("metadata context query"))
        );
    }
}
