//! Free host clusters of qcow2 images, and a helper that moves metadata to the end of an image file.

use std::path::Path;

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn place(bytes: &[u8], at: usize, len: usize) -> usize {
    usize::try_from(number(bytes, at, len)).expect("an offset in the file")
}

/// Returns the number of free clusters before the last cluster in use. Refcounts must have eight bits or more.
///
/// # Panics
/// When the image's tables lie outside the file.
pub fn gaps(bytes: &[u8]) -> usize {
    let size = 1 << number(bytes, 20, 4);
    let order = if number(bytes, 4, 4) < 3 { 4 } else { number(bytes, 96, 4) };
    let width = (1 << order) / 8;
    let (table, clusters) = (place(bytes, 48, 8), place(bytes, 56, 4));
    let (mut free, mut gaps) = (0, 0);
    for entry in (table..table + clusters * size).step_by(8) {
        let block = place(bytes, entry, 8);
        if block == 0 {
            free += size / width;
            continue;
        }
        for at in (0..size).step_by(width) {
            if number(bytes, block + at, width) == 0 {
                free += 1;
            } else {
                gaps += std::mem::take(&mut free);
            }
        }
    }
    gaps
}

/// Moves `len` bytes of metadata to the end of the file, in whole clusters. The header field at the byte `pointer` contains the
/// offset of this metadata. The old clusters become free. The image must have 16-bit refcounts in one refcount block.
///
/// # Panics
/// When the image does not have one refcount block of 16-bit refcounts.
pub fn put_at_the_end(bytes: &mut Vec<u8>, pointer: usize, len: usize) {
    let size = 1_usize << number(bytes, 20, 4);
    let block = place(bytes, place(bytes, 48, 8), 8);
    let (old, count) = (place(bytes, pointer, 8), len.div_ceil(size));
    let new = bytes.len().next_multiple_of(size);
    bytes.resize(new, 0);
    bytes.extend_from_within(old..old + count * size);
    bytes[pointer..pointer + 8].copy_from_slice(&(new as u64).to_be_bytes());
    assert!((new / size + count) * 2 <= size, "the image needs more than one refcount block");
    for (start, refcount) in [(old, 0_u16), (new, 1)] {
        for cluster in start / size..start / size + count {
            let at = block + cluster * 2;
            bytes[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
        }
    }
}

/// Does the same as [`gaps`] for an image file.
///
/// # Panics
/// When the file cannot be read.
pub fn gaps_in(path: &Path) -> usize {
    gaps(&std::fs::read(path).expect("an image"))
}
