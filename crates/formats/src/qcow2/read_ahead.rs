//! Reading more of the metadata than is known to be needed yet.
//!
//! Structures whose length is only known from their contents (the header with its extensions, the snapshot table) are
//! read with one request that covers most of them. A sector that cannot be read behind what is needed must not make the
//! image unusable, so a failed request is repeated in small pieces, up to the first that fails.

use oxblk_core::{Edge, Error};
use oxblk_ring::IoBufMut;

/// Sizes of the pieces in bytes: the larger ones first, then what a disk can lose at least.
const PIECES: [usize; 2] = [16 << 10, 512];

/// The start of a range of the file, as far as it can be read.
pub(super) struct ReadAhead {
    /// What has been read.
    pub(super) bytes: Vec<u8>,
    /// Why there is no more of it.
    pub(super) fault: Option<Error>,
}

/// Reads `len` bytes at `offset`, or fewer where the file cannot be read.
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
