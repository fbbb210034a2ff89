//! Fuzzes a client's parsers with arbitrary bytes from a server, and the URI parser with arbitrary text.

use oxblk_nbd::proto::ChunkKind;
use oxblk_nbd::reply::{self, ReplyHeader};
use oxblk_nbd::{NbdUri, info};

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let _ = info::Info::parse(data);
    let _ = info::parse_server(data);
    let _ = info::parse_meta_context(data);
    if let Ok(Some((ReplyHeader::Chunk { kind, .. }, used))) = ReplyHeader::parse(data) {
        let _ = reply::parse_error(kind, &data[used..]);
    }
    let _ = reply::parse_hole(data);
    let _ = reply::parse_error(ChunkKind::ERROR_OFFSET, data);
    if let Ok((_, extents)) = reply::parse_block_status(data) {
        assert!(extents.iter().all(|extent| extent.length.get() != 0));
    }
    if let Some(uri) = std::str::from_utf8(data).ok().and_then(|text| NbdUri::parse(text).ok()) {
        assert_eq!(NbdUri::parse(&uri.to_string()), Ok(uri));
    }
}
