//! The bytes of an image that are compared. In a qcow2 image, the contents of free clusters and the zeroes at the end of the
//! file are not compared.

/// Returns the bytes of a file that are compared. All bytes of a file that is not a qcow2 image are compared.
pub(super) fn significant(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some(free) = free_clusters(&bytes) {
        for (start, end) in free {
            bytes[start..end].fill(0);
        }
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        bytes.truncate(used);
    }
    bytes
}

fn field(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    let value = field.iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    usize::try_from(value).ok()
}

/// Returns the ranges of the clusters whose refcount is zero in a qcow2 image. `None`: the bytes are not a qcow2 image with a
/// valid header.
fn free_clusters(bytes: &[u8]) -> Option<Vec<(usize, usize)>> {
    if !bytes.starts_with(b"QFI\xfb") {
        return None;
    }
    let cluster_bits = field(bytes, 20, 4).filter(|bits| (9..=21).contains(bits))?;
    let (table, clusters) = (field(bytes, 48, 8)?, field(bytes, 56, 4)?);
    let version = field(bytes, 4, 4)?;
    let order = if version == 2 { 4 } else { field(bytes, 96, 4).filter(|order| *order <= 6)? };
    let size = 1_usize << cluster_bits;
    let in_block = (size * 8) >> order;
    let is_free = |cluster: usize| {
        let index = cluster / in_block;
        if index >= clusters.checked_mul(size / 8)? {
            return Some(true);
        }
        let block = field(bytes, table.checked_add(index * 8)?, 8)? & !0x1ff;
        if block == 0 {
            return Some(true);
        }
        let bit = (cluster % in_block) << order;
        let at = block.checked_add(bit / 8)?;
        if order >= 3 {
            return Some(field(bytes, at, 1 << (order - 3))? == 0);
        }
        let value = field(bytes, at, 1)? >> (bit % 8);
        Some(value & ((1 << (1 << order)) - 1) == 0)
    };
    let mut free = Vec::new();
    for cluster in 0..bytes.len().div_ceil(size) {
        if is_free(cluster).unwrap_or(false) {
            free.push((cluster * size, bytes.len().min((cluster + 1) * size)));
        }
    }
    Some(free)
}
