//! Extents of the disk, and reads over several extents.

use futures_util::future::try_join_all;
use oxblk_core::{BoxFuture, Edge, Errno, Error, Result};
use oxblk_ring::IoBufMut;

use super::length;

/// Where the first `len` bytes of a range of the disk are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The data lies at `host` in the file.
    Data { host: u64, len: u64 },
    /// The range is not allocated and reads as zeroes.
    Unallocated { len: u64 },
}

impl Extent {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Unallocated { len } => *len,
        }
    }
}

/// Reads `buf.len()` bytes of the disk at `offset`. `extent(at, len)` returns the extent at `at`, of at most `len`
/// bytes.
pub(crate) async fn read(
    file: &Edge,
    offset: u64,
    mut buf: IoBufMut,
    extent: impl AsyncFn(u64, u64) -> Result<Extent>,
) -> Result<IoBufMut> {
    let mut pieces: Vec<BoxFuture<'_, Result<IoBufMut>>> = Vec::new();
    let mut at = offset;
    while !buf.is_empty() {
        let extent = extent(at, length(&buf)).await?;
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX).clamp(1, buf.len());
        let mut piece = buf.split_to(len);
        at = at.saturating_add(length(&piece));
        match extent {
            Extent::Data { host, .. } => {
                pieces.push(Box::pin(async move { file.read(host, piece).await }));
            }
            Extent::Unallocated { .. } => {
                piece.fill(0);
                pieces.push(Box::pin(std::future::ready(Ok(piece))));
            }
        }
    }
    let mut parts = try_join_all(pieces).await?.into_iter();
    let mut whole = parts.next().unwrap_or_else(|| IoBufMut::new(0));
    for part in parts {
        whole.unsplit(part).map_err(|_| Error::from_errno(Errno::IO))?;
    }
    Ok(whole)
}

/// Returns the extent at `offset`, merged with the following extents if they continue it. The result has at most `len`
/// bytes.
pub(crate) async fn joined(
    offset: u64,
    len: u64,
    extent: impl AsyncFn(u64, u64) -> Result<Extent>,
) -> Result<Extent> {
    let first = extent(offset, len).await?;
    let mut covered = first.len();
    while covered < len {
        let next = extent(offset.saturating_add(covered), len - covered).await?;
        let same = match (first, next) {
            (Extent::Unallocated { .. }, Extent::Unallocated { .. }) => true,
            (Extent::Data { host, .. }, Extent::Data { host: other, .. }) => {
                host.saturating_add(covered) == other
            }
            _ => false,
        };
        if !same {
            break;
        }
        covered = covered.saturating_add(next.len());
    }
    Ok(match first {
        Extent::Data { host, .. } => Extent::Data { host, len: covered },
        Extent::Unallocated { .. } => Extent::Unallocated { len: covered },
    })
}
