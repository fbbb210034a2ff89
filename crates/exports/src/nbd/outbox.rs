//! Replies that wait to be sent.
//!
//! The headers of replies are written one after the other into a small buffer. The data of a read is not copied: the
//! buffer that contains the data is sent after the header. Replies that arrive during a send are sent by the next send,
//! as one scatter list.

use super::execute::{Cost, Outcome, Reply};
use oxblk_nbd::proto::MAX_STRING;
use oxblk_nbd::wire::{ChunkHeader, OffsetDataHeader, OffsetHole, SimpleReply};
use oxblk_nbd::{ErrorCode, Session, reply};
use oxblk_ring::{IoBuf, IoBufMut, IoVec};
use zerocopy::IntoBytes;

/// Size in bytes of the buffer for headers.
const HEADS: usize = 4096;
/// Zeroes are detected in pieces of this number of bytes.
const HOLE: usize = 64 << 10;

/// A batch to send.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) bufs: IoVec,
    /// Number of replies that end in this batch.
    pub(super) replies: usize,
    /// Total cost of the replies that end in this batch.
    pub(super) cost: Cost,
}

pub(super) struct Outbox {
    session: Session,
    batch: Batch,
    heads: IoBufMut,
    /// Number of bytes in `heads` that are not yet in the batch.
    filled: usize,
}

impl Outbox {
    pub(super) fn new(session: Session) -> Outbox {
        Outbox { session, batch: Batch::default(), heads: IoBufMut::new(HEADS), filled: 0 }
    }

    /// Adds a reply.
    pub(super) fn push(&mut self, reply: Reply) {
        self.batch.replies += 1;
        self.batch.cost.data += reply.cost.data;
        self.batch.cost.held += reply.cost.held;
        match reply.outcome {
            Outcome::Done if self.session.structured => {
                self.head(reply::none(reply.cookie).as_bytes());
            }
            Outcome::Done => self.head(reply::simple(reply.cookie, None).as_bytes()),
            Outcome::Data { offset, data, whole } if self.session.structured => {
                self.structured_data(reply.cookie, offset, data, whole);
            }
            Outcome::Data { data, .. } => {
                self.head(reply::simple(reply.cookie, None).as_bytes());
                self.data(data);
            }
            Outcome::Status(extents) => {
                let context = self.session.base_allocation.unwrap_or(0);
                let mut bytes = Vec::with_capacity(ChunkHeader::SIZE + 4 + extents.len() * 8);
                reply::put_block_status(&mut bytes, reply.cookie, context, &extents, true);
                self.data(bytes.into());
            }
            Outcome::Failed(error, message) => self.failure(reply.cookie, error, &message),
        }
    }

    /// Adds the data of a read as chunks. Zeroes become hole chunks. With `whole`, the data is added as one data chunk.
    fn structured_data(&mut self, cookie: u64, mut offset: u64, mut data: IoBuf, whole: bool) {
        if data.is_empty() {
            return self.head(reply::none(cookie).as_bytes());
        }
        while !data.is_empty() {
            let (len, zero) = if whole { (data.len(), false) } else { next_run(&data) };
            let piece = data.split_to(len);
            let (length, done) = (u32::try_from(len).unwrap_or(u32::MAX), data.is_empty());
            if zero {
                self.head(reply::offset_hole(cookie, offset, length, done).as_bytes());
            } else {
                self.head(reply::offset_data(cookie, offset, length, done).as_bytes());
                self.data(piece);
            }
            offset = offset.saturating_add(u64::from(length));
        }
    }

    fn failure(&mut self, cookie: u64, error: ErrorCode, message: &str) {
        if self.session.structured {
            let mut bytes = Vec::with_capacity(ChunkHeader::SIZE + message.len().min(MAX_STRING));
            reply::put_error(&mut bytes, cookie, error, message);
            self.data(bytes.into());
        } else {
            self.head(reply::simple(cookie, Some(error)).as_bytes());
        }
    }

    /// Appends a header.
    fn head(&mut self, bytes: &[u8]) {
        const {
            assert!(OffsetHole::SIZE <= HEADS && SimpleReply::SIZE <= HEADS);
            assert!(OffsetDataHeader::SIZE <= HEADS);
        }
        if self.heads.len() - self.filled < bytes.len() {
            self.close_heads();
            self.heads = IoBufMut::new(HEADS);
        }
        let end = self.filled + bytes.len();
        if let Some(place) = self.heads.get_mut(self.filled..end) {
            place.copy_from_slice(bytes);
        }
        self.filled = end;
    }

    fn data(&mut self, data: IoBuf) {
        self.close_heads();
        self.batch.bufs.push(data);
    }

    /// Moves the headers in `heads` into the batch.
    fn close_heads(&mut self) {
        if self.filled > 0 {
            let heads = self.heads.split_to(self.filled).freeze();
            self.batch.bufs.push(heads);
            self.filled = 0;
        }
    }

    /// Takes all collected replies; `None` if there are no replies.
    pub(super) fn take(&mut self) -> Option<Batch> {
        self.close_heads();
        if self.batch.bufs.is_empty() {
            return None;
        }
        Some(std::mem::take(&mut self.batch))
    }
}

