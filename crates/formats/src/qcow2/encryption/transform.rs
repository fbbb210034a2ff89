//! Encrypting writes and decrypting reads.
//!
//! The I/O thread itself encrypts and decrypts small requests, because this takes less time than passing them to a worker
//! thread. Large requests are split into pieces for the pool of worker threads, so that several cores share the work and the
//! I/O thread is not blocked. A write needs memory for the ciphertext. This memory is bounded for each request, also for long
//! requests.
//!
//! `oxblk_core` extends guest requests to whole sectors before they reach the driver. Requests for VM state may begin and end
//! inside a sector, so this module extends these requests to whole sectors, with a read-modify-write. The node is drained
//! during a request for VM state, so no other request writes to the same sectors.

use std::sync::Arc;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use oxblk_core::{Edge, Errno, Error, Result, WriteFlags};
use oxblk_crypto::cipher::{Direction, SectorCipher};
use oxblk_ring::{IoBuf, IoBufMut};

use super::{Encryption, SECTOR};

/// Maximum length in bytes of a request that the I/O thread encrypts or decrypts itself. A request of this length takes some
/// tens of microseconds.
const AT_ONCE: usize = 64 << 10;
/// Maximum number of bytes that one job of a worker thread encrypts or decrypts.
const PIECE: usize = 128 << 10;
/// A longer write is split into steps of this many bytes. Each step is encrypted and then written.
const STEP: usize = 1 << 20;
/// Maximum number of concurrent steps of a write.
const STEPS: usize = 2;

impl Encryption {
    /// Reads and decrypts data of the guest offset `guest` from the host offset `host`.
    pub(in super::super) async fn read(
        &self,
        child: &Edge,
        guest: u64,
        host: u64,
        buf: IoBufMut,
    ) -> Result<IoBufMut> {
        let cipher = self.cipher()?;
        if !is_whole(host, buf.len()) {
            return self.read_within(child, guest, host, buf).await;
        }
        let buf = child.read(host, buf).await?;
        decrypt(cipher, self.sector(guest, host), buf).await
    }

