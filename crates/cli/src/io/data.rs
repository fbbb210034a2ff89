//! Filling, checking and printing buffers.

use oxblk_ring::{IoBuf, IoBufMut};

use crate::program::out;

/// A buffer of `len` bytes that repeats `bytes`.
pub(super) fn repeating(bytes: &[u8], len: usize) -> IoBuf {
    let mut buf = IoBufMut::new(len);
    for piece in buf.chunks_mut(bytes.len().max(1)) {
        let source = bytes.get(..piece.len()).unwrap_or_default();
        piece.copy_from_slice(source);
    }
    buf.freeze()
}

/// Whether all bytes equal `pattern`.
pub(super) fn matches(bytes: &[u8], pattern: u8) -> bool {
    if pattern == 0 {
        oxblk_ring::is_zero(bytes)
    } else {
        bytes.iter().all(|byte| *byte == pattern)
    }
}

/// Prints a buffer from disk offset `offset`, sixteen bytes per line.
pub(super) fn dump(bytes: &[u8], offset: u64) {
    let mut at = offset;
    for line in bytes.chunks(16) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let shown = |byte: &u8| {
            if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }
        };
        let text: String = line.iter().map(shown).collect();
        out(format_args!("{at:08x}:  {hex} {text}\n"));
        at = at.wrapping_add(16);
    }
}
