//! The anti-forensic splitter (section 2.4 of the LUKS specification). It splits a key into stripes. All stripes are
//! needed to restore the key.
//!
//! All stripes except the last are random. The last stripe is the XOR of the key and a hash chain over the other
//! stripes. So the key cannot be restored after one stripe was overwritten.

use super::header::STRIPES;
use crate::Result;
use crate::hash::Hash;
use crate::secret::Secret;

fn xor(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to ^= from;
    }
}

/// Replaces each piece of the size of a digest with the hash of its number and its bytes. The last piece may be shorter; the
/// hash is then truncated.
fn diffuse(hash: Hash, state: &mut Secret) {
    let pieces = state.chunks_mut(hash.size());
    for (piece, number) in pieces.zip(0_u32..) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        for (to, from) in piece.iter_mut().zip(digest.iter()) {
            *to = *from;
        }
    }
}

/// The hash chain over all stripes except the last.
fn chain<'a>(hash: Hash, len: usize, stripes: impl Iterator<Item = &'a [u8]>) -> Secret {
    let mut state = Secret::zeroed(len);
    for stripe in stripes {
        xor(&mut state, stripe);
        diffuse(hash, &mut state);
    }
    state
}

fn all_but_last() -> usize {
    usize::try_from(STRIPES).unwrap_or(usize::MAX).saturating_sub(1)
}

/// Splits `key` and writes its stripes to the start of `material`.
pub(super) fn split(hash: Hash, key: &Secret, material: &mut [u8]) -> Result<()> {
    crate::random::fill(material)?;
    let state = chain(hash, key.len(), material.chunks_exact(key.len()).take(all_but_last()));
    if let Some(last) = material.chunks_exact_mut(key.len()).nth(all_but_last()) {
        last.copy_from_slice(&state);
        xor(last, key);
    }
    Ok(())
}

/// Restores the key of `len` bytes from the stripes at the start of `material`.
pub(super) fn merge(hash: Hash, len: usize, material: &[u8]) -> Secret {
    let mut stripes = material.chunks_exact(len.max(1));
    let mut key = chain(hash, len, stripes.by_ref().take(all_but_last()));
    if let Some(last) = stripes.next() {
        xor(&mut key, last);
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_merges_again_only_if_every_stripe_is_intact() {
        for (hash, len) in [(Hash::Sha256, 64), (Hash::Sha1, 32), (Hash::Md5, 24)] {
            let key = Secret::random(len).unwrap();
            let mut material = vec![0; len * 4000];
            split(hash, &key, &mut material).unwrap();
            assert!(merge(hash, len, &material) == key);
            for at in [0, len * 2000, len * 4000 - 1] {
                material[at] ^= 1;
                assert!(merge(hash, len, &material) != key);
                material[at] ^= 1;
            }
        }
    }
}
