//! Parsing numbers on the command line, with QEMU's messages for invalid ones.

use oxblk_core::{SizeError, parse_number, parse_size};

/// Largest size of an image or offset in bytes.
pub(crate) const MAX_OFFSET: u64 = i64::MAX as u64;

/// Parses a number with an optional size suffix, in `min..=max`. `what` is the name of the number in the message.
///
/// # Errors
/// The message to print.
pub(crate) fn sized(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    match parse_size(text) {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        Ok(_) | Err(SizeError::OutOfRange) => {
            Err(format!("Invalid {what} specified. Must be between {min} and {max}."))
        }
        Err(SizeError::Malformed) => Err(format!("Invalid {what} specified: '{text}'.")),
    }
}

/// Parses a number without a suffix, in `min..=max`. `what` is the name of the number in the message.
///
/// # Errors
/// The message to print.
pub(crate) fn count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    let is_negative = text.trim_start().starts_with('-');
    match parse_number(text) {
        Ok(number) if !is_negative && (min..=max).contains(&number) => Ok(number),
        Ok(_) | Err(SizeError::OutOfRange) => {
            Err(format!("Invalid {what} specified. Must be between {min} and {max}."))
        }
        Err(SizeError::Malformed) => Err(format!("Invalid {what} specified: '{text}'.")),
    }
}

/// Parses a size or offset with an optional suffix.
///
/// # Errors
/// The message to print.
pub(crate) fn bytes(what: &str, text: &str) -> Result<u64, String> {
    sized(what, text, 0, MAX_OFFSET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_numbers_and_numbers_out_of_range_have_different_messages() {
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
    fn counts_have_no_suffix() {
        assert_eq!(count("queue depth", "0x10", 1, 100), Ok(16));
        assert_eq!(
            count("queue depth", "2b", 1, 100).unwrap_err(),
            "Invalid queue depth specified: '2b'."
        );
        assert_eq!(
            count("queue depth", "-1", 1, 100).unwrap_err(),
            "Invalid queue depth specified. Must be between 1 and 100."
        );
    }
}