    /// Reads a range that does not consist of whole sectors.
    async fn read_within(
        &self,
        child: &Edge,
        guest: u64,
        host: u64,
        mut buf: IoBufMut,
    ) -> Result<IoBufMut> {
        let (skip, around) = self.read_around(child, guest, host, buf.len()).await?;
        let wanted = around.get(skip..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(wanted.ok_or_else(|| Error::from_errno(Errno::IO))?);
        Ok(buf)
    }

    /// Reads and decrypts all sectors that a range touches. Returns the offset of the range in the data, and the data.
    async fn read_around(
        &self,
        child: &Edge,
        guest: u64,
        host: u64,
        len: usize,
    ) -> Result<(usize, IoBufMut)> {
        let skip = host % SECTOR;
        let (guest, host) = (guest.saturating_sub(skip), host.saturating_sub(skip));
        let skip = usize::try_from(skip).unwrap_or(0);
        let whole = skip.saturating_add(len).next_multiple_of(oxblk_crypto::SECTOR);
        let around = child.read(host, IoBufMut::new(whole)).await?;
        Ok((skip, decrypt(self.cipher()?, self.sector(guest, host), around).await?))
    }

    /// Writes a range that does not consist of whole sectors. No other request may write to these sectors during this call.
    async fn write_within(&self, child: &Edge, guest: u64, host: u64, data: IoBuf) -> Result<()> {
        let (skip, mut around) = self.read_around(child, guest, host, data.len()).await?;
        let place = around.get_mut(skip..).and_then(|rest| rest.get_mut(..data.len()));
        place.ok_or_else(|| Error::from_errno(Errno::IO))?.copy_from_slice(&data);
        let skip = host % SECTOR;
        let (guest, host) = (guest.saturating_sub(skip), host.saturating_sub(skip));
        Box::pin(self.write(child, guest, host, around.freeze())).await
    }

    /// Encrypts data of the guest offset `guest` and writes it to the host offset `host`.
    pub(in super::super) async fn write(
        &self,
        child: &Edge,
        guest: u64,
        host: u64,
        data: IoBuf,
    ) -> Result<()> {
        let cipher = self.cipher()?;
        if !is_whole(host, data.len()) {
            return self.write_within(child, guest, host, data).await;
        }
        let one = |at: u64, data: IoBuf| async move {
            let sector = self.sector(guest.saturating_add(at), host.saturating_add(at));
            let ciphertext = encrypt(cipher, sector, data).await?;
            let host = host.saturating_add(at);
            child.write(host, ciphertext.freeze(), WriteFlags::empty()).await
        };
        if data.len() <= STEP {
            return one(0, data).await;
        }
        let steps = split_shared(data, STEP).map(|(at, data)| Box::pin(one(at, data)));
        let mut steps = stream::iter(steps).buffer_unordered(STEPS);
        let mut outcome = Ok(());
        // Wait for all steps even after an error, so that no write is in flight when this function returns.
        while let Some(done) = steps.next().await {
            outcome = outcome.and(done);
        }
        outcome
    }
}

/// Whether a range consists of whole sectors.
fn is_whole(host: u64, len: usize) -> bool {
    host.is_multiple_of(SECTOR) && len.is_multiple_of(oxblk_crypto::SECTOR)
}

/// Splits the data into pieces, each with its offset.
fn split_shared(mut data: IoBuf, piece: usize) -> impl Iterator<Item = (u64, IoBuf)> {
    let mut at = 0_u64;
    std::iter::from_fn(move || {
        if data.is_empty() {
            return None;
        }
        let front = data.split_to(piece.min(data.len()));
        let offset = at;
        at = at.saturating_add(u64::try_from(front.len()).unwrap_or(0));
        Some((offset, front))
    })
}

fn split_unique(mut buf: IoBufMut, piece: usize) -> Vec<IoBufMut> {
    let mut pieces = Vec::new();
    while !buf.is_empty() {
        pieces.push(buf.split_to(piece.min(buf.len())));
    }
    pieces
}

/// Joins the pieces of one buffer.
fn join(pieces: Vec<Result<IoBufMut>>) -> Result<IoBufMut> {
    let mut pieces = pieces.into_iter();
    let mut whole = pieces.next().transpose()?.unwrap_or_default();
    for piece in pieces {
        whole.unsplit(piece?).map_err(|_| Error::from_errno(Errno::IO))?;
    }
    Ok(whole)
}

/// The number of the first sector of each piece of [`PIECE`] bytes.
fn sectors(first: u64) -> impl Iterator<Item = u64> {
    let step = u64::try_from(PIECE).unwrap_or(u64::MAX) / SECTOR;
    (0_u64..).map(move |index| first.wrapping_add(index.wrapping_mul(step)))
}

async fn decrypt(cipher: &Arc<SectorCipher>, sector: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    if buf.len() <= AT_ONCE {
        cipher.apply(Direction::Decrypt, sector, &mut buf)?;
        return Ok(buf);
    }
    let jobs =
        split_unique(buf, PIECE).into_iter().zip(sectors(sector)).map(|(mut piece, sector)| {
            let cipher = Arc::clone(cipher);
            oxblk_ring::offload(move || {
                cipher.apply(Direction::Decrypt, sector, &mut piece)?;
                Ok(piece)
            })
        });
    join(join_all(jobs).await)
}

/// Encrypts `data` into a new buffer.
async fn encrypt(cipher: &Arc<SectorCipher>, sector: u64, data: IoBuf) -> Result<IoBufMut> {
    if data.len() <= AT_ONCE {
        let mut out = IoBufMut::copy_from(&data);
        cipher.apply(Direction::Encrypt, sector, &mut out)?;
        return Ok(out);
    }
    let pieces = split_unique(IoBufMut::new(data.len()), PIECE);
    let plain = split_shared(data, PIECE).map(|(_, data)| data);
    let jobs =
        pieces.into_iter().zip(plain).zip(sectors(sector)).map(|((mut piece, data), sector)| {
            let cipher = Arc::clone(cipher);
            oxblk_ring::offload(move || {
                piece.copy_from_slice(&data);
                cipher.apply(Direction::Encrypt, sector, &mut piece)?;
                Ok(piece)
            })
        });
    join(join_all(jobs).await)
}
