//! The zero scan: is a run of bytes all zero?
//!
//! Most data that is not all zero has a non-zero first, middle or last byte, so these bytes are checked first. Then
//! all bytes are OR-ed in chunks of 256 bytes. The compiler vectorises the loop over a chunk, and the scan ends after
//! the first chunk that is not zero.

const CHUNK: usize = 256;

/// Whether every byte is zero (true for the empty slice).
pub fn is_zero(bytes: &[u8]) -> bool {
    // In most data that is not all zero, one of these three bytes is not zero.
    if let [first, .., last] = bytes {
        let middle = bytes.get(bytes.len() / 2).copied().unwrap_or(0);
        if first | last | middle != 0 {
            return false;
        }
    }
    let (chunks, tail) = bytes.as_chunks::<CHUNK>();
    chunks.iter().all(chunk_is_zero) && tail.iter().fold(0, |acc, b| acc | b) == 0
}

#[inline]
fn chunk_is_zero(chunk: &[u8; CHUNK]) -> bool {
    let (words, _) = chunk.as_chunks::<8>();
    words.iter().fold(0u64, |acc, w| acc | u64::from_ne_bytes(*w)) == 0
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn a_single_set_bit_is_found_wherever_it_is() {
        for len in [0usize, 1, 7, 8, 255, 256, 257, 511, 4096, 5000] {
            let mut data = vec![0u8; len];
            assert!(is_zero(&data), "{len} zero bytes");
            for at in 0..len {
                data[at] = 1;
                assert!(!is_zero(&data), "byte {at} of {len}");
                data[at] = 0;
            }
        }
    }
}
