//! Passwords and keys in memory, and the formats in which users provide them.
//!
//! A [`Secret`] is wiped when it is dropped, and printing it does not reveal its bytes. [`decode`] converts the value
//! that a user provides (`--object secret,…`). As in QEMU's tools, the value is plain or base64, and may be encrypted
//! with AES-256-CBC, with another secret as the key.

use std::fmt;
use std::ops::{Deref, DerefMut};

use aes::Aes256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cipher::{Array, Block, BlockCipherDecrypt, KeyInit};
use zeroize::Zeroizing;

use crate::{Error, Result};

const BLOCK: usize = 16;

/// Confidential bytes: wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes ownership of `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Copies `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec())
    }

    /// A secret of `len` zero bytes, for the caller to fill.
    pub fn zeroed(len: usize) -> Self {
        Self::new(vec![0; len])
    }

    /// A secret of `len` random bytes.
    ///
    /// # Errors
    /// If the system provides no random bytes.
    pub fn random(len: usize) -> Result<Self> {
        let mut secret = Self::zeroed(len);
        crate::random::fill(&mut secret)?;
        Ok(secret)
    }

    /// Whether the secret equals `other`. The time of the comparison does not depend on the position of a difference.
    pub fn matches(&self, other: &[u8]) -> bool {
        let differ = self.0.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b));
        self.0.len() == other.len() && std::hint::black_box(differ) == 0
    }
}

impl Deref for Secret {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Secret {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The encoding of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// Plain bytes.
    #[default]
    Raw,
    /// Base64.
    Base64,
}

/// The key and IV with which a secret is encrypted.
pub struct Wrapping<'a> {
    /// The other secret: 32 bytes.
    pub key: &'a Secret,
    /// The initialisation vector, in base64.
    pub iv: &'a str,
}

/// Decodes a secret that a user provides.
///
/// # Errors
/// If the secret cannot be decoded or decrypted. The messages are the messages of QEMU's tools. A message does not
/// contain the secret; it may contain the length of the secret, or the last byte of the decrypted data.
pub fn decode(given: Secret, form: Form, wrapping: Option<&Wrapping<'_>>) -> Result<Secret> {
    let Some(wrapping) = wrapping else {
        return match form {
            Form::Raw => Ok(given),
            Form::Base64 => decode_base64(&given),
        };
    };
    let iv = decode_base64(wrapping.iv.as_bytes())?;
    let iv: [u8; BLOCK] = iv.as_ref().try_into().map_err(|_| {
        Error::invalid(format!("IV should be {BLOCK} bytes in length not {}", iv.len()))
    })?;
    let key = wrapping.key;
    let cipher = Aes256::new_from_slice(key)
        .map_err(|_| Error::invalid("Key should be 32 bytes in length"))?;
    let data = match form {
        Form::Raw => given,
        Form::Base64 => decode_base64(&given)?,
    };
    unwrap_cbc(&cipher, &iv, data)
}

fn decode_base64(text: &[u8]) -> Result<Secret> {
    // Line breaks are allowed anywhere.
    let text: Zeroizing<Vec<u8>> = Zeroizing::new(
        text.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect(),
    );
    STANDARD
        .decode(&*text)
        .map(Secret::new)
        .map_err(|_| Error::invalid("Base64 data contains invalid characters"))
}

/// Decrypts `data` and removes its padding (RFC 5652, 6.3).
fn unwrap_cbc(cipher: &Aes256, iv: &[u8; BLOCK], mut data: Secret) -> Result<Secret> {
    if data.is_empty() || !data.len().is_multiple_of(BLOCK) {
        let text = format!("Length {} must be a multiple of block size {BLOCK}", data.len());
        return Err(Error::invalid(text));
    }
    let mut previous = Array::from(*iv);
    for chunk in data.chunks_exact_mut(BLOCK) {
        let mut block = Block::<Aes256>::try_from(&*chunk).unwrap_or_default();
        let encrypted = block;
        cipher.decrypt_block(&mut block);
        for ((to, from), last) in chunk.iter_mut().zip(block).zip(previous) {
            *to = from ^ last;
        }
        previous = encrypted;
    }
    let padding = data.last().map_or(0, |last| usize::from(*last));
    if padding == 0 || padding > BLOCK {
        return Err(Error::invalid(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        )));
    }
    let kept = data.len().saturating_sub(padding);
    Ok(Secret::from_slice(data.get(..kept).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_secret_does_not_reveal_its_bytes() {
        assert_eq!(format!("{:?}", Secret::from_slice(b"open sesame")), "Secret(…)");
    }

    #[test]
    fn base64_may_contain_line_breaks() {
        let secret = decode(Secret::from_slice(b"YWJj\nZA==\n"), Form::Base64, None).unwrap();
        assert_eq!(&*secret, b"abcd");
        assert!(decode(Secret::from_slice(b"YWJ*"), Form::Base64, None).is_err());
    }

    #[test]
    fn matching_compares_all_bytes_and_the_length() {
        let secret = Secret::from_slice(b"abc");
        assert!(secret.matches(b"abc"));
        assert!(!secret.matches(b"abd"));
        assert!(!secret.matches(b"ab"));
        assert!(!secret.matches(b"abcd"));
    }
}
