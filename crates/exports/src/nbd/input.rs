//! The receive buffer of a connection.
//!
//! The input receives into a block of [`BLOCK`] bytes. Requests are parsed in the block. The payload of a small write is split
//! off the block without a copy, so the block stays allocated until the write completes. The input continues after the payload,
//! or in a new block. Bytes that were received but not yet consumed are copied to the new block. The payload of a larger write
//! gets its own buffer: the part that is already in the block is copied to this buffer, and the remaining part is received
//! directly into it.
//!
//! Every block is accounted in the connection's account. The buffer of a larger write is accounted step by step while it is
//! filled, because pages that are not yet written take no memory. A block from which payloads were split off is accounted until
//! the last payload is dropped.

use super::account::{Account, Hold, footprint};
use oxblk_ring::{IoBufMut, Stream};
use std::io;
use std::rc::Rc;

/// Size of a block in bytes.
pub(super) const BLOCK: usize = 64 << 10;
/// Payloads of up to this number of bytes are split off the block.
const CUT: usize = 16 << 10;
/// If the block has fewer free bytes than this number, a new block is started.
const MIN_ROOM: usize = 4 << 10;
/// A larger payload is received and accounted in steps of this number of bytes.
const STEP: usize = 1 << 20;

/// The receive buffer. `block[start..end]` contains the bytes that have been received and not yet consumed.
pub(super) struct Input {
    account: Rc<Account>,
    block: IoBufMut,
    hold: Rc<Hold>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new(account: Rc<Account>) -> Input {
        let hold = Hold::first(&account, BLOCK);
        Input { account, block: IoBufMut::new(BLOCK), hold, start: 0, end: 0 }
    }

    /// The available bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.block.get(self.start..self.end).unwrap_or(&[])
    }

    /// Consumes `len` bytes from the front. At least `len` bytes must be available.
    pub(super) fn consume(&mut self, len: usize) {
        self.start = self.end.min(self.start + len);
    }

    /// Receives once, into a block with space for `want` unconsumed bytes in total. Returns false at the end of the stream.
    pub(super) async fn fill(&mut self, stream: &Stream, want: usize) -> io::Result<bool> {
        self.make_room(want).await;
        let tail = self.block.split_off(self.end);
        let (result, tail) = stream.recv(tail).await;
        self.block.unsplit(tail).map_err(exchanged)?;
        let received = result?;
        self.end += received;
        self.account.progressed(received);
        Ok(received > 0)
    }

    async fn make_room(&mut self, want: usize) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        let too_small = self.block.len() - self.start < want;
        if !too_small && self.block.len() - self.end >= MIN_ROOM {
            return;
        }
        debug_assert!(want <= BLOCK, "a fill of more than one block was requested");
        if Rc::strong_count(&self.hold) > 1 {
            self.hold = Hold::new(&self.account, BLOCK).await;
        }
        let mut block = IoBufMut::new(BLOCK.max(want));
        let rest = self.bytes();
        let len = rest.len();
        if let Some(front) = block.get_mut(..len) {
            front.copy_from_slice(rest);
        }
        (self.block, self.start, self.end) = (block, 0, len);
    }

    /// Receives and consumes a payload of `len` bytes. Returns `None` at the end of the stream.
    pub(super) async fn payload(
        &mut self,
        stream: &Stream,
        len: usize,
    ) -> io::Result<Option<Payload>> {
        if len > CUT {
            return self.own(stream, len).await;
        }
        while self.bytes().len() < len {
            if !self.fill(stream, len).await? {
                return Ok(None);
            }
        }
        Ok(Some(Payload { data: self.cut(len), block: Some(Rc::clone(&self.hold)), held: 0 }))
    }

    /// Receives a payload into its own buffer.
    async fn own(&mut self, stream: &Stream, len: usize) -> io::Result<Option<Payload>> {
        // The client chooses the length. If the process has no address space left, the connection ends with an error.
        let mut rest = IoBufMut::try_new(len).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut data = rest.split_to(0);
        let mut held = 0;
        while !rest.is_empty() {
            let mut tail = rest.split_to(rest.len().min(STEP));
            let bytes = footprint(tail.len());
            self.account.hold(bytes).await;
            held += bytes;
            let there = self.bytes().len().min(tail.len());
            if let (Some(front), Some(bytes)) = (tail.get_mut(..there), self.bytes().get(..there)) {
                front.copy_from_slice(bytes);
            }
            self.consume(there);
            let mut step = tail.split_to(there);
            if !tail.is_empty() {
                let tail = match stream.recv_exact(tail).await {
                    Ok(tail) => tail,
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                    Err(error) => return Err(error),
                };
                step.unsplit(tail).map_err(exchanged)?;
            }
            self.account.progressed(step.len());
            data.unsplit(step).map_err(exchanged)?;
        }
        Ok(Some(Payload { data, block: None, held }))
    }

    /// Splits `len` bytes off the block. At least `len` bytes must be available.
    fn cut(&mut self, len: usize) -> IoBufMut {
        let mut front = self.block.split_to(self.start + len);
        let payload = front.split_off(self.start);
        self.end -= self.start + len;
        self.start = 0;
        payload
    }

    /// Discards `len` bytes of the stream. Returns false at the end of the stream.
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

