//! Parsing numbers in commands, with QEMU's messages for invalid ones.

use oxblk_core::{SizeError, parse_number, parse_size};

use crate::program::out;

/// Maximum length of a request in bytes.
pub(super) const MAX_REQUEST: u64 = 2_147_483_136;

/// Parses a size or offset in bytes with an optional suffix. Prints an error if the text is invalid.
pub(super) fn bytes(text: &str) -> Option<u64> {
    bytes_named(text, text)
}

/// Does the same as [`bytes`], but the message contains the word `named`.
pub(super) fn bytes_named(text: &str, named: &str) -> Option<u64> {
    match parse_size(text) {
        Ok(number) if i64::try_from(number).is_ok() => Some(number),
        Err(SizeError::Malformed) => {
            out(format_args!(
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {named}\n"
            ));
            None
        }
        _ => {
            out(format_args!("Parsing error: argument too large -- {named}\n"));
            None
        }
    }
}

/// Parses the value of a pattern byte.
pub(super) fn pattern(text: &str) -> Option<u8> {
    // An empty text counts as 0.
    let number = if text.is_empty() { Ok(0) } else { parse_number(text) };
    let byte = number.ok().and_then(|number| u8::try_from(number).ok());
    if byte.is_none() {
        out(format_args!("{text} is not a valid pattern byte\n"));
    }
    byte
}
