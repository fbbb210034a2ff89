//! The sources of a copy, which are read as one concatenated disk.

use std::sync::Arc;

use oxblk_core::{Backend, Result};
use oxblk_ring::IoBufMut;

use crate::buffer::buffer;

/// Each source begins at a multiple of this number of bytes.
const SECTOR: u64 = 512;

/// Concatenated disks. Each disk is padded with zeroes to a multiple of the sector size.
pub(super) struct Sources {
    /// The disks, each with the offset of its end in the concatenated disk.
    list: Vec<(Backend, u64)>,
}

impl Sources {
    /// Concatenates the disks of `backends`.
    pub(super) fn new(backends: &[Backend]) -> Arc<Self> {
        let mut end = 0_u64;
        let list = backends.iter().map(|backend| {
            let size = backend.size();
            end = end.saturating_add(size.checked_next_multiple_of(SECTOR).unwrap_or(size));
            (backend.clone(), end)
        });
        Arc::new(Self { list: list.collect() })
    }

    /// Total length in bytes.
    pub(super) fn size(&self) -> u64 {
        self.list.last().map_or(0, |(_, end)| *end)
    }

    /// The source that contains `offset`, and the offset in that source; `None` after the end of the last source.
    pub(super) fn at(&self, offset: u64) -> Option<(&Backend, u64)> {
        let index = self.list.partition_point(|(_, end)| *end <= offset);
        let begin = index.checked_sub(1).and_then(|i| self.list.get(i)).map_or(0, |(_, end)| *end);
        self.list.get(index).map(|(backend, _)| (backend, offset - begin))
    }

    /// Bytes from `offset` to the end of the source that contains it; 0 after the end of the last source.
    pub(super) fn left_in_source(&self, offset: u64) -> u64 {
        let index = self.list.partition_point(|(_, end)| *end <= offset);
        self.list.get(index).map_or(0, |(_, end)| end - offset)
    }

    /// Reads `len` bytes at `offset`. The range may span several sources. Bytes after the end of a source are zeroes.
    pub(super) async fn read(&self, offset: u64, len: usize) -> Result<IoBufMut> {
        match self.at(offset) {
            Some((source, at)) if source.size().saturating_sub(at) >= as_u64(len) => {
                source.read(at, buffer(len)).await
            }
            _ => self.read_pieces(offset, len).await,
        }
    }

    async fn read_pieces(&self, offset: u64, len: usize) -> Result<IoBufMut> {
        let mut whole = IoBufMut::zeroed(len);
        let mut done = 0_usize;
        while done < len {
            let place = offset.saturating_add(as_u64(done));
            let Some((source, at)) = self.at(place) else { break };
            let here = self.left_in_source(place).min(as_u64(len - done));
            let readable = source.size().saturating_sub(at).min(here);
            let piece = usize::try_from(readable).unwrap_or(usize::MAX);
            if piece > 0 {
                let buf = source.read(at, IoBufMut::new(piece)).await?;
                if let Some(room) = whole.get_mut(done..done.saturating_add(piece)) {
                    room.copy_from_slice(&buf);
                }
            }
            done = done.saturating_add(usize::try_from(here).unwrap_or(usize::MAX));
        }
        Ok(whole)
    }
}

fn as_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
