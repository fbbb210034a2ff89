//! Names as text: file names, backing file names, names of snapshots and bitmaps.
//!
//! The host and image formats store a name as bytes in no particular encoding. Options, errors and JSON contain text.
//! This module converts between bytes and text without loss. [`to_text`] keeps valid UTF-8 and represents every other
//! byte `b` (0x80 to 0xff) by one private-use character, U+10FE00 + `b`. [`to_bytes`] reverses this conversion. In JSON
//! such a character is the escape `\uDBFF\uDExx`, where `xx` is the byte.
//!
//! Invariant: `to_bytes(&to_text(bytes)) == bytes` for all bytes. UTF-8 that encodes one of these private-use
//! characters itself is represented byte by byte as well, so that two different names never become the same text.
//!
//! Names are converted to text where they enter the program (arguments, an image's header), and to bytes where they
//! leave the program (system calls, headers, messages). All other code handles ordinary strings. The length of a name
//! in bytes is the length of [`to_bytes`].

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Base of the escapes: byte `b` becomes the character `BASE + b`. Only bytes 0x80 to 0xff are escaped.
const BASE: u32 = 0x10_fe00;

/// The character for a byte that is not part of UTF-8 text.
fn escape(byte: u8) -> char {
    // Every sum is at most U+10FEFF, which is a valid character.
    char::from_u32(BASE.wrapping_add(byte.into())).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a character represents, if it is an escape.
fn unescape(c: char) -> Option<u8> {
    let byte = u8::try_from(u32::from(c).checked_sub(BASE)?).ok()?;
    (byte >= 0x80).then_some(byte)
}

/// Converts the bytes of a name to text.
pub fn to_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if unescape(c).is_some() {
                text.extend(c.encode_utf8(&mut [0; 4]).bytes().map(escape));
            } else {
                text.push(c);
            }
        }
        text.extend(chunk.invalid().iter().copied().map(escape));
    }
    text
}

/// Converts the text of a name to bytes.
pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(|c| unescape(c).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match unescape(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// Converts a name from the host (an argument, a path) to text.
pub fn from_os(name: impl AsRef<OsStr>) -> String {
    to_text(name.as_ref().as_bytes())
}

/// Converts the text of a name to a host path.
pub fn to_path(text: &str) -> Cow<'_, Path> {
    match to_bytes(text) {
        Cow::Borrowed(bytes) => Cow::Borrowed(Path::new(OsStr::from_bytes(bytes))),
        Cow::Owned(bytes) => Cow::Owned(OsStr::from_bytes(&bytes).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_sequence_survives_conversion_to_text_and_back() {
        let escaped_itself = "\u{10fee9}".as_bytes();
        let all: Vec<u8> = (0..=255).collect();
        let names: [&[u8]; 7] =
            [b"", b"plain", "caf\u{e9}".as_bytes(), b"caf\xe9", b"\xf0\x9f", escaped_itself, &all];
        for name in names {
            assert_eq!(&*to_bytes(&to_text(name)), name, "{name:x?}");
        }
    }

    #[test]
    fn different_names_become_different_texts() {
        assert_ne!(to_text("\u{10fee9}".as_bytes()), to_text(b"\xe9"));
    }

    #[test]
    fn valid_text_is_not_changed() {
        assert_eq!(to_text("na\u{ef}ve \u{1f600}".as_bytes()), "na\u{ef}ve \u{1f600}");
        assert_eq!(serde_json::to_value(to_text(b"x\xe9")).unwrap(), "x\u{10fee9}");
    }
}
