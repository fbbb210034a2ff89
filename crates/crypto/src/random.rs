//! Random bytes from the system.

use crate::{Error, ErrorKind, Result};

/// Fills `bytes` with random bytes that are suitable for keys.
///
/// # Errors
/// If the system provides no random bytes.
pub fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        Error::new(ErrorKind::NoRandom, format!("The system provides no random bytes: {error}"))
    })
}

/// A random (version 4) UUID as text.
///
/// # Errors
/// If the system provides no random bytes.
pub fn uuid() -> Result<String> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    let mut number = u128::from_be_bytes(bytes);
    // RFC 9562, 5.4: version 4, variant 0b10.
    number = number & !(0xf << 76) | 4 << 76;
    number = number & !(3 << 62) | 2 << 62;
    let hex = format!("{number:032x}");
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    let parts = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)];
    Ok(parts.join("-"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_uuid_has_version_4_and_the_rfc_variant() {
        let uuid = super::uuid().unwrap();
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.as_bytes()[14], b'4');
        assert!(matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
        assert_ne!(uuid, super::uuid().unwrap());
    }
}
