//! Changing the bitmaps extension in the header of an open image.
//!
//! A power cut may happen between any two sectors of a write. So a change is a list of writes, and each write must be flushed
//! before the next one begins. If a power cut tears one of these writes, the header is still valid, and everything apart from
//! bitmaps is unchanged. The bitmaps extension is then the old one, the new one, or marked as not consistent (autoclear bit 0
//! is not set).
//!
//! If a consistent extension is replaced and its data lies within one sector, the change is one write. The header then always
//! refers to the old directory or to the new one. In most headers that QEMU and this program write, the data lies within one
//! sector.

use oxblk_core::{Errno, Error, Result};
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::extension::{BITMAPS, BitmapsExtension, END};
use super::{Autoclear, field_offsets};

/// Unit that a disk writes completely or not at all, in bytes.
const SECTOR: usize = 512;
/// Bytes of the magic number and the length in front of an extension's data.
const HEAD: usize = 8;
/// Length of the extension's data, in bytes.
const DATA: usize = 24;
/// Bytes of the bitmaps extension and the end marker behind it.
const WITH_END: usize = HEAD + DATA + HEAD;

/// Byte offsets of header fields that this module reads.
const BACKING_OFFSET: usize = 8;
const BACKING_SIZE: usize = 16;
const HEADER_LENGTH: usize = 100;

/// One write to the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderWrite {
    /// Byte offset in the file, within the first cluster.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The header extensions in the first cluster.
struct Chain {
    /// Offset of the bitmaps extension, and the length of its data.
    bitmaps: Option<(usize, usize)>,
    /// Offset of the end marker. Without an end marker, the end of the last extension.
    end: usize,
}

/// Returns the writes that make the header refer to the bitmap directory `new`, or to no directory. `head` is the first cluster
/// of a version 3 image.
///
/// # Errors
/// [`oxblk_core::ErrorKind::NoSpace`] when the first cluster has no free space for the extension,
/// [`oxblk_core::ErrorKind::Invalid`] when the existing extensions are broken.
pub fn change_bitmaps_extension(
    head: &[u8],
    new: Option<&BitmapsExtension>,
) -> Result<Vec<HeaderWrite>> {
    let mut change = Change { head: head.to_vec(), writes: Vec::new() };
    let chain = change.chain()?;
    match (new, chain.bitmaps) {
        (Some(new), Some((at, DATA))) => change.replace(at, new),
        (Some(_), Some(_)) => return Err(Error::invalid("bitmaps_ext: Invalid extension length")),
        (Some(new), None) => change.insert(chain.end, new)?,
        (None, Some((at, len))) => change.remove(at, len, chain.end),
        (None, None) => change.set_consistent(false),
    }
    Ok(change.writes)
}

struct Change {
    /// The first cluster after all `writes`.
    head: Vec<u8>,
    writes: Vec<HeaderWrite>,
}

impl Change {
    fn small(&self, at: usize) -> usize {
        let field = self.head.get(at..).and_then(|bytes| U32::read_from_prefix(bytes).ok());
        field.map_or(0, |(value, _)| usize::try_from(value.get()).unwrap_or(usize::MAX))
    }

    fn large(&self, at: usize) -> u64 {
        let field = self.head.get(at..).and_then(|bytes| U64::read_from_prefix(bytes).ok());
        field.map_or(0, |(value, _)| value.get())
    }

    /// Offset and length of the backing file's name.
    fn backing_name(&self) -> Option<(usize, usize)> {
        let offset = usize::try_from(self.large(BACKING_OFFSET)).unwrap_or(usize::MAX);
        (offset != 0).then(|| (offset, self.small(BACKING_SIZE)))
    }

    fn chain(&self) -> Result<Chain> {
        let limit = self.backing_name().map_or(self.head.len(), |(offset, _)| offset);
        let too_large = || Error::invalid("Header extension too large");
        let mut bitmaps = None;
        let mut at = self.small(HEADER_LENGTH);
        loop {
            let data = at.saturating_add(HEAD);
            if data > limit {
                // The chain ends without an end marker.
                return Ok(Chain { bitmaps, end: at });
            }
            let (magic, len) = (self.small(at), self.small(at.saturating_add(4)));
            if magic == END as usize {
                return Ok(Chain { bitmaps, end: at });
            }
            if data.saturating_add(len) > limit {
                return Err(too_large());
            }
            if magic == BITMAPS as usize {
                bitmaps = Some((at, len));
            }
            at = data.saturating_add(len.checked_next_multiple_of(8).ok_or_else(too_large)?);
        }
    }

