//! Reads and writes of files, and their futures.
//!
//! A transfer starts when its method is called, and owns its buffers. If its future is dropped, the operation
//! continues. After a short transfer, the methods that transfer everything start another transfer for the remaining
//! bytes.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::{File, count, is_transient};
use crate::buf::{ForeignVec, ForeignVecMut, IoBuf, IoBufMut, IoVec, IoVecMut};
use crate::reactor::{Op, Payload, Pending, start_file};

impl File {
    /// Reads once, at most `buf.len()` bytes. The read may be short; it returns 0 at the end of the file.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn read_at(&self, buf: IoBufMut, offset: u64) -> ReadAt {
        ReadAt(start_file(self, Op::Read { offset }, Payload::Read(buf)))
    }

    /// Writes once; the write may be short. With `fua`, the data survives a power cut after completion (`RWF_DSYNC`).
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn write_at(&self, buf: IoBuf, offset: u64, fua: bool) -> WriteAt {
        WriteAt(start_file(self, Op::Write { offset, fua }, Payload::Write(buf)))
    }

    /// Reads once into several buffers in order; the read may be short.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn read_vectored_at(&self, bufs: IoVecMut, offset: u64) -> ReadvAt {
        ReadvAt(start_file(self, Op::Read { offset }, Payload::ReadV(bufs)))
    }

    /// Writes once from several buffers in order; the write may be short. `fua`: see [`File::write_at`].
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn write_vectored_at(&self, bufs: IoVec, offset: u64, fua: bool) -> WritevAt {
        WritevAt(start_file(self, Op::Write { offset, fua }, Payload::WriteV(bufs)))
    }

    /// Reads once into foreign memory; the read may be short. The memory stays valid until the host has completed the
    /// operation, also if the future is dropped.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn read_foreign_at(&self, memory: ForeignVecMut, offset: u64) -> ReadForeignAt {
        ReadForeignAt(start_file(self, Op::Read { offset }, Payload::ReadForeign(memory)))
    }

    /// Writes once from foreign memory; the write may be short. `fua`: see [`File::write_at`]. If others change the memory
    /// during the write, the file gets old or new bytes.
    ///
    /// # Panics
    /// If the caller is not on an I/O thread.
    pub fn write_foreign_at(&self, memory: ForeignVec, offset: u64, fua: bool) -> WriteForeignAt {
        WriteForeignAt(start_file(self, Op::Write { offset, fua }, Payload::WriteForeign(memory)))
    }

    /// Reads until the buffer is full or the file ends. Returns the buffer and the number of bytes that were read.
    /// The rest of the buffer is zeroed.
    ///
    /// # Errors
    /// The errors of the read; `EFBIG` if the offset exceeds the range of `u64`.
    pub async fn read_full_at(&self, buf: IoBufMut, offset: u64) -> io::Result<(IoBufMut, usize)> {
        let len = buf.len();
        let (mut front, mut rest, mut filled) = (None::<IoBufMut>, buf, 0usize);
        while !rest.is_empty() {
            let (result, buf) = self.read_at(rest, at(offset, filled)?).await;
            rest = buf;
            match result {
                Ok(0) => break,
                Ok(n) => {
                    filled += n;
                    if filled == len && front.is_none() {
                        return Ok((rest, len));
                    }
                    let piece = rest.split_to(n);
                    front = Some(join(front, piece));
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        rest.fill(0);
        Ok((join(front, rest), filled))
    }

    /// Writes the buffer completely.
    ///
    /// # Errors
    /// The errors of the write; [`io::ErrorKind::WriteZero`] if the file accepts no more data; `EFBIG` if the offset
    /// exceeds the range of `u64`.
    pub async fn write_all_at(&self, mut buf: IoBuf, offset: u64, fua: bool) -> io::Result<()> {
        let mut written = 0;
        while !buf.is_empty() {
            match self.write_at(buf.clone(), at(offset, written)?, fua).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n;
                    if n == buf.len() {
                        break;
                    }
                    drop(buf.split_to(n));
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes several buffers completely, in order.
    ///
    /// # Errors
    /// The errors of [`File::write_all_at`].
    pub async fn write_all_vectored_at(
        &self,
        mut bufs: IoVec,
        offset: u64,
        fua: bool,
    ) -> io::Result<()> {
        let mut written = 0;
        bufs.retain(|buf| !buf.is_empty());
        while !bufs.is_empty() {
            match self.write_vectored_at(bufs.clone(), at(offset, written)?, fua).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n;
                    crate::net::advance(&mut bufs, n);
                }
                Err(error) if is_transient(&error) => crate::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn join(front: Option<IoBufMut>, piece: IoBufMut) -> IoBufMut {
    match front {
        None => piece,
        Some(mut front) => match front.unsplit(piece) {
            Ok(()) => front,
            Err(_) => unreachable!("pieces of one buffer follow each other"),
        },
    }
}

fn at(offset: u64, done: usize) -> io::Result<u64> {
    offset.checked_add(done as u64).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}

macro_rules! transfer_future {
    ($(#[$doc:meta])* $name:ident, $output:ty, |$result:ident, $payload:ident| $map:expr) => {
        $(#[$doc])*
        #[must_use = "the operation has started; dropping this loses its result"]
        pub struct $name(Pending);

        impl Future for $name {
            type Output = $output;

            fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
                Pin::new(&mut self.0).poll(cx).map(|($result, $payload)| $map)
            }
        }
    };
}

transfer_future!(
    /// A read in flight; see [`File::read_at`].
    ReadAt,
    (io::Result<usize>, IoBufMut),
    |result, payload| match payload {
        Payload::Read(buf) => (count(result), buf),
        other => unreachable!("a read completed with {other:?}"),
    }
);
transfer_future!(
    /// A vectored read in flight; see [`File::read_vectored_at`].
    ReadvAt,
    (io::Result<usize>, IoVecMut),
    |result, payload| match payload {
        Payload::ReadV(bufs) => (count(result), bufs),
        other => unreachable!("a read completed with {other:?}"),
    }
);
transfer_future!(
    /// A write in flight; see [`File::write_at`].
    WriteAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
transfer_future!(
    /// A vectored write in flight; see [`File::write_vectored_at`].
    WritevAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
transfer_future!(
    /// A read into foreign memory in flight; see [`File::read_foreign_at`].
    ReadForeignAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
transfer_future!(
    /// A write from foreign memory in flight; see [`File::write_foreign_at`].
    WriteForeignAt,
    io::Result<usize>,
    |result, payload| {
        drop(payload);
        count(result)
    }
);
