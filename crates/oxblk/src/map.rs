//! The extents of a disk in order. An extent says where its data is stored, or that it reads as zeroes. `img map` prints the
//! extents.

use std::sync::Arc;

use oxblk_core::{Backend, ChainStatus, Node, Result, StatusFlags, Want};

use crate::in_sectors;

/// Longest range of one status query, in bytes. The value is large because an image may have petabytes of unallocated space.
const STEP: u64 = 1 << 50;

/// A range of the disk that has one status.
#[derive(Debug, Clone, Default)]
pub struct Extent {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The image in the chain that determines the contents of the range: 0 for the top image, 1 for its backing file, and so
    /// on.
    pub depth: u32,
    /// An image of the chain has allocated the range.
    pub present: bool,
    /// The range reads as zeroes.
    pub zero: bool,
    /// The image stores data for the range.
    pub data: bool,
    /// The data is compressed.
    pub compressed: bool,
    /// The byte offset of the range in the node that stores it, and this node. `None`: the range occupies no space of
    /// its own, or its data is compressed or encrypted.
    pub place: Option<(u64, Arc<Node>)>,
}

impl Extent {
    fn new(offset: u64, found: &ChainStatus) -> Self {
        let mut flags = found.status.flags;
        if !flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
            // No image of the chain has allocated the range.
            flags = StatusFlags::empty();
        }
        let place = match (flags.contains(StatusFlags::OFFSET_VALID), found.status.host) {
            (true, Some(host)) => {
                let holder = match found.status.child {
                    Some(child) => found.node.child(child),
                    None => Some(Arc::clone(&found.node)),
                };
                holder.map(|node| (host, node))
            }
            _ => None,
        };
        Self {
            offset,
            len: found.status.len,
            depth: found.depth,
            present: flags.contains(StatusFlags::ALLOCATED),
            zero: flags.contains(StatusFlags::ZERO),
            data: flags.contains(StatusFlags::DATA),
            compressed: flags.contains(StatusFlags::COMPRESSED),
            place,
        }
    }

    /// The extent of `len` zero bytes between the end of the image and the end of its last sector, if the size is not a
    /// multiple of the sector size. `before` is the extent before these zeroes.
    fn rest_of_sector(offset: u64, len: u64, before: &Self) -> Self {
        let place = before
            .place
            .as_ref()
            .map(|(offset, node)| (offset.saturating_add(before.len), Arc::clone(node)));
        Self { offset, len, present: true, zero: true, place, ..Self::default() }
    }

    /// Whether this extent can be merged with `next`, which follows directly.
    fn joins(&self, next: &Self) -> bool {
        let place = match (&self.place, &next.place) {
            (None, None) => true,
            (Some((a, node)), Some((b, other))) => {
                a.checked_add(self.len) == Some(*b) && Arc::ptr_eq(node, other)
            }
            _ => false,
        };
        self.len > 0
            && place
            && (self.depth, self.present, self.zero, self.data, self.compressed)
                == (next.depth, next.present, next.zero, next.data, next.compressed)
    }
}

/// Returns the extents of a disk in order. Adjacent extents are merged if they have the same depth and the same status and, if
/// their data has a place, lie one after the other in the same node.
#[derive(Debug)]
pub struct Extents<'a> {
    disk: &'a Backend,
    /// The start of the next status query.
    at: u64,
    end: u64,
    /// The last extent that was found. It is returned after the next extent has been queried, because the two may be merged.
    current: Extent,
}

impl<'a> Extents<'a> {
    /// Returns the extents of the `len` bytes from the byte offset `start` on. `None`: up to the end of the disk. The
    /// size of the disk is rounded up to a multiple of 512.
    pub fn new(disk: &'a Backend, start: u64, len: Option<u64>) -> Self {
        let size = in_sectors(disk.size());
        let end = len.map_or(size, |len| size.min(start.saturating_add(len)));
        Self { disk, at: start, end, current: Extent { offset: start, ..Extent::default() } }
    }

    /// The next extent; `None` at the end.
    ///
    /// # Errors
    /// The errors of the images of the chain and the system.
    pub async fn next(&mut self) -> Result<Option<Extent>> {
        while self.at < self.end {
            let next = self.query().await?;
            self.at = self.at.saturating_add(next.len.max(1));
            if self.current.joins(&next) {
                self.current.len = self.current.len.saturating_add(next.len);
                continue;
            }
            let done = std::mem::replace(&mut self.current, next);
            if done.len > 0 {
                return Ok(Some(done));
            }
        }
        let last = std::mem::take(&mut self.current);
        Ok(Some(last).filter(|last| last.len > 0))
    }

    async fn query(&self) -> Result<Extent> {
        let (at, size) = (self.at, self.disk.size());
        if at >= size {
            return Ok(Extent::rest_of_sector(at, self.end - at, &self.current));
        }
        let len = STEP.min(self.end.min(size) - at);
        let status = self.disk.block_status(at, len, Want::Precise).await?;
        Ok(Extent::new(at, &status))
    }
}
