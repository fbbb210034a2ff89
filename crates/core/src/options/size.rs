//! Parses sizes and numbers like QEMU's option parser: `512`, `64k`, `1.5G`, `0x1000`.

/// The reason why a text is not a valid size or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    Malformed,
    /// A negative whole number without a suffix, or a number above 2^64 - 1.
    OutOfRange,
}

/// Parses a size in bytes with an optional suffix (`b`, `k`, `M`, `G`, `T`, `P`, `E`; powers of 1024) and an optional
/// decimal fraction, or a hexadecimal number without suffix. A fraction other than zero needs a suffix other than `b`.
///
/// # Errors
/// [`SizeError`] with the reason.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    // Leading white space is accepted, as in the C library.
    let text = text.trim_start_matches(is_c_space);
    if let Some(rest) = text.strip_prefix('-') {
        let is_number = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
        return Err(if is_number { SizeError::OutOfRange } else { SizeError::Malformed });
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return parse_digits(digits, 16);
    }
    let (whole, rest) = split_digits(text);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => split_digits(rest),
        None => ("", rest),
    };
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Malformed),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Malformed);
    }
    let whole = if whole.is_empty() { 0 } else { parse_digits(whole, 10)? };
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::OutOfRange)?;
    bytes.checked_add(fraction_bytes(fraction, shift)?).ok_or(SizeError::OutOfRange)
}

/// Parses a plain number: decimal, `0x` hexadecimal or `0` octal. A minus sign negates the number modulo 2^64, as in
/// C's `strtoull`.
///
/// # Errors
/// [`SizeError`] with the reason.
pub fn parse_number(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches(is_c_space);
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let number = match (hexadecimal, text.strip_prefix('0')) {
        (Some(digits), _) => parse_digits(digits, 16),
        (None, Some(digits)) if !digits.is_empty() => parse_digits(digits, 8),
        _ => parse_digits(text, 10),
    }?;
    Ok(if negative { number.wrapping_neg() } else { number })
}

/// Parses a boolean in one of QEMU's spellings.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// Whether a character is white space for C's `isspace`.
fn is_c_space(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\u{b}'
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

fn parse_digits(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(SizeError::Malformed);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::OutOfRange)
}

/// The fraction in bytes, computed as a `double` like in QEMU, and rounded to the nearest byte.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the result lies in 0..=2^60"
)]
fn fraction_bytes(digits: &str, shift: u32) -> Result<u64, SizeError> {
    if digits.bytes().all(|digit| digit == b'0') {
        return Ok(0);
    }
    if shift == 0 {
        return Err(SizeError::Malformed);
    }
    let fraction: f64 = format!("0.{digits}").parse().map_err(|_| SizeError::Malformed)?;
    Ok((fraction * (1_u64 << shift) as f64).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use SizeError::{Malformed, OutOfRange};

    #[test]
    fn suffixes_are_powers_of_1024_and_fractions_are_rounded() {
        let sizes = [
            ("1.5G", 3 << 29),
            ("64k", 65536),
            (".5M", 1 << 19),
            ("1.k", 1024),
            ("0x10", 16),
            ("7", 7),
            (" +1k", 1024),
            ("010", 10),
            ("1.00048828125k", 1025),
            ("0.1k", 102),
            ("15E", 15 << 60),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_fraction_of_zero_needs_no_suffix() {
        assert_eq!(parse_size("1024.0"), Ok(1024));
        assert_eq!(parse_size("1024."), Ok(1024));
        assert_eq!(parse_size("1.0b"), Ok(1));
        assert_eq!(parse_size("1.5"), Err(Malformed));
        assert_eq!(parse_size("1.5B"), Err(Malformed));
    }

    #[test]
    fn malformed_sizes_are_distinguished_from_sizes_out_of_range() {
        for text in ["16E", "-1", "-0", "18446744073709551616", "15.99999999999999999999E"] {
            assert_eq!(parse_size(text), Err(OutOfRange), "{text}");
        }
        for text in [
            "1kk",
            "",
            "-1k",
            "-",
            "99999999999999999999x",
            "1e3",
            "1.5kB",
            "0x",
            "0x10k",
            ".",
            "5k ",
        ] {
            assert_eq!(parse_size(text), Err(Malformed), "{text}");
        }
    }

    #[test]
    fn plain_numbers_are_read_as_strtoull_reads_them() {
        assert_eq!(parse_number("0x1f"), Ok(31));
        assert_eq!(parse_number("017"), Ok(15));
        assert_eq!(parse_number(" +9"), Ok(9));
        assert_eq!(parse_number("0"), Ok(0));
        assert_eq!(parse_number("-1"), Ok(u64::MAX));
        assert_eq!(parse_number("99999999999999999999"), Err(OutOfRange));
        assert_eq!(parse_number("-99999999999999999999"), Err(OutOfRange));
        for text in ["", "9z", "09", "16k", "16.0", "0x", "+-1", "16 "] {
            assert_eq!(parse_number(text), Err(Malformed), "{text}");
        }
    }
}
