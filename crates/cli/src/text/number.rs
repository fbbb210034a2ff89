//! Numbers on the command line, and what is said of wrong ones.

use oxblk_core::{SizeError, parse_size};

/// Largest size of an image or offset in bytes.
pub(crate) const MAX_OFFSET: u64 = i64::MAX as u64;

/// `bytes` in whole sectors, the unit in which the tools tell sizes of images and files.
pub(crate) fn in_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(512).unwrap_or(bytes)
}

/// Reads a number of bytes (or of anything) with an optional suffix, in `min..=max`. `what` names it in
/// the message.
///
/// # Errors
/// The message to print.
pub(crate) fn sized(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    let out_of_range = || format!("Invalid {what} specified. Must be between {min} and {max}.");
    match parse_size(text) {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        Ok(_) | Err(SizeError::TooLarge) => Err(out_of_range()),
        Err(SizeError::Malformed) => match text.strip_prefix('-').map(parse_size) {
            Some(Ok(_) | Err(SizeError::TooLarge)) => Err(out_of_range()),
            _ => Err(format!("Invalid {what} specified: '{text}'.")),
        },
    }
}

/// Reads a size or offset with an optional suffix.
///
/// # Errors
/// The message to print.
pub(crate) fn bytes(what: &str, text: &str) -> Result<u64, String> {
    sized(what, text, 0, MAX_OFFSET)
}

/// Reads a plain number as C's `strtoul` with base 0 does: decimal, `0x` hexadecimal or `0` octal.
pub(crate) fn plain(text: &str) -> Option<u64> {
    let (radix, digits) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (16, digits),
        None if text.len() > 1 && text.starts_with('0') => (8, text.get(1..)?),
        None => (10, text),
    };
    if digits.starts_with('+') { None } else { u64::from_str_radix(digits, radix).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_numbers_are_told_from_numbers_out_of_range() {
        assert_eq!(sized("queue depth", "64", 1, 100), Ok(64));
        assert_eq!(
            sized("queue depth", "0", 1, 100).unwrap_err(),
            "Invalid queue depth specified. Must be between 1 and 100."
        );
        assert_eq!(
            sized("request count", "-1", 1, 100).unwrap_err(),
            "Invalid request count specified. Must be between 1 and 100."
        );
        assert_eq!(bytes("image size", "1X").unwrap_err(), "Invalid image size specified: '1X'.");
        assert_eq!(
            bytes("image size", "8E").unwrap_err(),
            "Invalid image size specified. Must be between 0 and 9223372036854775807."
        );
    }

    #[test]
    fn plain_numbers_have_c_prefixes() {
        assert_eq!(plain("0x1f"), Some(31));
        assert_eq!(plain("017"), Some(15));
        assert_eq!(plain("0"), Some(0));
        assert_eq!(plain("9"), Some(9));
        assert_eq!(plain("9z"), None);
        assert_eq!(plain("09"), None);
        assert_eq!(plain(""), None);
    }
}