fn exchanged(_: IoBufMut) -> io::Error {
    io::Error::other("receive buffer was exchanged")
}

/// The data of a write, and the memory that is accounted for this data.
pub(super) struct Payload {
    pub(super) data: IoBufMut,
    /// The block that contains the data, if the data was split off a block.
    pub(super) block: Option<Rc<Hold>>,
    /// Bytes that are accounted in the connection's account for the buffer of the data.
    pub(super) held: usize,
}

#[cfg(test)]
mod tests {
    use super::super::account::ALLOWANCE;
    use super::super::budget::Budget;
    use super::*;
    use oxblk_ring::{IoBuf, IoVec, block_on};

    async fn send(stream: &Stream, bytes: &[u8]) {
        let buf: IoBuf = bytes.to_vec().into();
        stream.send_all(IoVec::from_iter([buf])).await.unwrap();
    }

    fn new_input() -> Input {
        Input::new(Account::new(Budget::new(1 << 20), std::time::Duration::from_secs(30)))
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    #[test]
    fn payloads_of_every_size_arrive_unchanged() {
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
                let mut input = new_input();
                for _ in 0..5 {
                    while input.bytes().len() < 4 {
                        assert!(input.fill(&server, 4).await.unwrap());
                    }
                    assert_eq!(&input.bytes()[..4], b"head");
                    input.consume(4);
                    let payload = input.payload(&server, len).await.unwrap().unwrap();
                    assert!(*payload.data == *data, "length {len}");
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
            let mut input = new_input();
            while input.bytes().len() < 8192 {
                assert!(input.fill(&server, 8192).await.unwrap());
            }
            let mut first = input.payload(&server, 4096).await.unwrap().unwrap();
            let second = input.payload(&server, 4096).await.unwrap().unwrap();
            assert!(first.data.unsplit(second.data).is_ok());
        });
    }

    #[test]
    fn blocks_that_small_payloads_pin_are_counted_until_the_payloads_are_dropped() {
        block_on(async {
            let budget = Budget::new(0);
            assert!(budget.overdraw());
            let (client, server) = Stream::pair().unwrap();
            let flood = oxblk_ring::spawn(async move {
                loop {
                    send(&client, &[0; 16 << 10]).await;
                }
            });
            let mut input = Input::new(Account::new(budget, std::time::Duration::from_secs(30)));
            let mut payloads = Vec::new();
            // The test keeps only one byte of each received block.
            loop {
                let patience = std::time::Duration::from_millis(100);
                let next = oxblk_ring::timeout(patience, async {
                    assert!(input.skip(&server, BLOCK).await.unwrap());
                    input.payload(&server, 1).await.unwrap().unwrap()
                });
                match next.await {
                    Ok(payload) => payloads.push(payload),
                    Err(_) => break,
                }
                let mut blocks: Vec<_> =
                    payloads.iter().flat_map(|payload| &payload.block).map(Rc::as_ptr).collect();
                blocks.sort_unstable();
                blocks.dedup();
                assert!(
                    blocks.len() <= ALLOWANCE / BLOCK,
                    "more blocks than the allowance permits"
                );
            }
            assert!(!payloads.is_empty());
            payloads.clear();
            assert!(input.skip(&server, 10 * BLOCK).await.unwrap());
            drop(flood);
        });
    }

    #[test]
    fn the_end_of_the_stream_inside_a_payload_is_detected() {
        block_on(async {
            for len in [4096, 100_000] {
                let (client, server) = Stream::pair().unwrap();
                send(&client, b"only this").await;
                drop(client);
                let mut input = new_input();
                assert!(input.payload(&server, len).await.unwrap().is_none());
                let mut input = new_input();
                assert!(!input.skip(&server, len).await.unwrap());
            }
        });
    }
}
