//! Computing how much of an image must be read to parse its header.

use super::Geometry;
use super::extension::END;
use super::raw::{RawHeader, V2_LENGTH, V3_LENGTH};

/// Number of bytes from the start of an image that contain its header, all extensions, and the backing file's name; at most one
/// cluster. `head` is the part of the image that was read already. If the result is greater than the length of `head`, more
/// must be read. Otherwise [`super::Header::parse`] has all the bytes that it needs.
pub fn header_extent(head: &[u8]) -> u64 {
    let have = head.len() as u64;
    if have < u64::from(V3_LENGTH) {
        return V3_LENGTH.into();
    }
    let raw = RawHeader::from_head(head);
    let bits = raw.cluster_bits.get();
    if !(Geometry::MIN_CLUSTER_BITS..=Geometry::MAX_CLUSTER_BITS).contains(&bits) {
        // `Header::parse` refuses this image.
        return have;
    }
    let cluster = 1_u64 << bits;
    let name = raw.backing_file_offset.get();
    let name_end = match name {
        0 => 0,
        name => name.saturating_add(raw.backing_file_size.get().into()),
    };
    let end = if name == 0 { cluster } else { name.min(cluster) };
    let length = if raw.version.get() == 2 { V2_LENGTH } else { raw.header_length.get() };
    let extensions = extensions_end(head, length.into(), end);
    extensions.max(length.into()).max(name_end).min(cluster)
}

/// The end of the extensions that begin at `at`. If `head` is too short, the end of the next bytes that must be read.
fn extensions_end(head: &[u8], mut at: u64, end: u64) -> u64 {
    loop {
        let data = at.saturating_add(8);
        if data > end {
            return at;
        }
        let Some((magic, len)) = extension_at(head, at) else { return data };
        if magic == END {
            return data;
        }
        at = data.saturating_add(len.into());
        if at > end {
            return data;
        }
        at = at.next_multiple_of(8);
    }
}

/// Type and length of the extension at `at`.
fn extension_at(head: &[u8], at: u64) -> Option<(u32, u32)> {
    let start = usize::try_from(at).ok()?;
    let bytes = head.get(start..start.checked_add(8)?)?;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_be_bytes);
    let (magic, len) = bytes.split_at_checked(4)?;
    Some((word(magic), word(len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 3 header with 64 KiB clusters, followed by `rest`.
    fn head(rest: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 112];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[23] = 16;
        head[103] = 112;
        head.extend_from_slice(rest);
        head
    }

    #[test]
    fn the_extent_ends_behind_the_last_extension() {
        assert_eq!(header_extent(&[]), 112);
        let start = head(&[]);
        assert_eq!(header_extent(&start), 120);
        // One extension of 9 bytes, padded to 16, then the end marker.
        let mut extension = vec![1, 2, 3, 4, 0, 0, 0, 9];
        assert_eq!(header_extent(&head(&extension)), 112 + 8 + 16 + 8);
        extension.extend([0; 24]);
        assert_eq!(header_extent(&head(&extension)), 112 + 8 + 16 + 8);
        // An extension that does not fit in the cluster ends the search.
        assert_eq!(header_extent(&head(&[1, 2, 3, 4, 0, 1, 0, 0])), 120);
    }

    #[test]
    fn the_extent_covers_the_backing_file_name_but_no_more_than_a_cluster() {
        let mut start = head(&[0; 8]);
        start[14..16].copy_from_slice(&[1, 0]);
        start[18..20].copy_from_slice(&[0, 10]);
        assert_eq!(header_extent(&start), 256 + 10);
        start[8..16].copy_from_slice(&[0xff; 8]);
        assert_eq!(header_extent(&start), 1 << 16);
    }
}
