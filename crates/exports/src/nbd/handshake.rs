//! The handshake of a connection over a socket. The caller limits the duration of the handshake.

use super::input::Input;
use oxblk_nbd::negotiation::MAX_OPTION_PAYLOAD;
use oxblk_nbd::wire::OptionHeader;
use oxblk_nbd::{Catalog, Negotiation, Progress, Session};
use oxblk_ring::{IoBuf, IoVec, Stream};
use std::io;
use std::sync::Arc;

/// Size in bytes of the longest option that is parsed, with its header.
const ROOM: usize = MAX_OPTION_PAYLOAD + OptionHeader::SIZE;

/// Sends the greeting and answers the client's options until the transmission phase begins. Returns the session, and the input
/// with the bytes that were received after the handshake. `may_begin` is called before the reply that starts the transmission
/// phase is sent.
///
/// # Errors
/// If the socket fails, the client closes the connection, `may_begin` returns false, or the negotiation ends the connection
/// (`InvalidData`), for example because the client aborts or violates the protocol.
pub(super) async fn handshake(
    stream: &Stream,
    mut input: Input,
    catalog: Arc<Catalog>,
    may_begin: impl Fn() -> bool,
) -> io::Result<(Session, Input)> {
    send(stream, Negotiation::greeting().to_vec()).await?;
    let mut machine = Negotiation::new(catalog);
    let mut out = Vec::new();
    loop {
        let (used, progress) = machine.advance(input.bytes(), &mut out);
        input.consume(used);
        if matches!(progress, Progress::Ready(_)) && !may_begin() {
            return Err(io::Error::other("cancelled to admit another client"));
        }
        if !out.is_empty() {
            send(stream, std::mem::take(&mut out)).await?;
        }
        match progress {
            Progress::Again => {}
            Progress::Ready(session) => return Ok((session, input)),
            Progress::Close(reason) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason.to_string()));
            }
            Progress::More => {
                if !input.fill(stream, ROOM).await? {
                    let message = "client hung up during the negotiation";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
                }
            }
        }
    }
}

async fn send(stream: &Stream, bytes: Vec<u8>) -> io::Result<()> {
    stream.send_all(IoVec::from_iter([IoBuf::from(bytes)])).await
}
