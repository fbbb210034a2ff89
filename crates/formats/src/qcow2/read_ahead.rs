//! Reading metadata whose length is not known in advance.
//!
//! The length of some structures is known only from their contents (the header with its extensions, the snapshot table).
//! Such a structure is read with one request that usually covers the structure and some bytes behind it. A bad sector
//! behind the structure must not make the image unusable. So a failed request is repeated in small pieces, up to the first
//! sector that cannot be read.

use oxblk_core::{Edge, Error};
use oxblk_ring::IoBufMut;

/// Sizes of the pieces in bytes: first large pieces, then sectors, the smallest unit that can be unreadable.
const PIECES: [usize; 2] = [16 << 10, 512];

/// The part at the start of a range of the file that could be read.
pub(super) struct ReadAhead {
    /// The bytes that were read.
    pub(super) bytes: Vec<u8>,
    /// The error of the read that failed behind `bytes`, if any.
    pub(super) fault: Option<Error>,
}

/// Reads `len` bytes at `offset`. If a sector cannot be read, returns the bytes in front of this sector, and the error.
pub(super) async fn read_ahead(file: &Edge, offset: u64, len: usize) -> ReadAhead {
    let mut fault = match file.read(offset, IoBufMut::new(len)).await {
        Ok(whole) => return ReadAhead { bytes: whole.to_vec(), fault: None },
        Err(error) => Some(error),
    };
    let mut bytes = Vec::new();
    for piece in PIECES {
        while bytes.len() < len {
            let at = offset.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            let room = piece.min(len.saturating_sub(bytes.len()));
            match file.read(at, IoBufMut::new(room)).await {
                Ok(read) => bytes.extend_from_slice(&read),
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
        }
    }
    ReadAhead { fault: fault.filter(|_| bytes.len() < len), bytes }
}