/// Length of the run of data or of zeroes at the start of `data`, and whether the run consists of zeroes. A run
/// consists of pieces of [`HOLE`] bytes; only the last piece of `data` may be shorter.
fn next_run(data: &IoBuf) -> (usize, bool) {
    let mut pieces = data.chunks(HOLE);
    let first = pieces.next().map_or((0, false), |piece| (piece.len(), oxblk_ring::is_zero(piece)));
    let (mut len, zero) = first;
    for piece in pieces {
        if oxblk_ring::is_zero(piece) != zero {
            break;
        }
        len += piece.len();
    }
    (len, zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oxblk_nbd::proto::{ChunkKind, TransmissionFlags};
    use oxblk_nbd::reply::ReplyHeader;

    fn outbox(structured: bool) -> Outbox {
        Outbox::new(Session {
            export: 0,
            size: 1 << 30,
            flags: TransmissionFlags::HAS_FLAGS,
            structured,
            base_allocation: None,
        })
    }

    fn read(cookie: u64, data: Vec<u8>, whole: bool) -> Reply {
        let outcome = Outcome::Data { offset: 1 << 20, data: data.into(), whole };
        Reply { cookie, outcome, cost: Cost::default() }
    }

    fn bytes(batch: &Batch) -> Vec<u8> {
        batch.bufs.iter().flat_map(|buf| buf.iter().copied()).collect()
    }

    /// Parses the chunks of a batch: kind, offset, length of the range, and whether the chunk is the last one of its reply.
    fn chunks(mut bytes: &[u8]) -> Vec<(ChunkKind, u64, usize, bool)> {
        let mut chunks = Vec::new();
        while !bytes.is_empty() {
            let (header, used) = ReplyHeader::parse(bytes).unwrap().unwrap();
            let ReplyHeader::Chunk { done, kind, length, .. } = header else {
                panic!("{header:?}")
            };
            let payload = &bytes[used..used + length as usize];
            let (offset, len) = match kind {
                ChunkKind::OFFSET_HOLE => {
                    reply::parse_hole(payload).map(|(o, l)| (o, l as usize)).unwrap()
                }
                ChunkKind::OFFSET_DATA => {
                    (u64::from_be_bytes(*payload.first_chunk().unwrap()), payload.len() - 8)
                }
                _ => (0, 0),
            };
            chunks.push((kind, offset, len, done));
            bytes = &bytes[used + length as usize..];
        }
        chunks
    }

    #[test]
    fn replies_without_data_are_sent_as_one_buffer() {
        let mut outbox = outbox(false);
        for cookie in 0..50 {
            outbox.push(Reply { cookie, outcome: Outcome::Done, cost: Cost::default() });
        }
        let batch = outbox.take().unwrap();
        assert_eq!((batch.bufs.len(), batch.replies), (1, 50));
        assert_eq!(bytes(&batch).len(), 50 * SimpleReply::SIZE);
        assert!(outbox.take().is_none());
    }

    #[test]
    fn headers_that_do_not_fit_in_one_buffer_keep_their_order() {
        let mut outbox = outbox(true);
        for cookie in 0..300 {
            outbox.push(Reply { cookie, outcome: Outcome::Done, cost: Cost::default() });
        }
        let bytes = bytes(&outbox.take().unwrap());
        for (cookie, chunk) in (0..).zip(bytes.chunks(ChunkHeader::SIZE)) {
            let header = ReplyHeader::parse(chunk).unwrap().unwrap().0;
            let kind = ChunkKind::NONE;
            assert_eq!(header, ReplyHeader::Chunk { cookie, done: true, kind, length: 0 });
        }
    }

    #[test]
    fn read_data_is_sent_from_the_buffer_it_was_read_into() {
        let mut outbox = outbox(true);
        let data: IoBuf = vec![1; 4096].into();
        let address = data.as_ptr();
        let outcome = Outcome::Data { offset: 0, data, whole: false };
        outbox.push(Reply { cookie: 1, outcome, cost: Cost::default() });
        let batch = outbox.take().unwrap();
        assert_eq!(batch.bufs.last().unwrap().as_ptr(), address);
        assert_eq!(chunks(&bytes(&batch)), [(ChunkKind::OFFSET_DATA, 0, 4096, true)]);
    }

    #[test]
    fn zeroes_are_sent_as_holes_unless_the_client_wants_one_chunk() {
        let mut data = vec![0; 3 * HOLE + 100];
        data[HOLE] = 1;
        let offset = 1 << 20;
        let mut outbox = outbox(true);
        outbox.push(read(1, data.clone(), false));
        let parts = chunks(&bytes(&outbox.take().unwrap()));
        let hole = HOLE as u64;
        assert_eq!(
            parts,
            [
                (ChunkKind::OFFSET_HOLE, offset, HOLE, false),
                (ChunkKind::OFFSET_DATA, offset + hole, HOLE, false),
                (ChunkKind::OFFSET_HOLE, offset + 2 * hole, HOLE + 100, true),
            ]
        );
        outbox.push(read(1, data, true));
        let parts = chunks(&bytes(&outbox.take().unwrap()));
        assert_eq!(parts, [(ChunkKind::OFFSET_DATA, offset, 3 * HOLE + 100, true)]);
        outbox.push(read(1, Vec::new(), false));
        assert_eq!(chunks(&bytes(&outbox.take().unwrap())), [(ChunkKind::NONE, 0, 0, true)]);
    }

    #[test]
    fn an_error_message_is_sent_only_in_structured_replies() {
        for (structured, length) in [(true, 20 + 6 + 5), (false, 16)] {
            let mut outbox = outbox(structured);
            let outcome = Outcome::Failed(ErrorCode::Io, "alas!".into());
            outbox.push(Reply { cookie: 1, outcome, cost: Cost::default() });
            assert_eq!(bytes(&outbox.take().unwrap()).len(), length);
        }
    }
}
