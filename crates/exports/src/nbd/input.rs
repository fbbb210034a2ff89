//! The receive buffer of a connection.
//!
//! One block of [`BLOCK`] bytes takes what one receive brings: requests are parsed in place, and the
//! payload of a small write is cut out of the block without a copy (the block lives on until the
//! write is done, and the input goes on behind it or in a new block). The payload of a larger write
//! gets a buffer of its own: what is in the block already is copied there, the rest is received
//! straight into it.

use oxblk_ring::{IoBufMut, Stream};
use std::io;

/// Size of a block in bytes.
pub(super) const BLOCK: usize = 64 << 10;
/// Payloads up to this many bytes are cut out of the block.
const CUT: usize = 16 << 10;
/// With less room than this a new block is begun.
const LEAST_ROOM: usize = 4 << 10;

/// What was received and not yet taken: `block[start..end]`.
#[derive(Debug)]
pub(super) struct Input {
    block: IoBufMut,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { block: IoBufMut::new(BLOCK), start: 0, end: 0 }
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        self.block.get(self.start..self.end).unwrap_or(&[])
    }

    /// Takes `len` bytes off the front; no more than there are.
    pub(super) fn consume(&mut self, len: usize) {
        self.start = self.end.min(self.start + len);
    }

    /// Receives once more, with room for `want` bytes in all. Returns false at the end of the stream.
    pub(super) async fn fill(&mut self, stream: &Stream, want: usize) -> io::Result<bool> {
        self.make_room(want);
        let tail = self.block.split_off(self.end);
        let (result, tail) = stream.recv(tail).await;
        if self.block.unsplit(tail).is_err() {
            return Err(io::Error::other("receive buffer was exchanged"));
        }
        let received = result?;
        self.end += received;
        Ok(received > 0)
    }

    fn make_room(&mut self, want: usize) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        let too_small = self.block.len() - self.start < want;
        if !too_small && self.block.len() - self.end >= LEAST_ROOM {
            return;
        }
        let mut block = IoBufMut::new(BLOCK.max(want));
        let rest = self.bytes();
        let len = rest.len();
        if let Some(front) = block.get_mut(..len) {
            front.copy_from_slice(rest);
        }
        *self = Input { block, start: 0, end: len };
    }

    /// Takes a payload of `len` bytes. `None` at the end of the stream.
    pub(super) async fn payload(
        &mut self,
        stream: &Stream,
        len: usize,
    ) -> io::Result<Option<IoBufMut>> {
        if len <= CUT {
            while self.bytes().len() < len {
                if !self.fill(stream, len).await? {
                    return Ok(None);
                }
            }
            return Ok(Some(self.cut(len)));
        }
        let mut payload = IoBufMut::new(len);
        let there = self.bytes().len().min(len);
        if let (Some(front), Some(bytes)) = (payload.get_mut(..there), self.bytes().get(..there)) {
            front.copy_from_slice(bytes);
        }
        self.consume(there);
        if there < len {
            let tail = payload.split_off(there);
            let tail = match stream.recv_exact(tail).await {
                Ok(tail) => tail,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            };
            if payload.unsplit(tail).is_err() {
                return Err(io::Error::other("receive buffer was exchanged"));
            }
        }
        Ok(Some(payload))
    }

    /// Cuts `len` bytes, which are there, out of the block.
    fn cut(&mut self, len: usize) -> IoBufMut {
        let mut front = self.block.split_to(self.start + len);
        let payload = front.split_off(self.start);
        self.end -= self.start + len;
        self.start = 0;
        payload
    }

    /// Drops `len` bytes of the stream. Returns false at its end.
    pub(super) async fn skip(&mut self, stream: &Stream, mut len: usize) -> io::Result<bool> {
        loop {
            let there = self.bytes().len().min(len);
            self.consume(there);
            len -= there;
            if len == 0 {
                return Ok(true);
            }
            if !self.fill(stream, 0).await? {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oxblk_ring::{IoBuf, IoVec, block_on};

    async fn send(stream: &Stream, bytes: &[u8]) {
        let buf: IoBuf = bytes.to_vec().into();
        stream.send_all(IoVec::from_iter([buf])).await.unwrap();
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    #[test]
    fn payloads_of_every_size_come_out_as_they_went_in() {
        block_on(async {
            for len in [1, 27, 512, CUT - 1, CUT, CUT + 1, BLOCK - 3, BLOCK, BLOCK + 1, 150_000] {
                let (client, server) = Stream::pair().unwrap();
                let data = pattern(len);
                let sender = oxblk_ring::spawn({
                    let data = data.clone();
                    async move {
                        for _ in 0..5 {
                            send(&client, b"head").await;
                            send(&client, &data).await;
                        }
                    }
                });
                let mut input = Input::new();
                for _ in 0..5 {
                    while input.bytes().len() < 4 {
                        assert!(input.fill(&server, 4).await.unwrap());
                    }
                    assert_eq!(&input.bytes()[..4], b"head");
                    input.consume(4);
                    let payload = input.payload(&server, len).await.unwrap().unwrap();
                    assert!(*payload == *data, "length {len}");
                }
                sender.await;
                assert!(!input.fill(&server, 4).await.unwrap());
            }
        });
    }

    #[test]
    fn small_payloads_of_one_receive_are_not_copied() {
        block_on(async {
            let (client, server) = Stream::pair().unwrap();
            send(&client, &pattern(8192)).await;
            let mut input = Input::new();
            while input.bytes().len() < 8192 {
                assert!(input.fill(&server, 8192).await.unwrap());
            }
            let mut first = input.payload(&server, 4096).await.unwrap().unwrap();
            let second = input.payload(&server, 4096).await.unwrap().unwrap();
            assert!(first.unsplit(second).is_ok());
        });
    }

    #[test]
    fn the_end_of_the_stream_inside_a_payload_is_seen() {
        block_on(async {
            for len in [4096, 100_000] {
                let (client, server) = Stream::pair().unwrap();
                send(&client, b"only this").await;
                drop(client);
                let mut input = Input::new();
                assert!(input.payload(&server, len).await.unwrap().is_none());
                let mut input = Input::new();
                assert!(!input.skip(&server, len).await.unwrap());
            }
        });
    }
}