    fn write(&mut self, at: usize, bytes: Vec<u8>) {
        let place = at..at.saturating_add(bytes.len());
        if let Some(to) = self.head.get_mut(place) {
            to.copy_from_slice(&bytes);
            self.writes.push(HeaderWrite { offset: at as u64, bytes });
        }
    }

    fn set_consistent(&mut self, consistent: bool) {
        let at = usize::try_from(field_offsets::AUTOCLEAR).unwrap_or(usize::MAX);
        let mut bits = Autoclear::from_bits_retain(self.large(at));
        if bits.contains(Autoclear::BITMAPS) != consistent {
            bits.set(Autoclear::BITMAPS, consistent);
            self.write(at, bits.bits().to_be_bytes().to_vec());
        }
    }

    fn replace(&mut self, at: usize, new: &BitmapsExtension) {
        let place = at.saturating_add(HEAD);
        if place / SECTOR != place.saturating_add(DATA - 1) / SECTOR {
            // A torn write could mix the old and the new extension.
            self.set_consistent(false);
        }
        self.write(place, new.encode());
        self.set_consistent(true);
    }

    /// Writes the extension over the end marker, with a new end marker behind it. If the backing file's name lies there, the
    /// name is first copied behind the new end marker.
    fn insert(&mut self, end: usize, new: &BitmapsExtension) -> Result<()> {
        let no_room =
            || Error::from_errno(Errno::NOSPC).prefix("The header has no room for bitmaps");
        let behind = end.saturating_add(WITH_END);
        let mut covered = behind;
        if let Some((name, len)) = self.backing_name().filter(|(name, _)| *name < behind) {
            let there = behind.max(name.saturating_add(len));
            if end.saturating_add(HEAD) > name || there.saturating_add(len) > self.head.len() {
                return self.insert_at_once(end, new).ok_or_else(no_room);
            }
            let bytes = self.head.get(name..name.saturating_add(len)).map(<[u8]>::to_vec);
            self.write(there, bytes.unwrap_or_default());
            self.write(BACKING_OFFSET, (there as u64).to_be_bytes().to_vec());
            covered = there;
        }
        if covered > self.head.len() {
            return Err(no_room());
        }
        let mut bytes = encode(new);
        bytes.resize(covered.saturating_sub(end), 0);
        // The sector with the old end marker makes the other sectors effective, so this sector is written last.
        let first = (SECTOR - end % SECTOR).min(bytes.len());
        let rest = bytes.split_off(first);
        if !rest.is_empty() {
            self.write(end.saturating_add(first), rest);
        }
        self.write(end, bytes);
        self.set_consistent(true);
        Ok(())
    }

    /// Like [`Self::insert`], but with one write of a header that contains the extension and the moved backing file's name.
    /// Returns `None` if this header does not fit in one sector.
    fn insert_at_once(&mut self, end: usize, new: &BitmapsExtension) -> Option<()> {
        let (name, len) = self.backing_name()?;
        let name = self.head.get(name..name.saturating_add(len))?.to_vec();
        let mut bytes = self.head.get(..end)?.to_vec();
        bytes.extend(encode(new));
        let there = u64::try_from(bytes.len()).ok()?;
        bytes.extend(name);
        bytes.get_mut(BACKING_OFFSET..BACKING_OFFSET + 8)?.copy_from_slice(&there.to_be_bytes());
        if bytes.len() > SECTOR.min(self.head.len()) {
            return None;
        }
        self.write(0, bytes);
        self.set_consistent(true);
        Some(())
    }

    /// Removes the extension if it is the last one. An extension in front of others stays, but the cleared autoclear bit makes
    /// this extension invalid.
    fn remove(&mut self, at: usize, len: usize, end: usize) {
        self.set_consistent(false);
        let last = at.saturating_add(HEAD).saturating_add(len.next_multiple_of(8)) >= end;
        if last {
            // Zeroes are an end marker. Bytes behind the extension are not changed, because they may belong to the backing
            // file's name.
            self.write(at, vec![0; end.saturating_sub(at)]);
        }
    }
}

/// The extension and an end marker.
fn encode(new: &BitmapsExtension) -> Vec<u8> {
    let mut bytes = BITMAPS.to_be_bytes().to_vec();
    bytes.extend(u32::try_from(DATA).unwrap_or(0).to_be_bytes());
    bytes.extend(new.encode());
    bytes.resize(WITH_END, 0);
    bytes
}

#[cfg(test)]
#[path = "extension_change_tests.rs"]
mod tests;
