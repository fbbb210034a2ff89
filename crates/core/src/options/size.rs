//! Sizes as people write them: `512`, `64k`, `1.5G`, `0x1000`.

/// Why a text is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    Malformed,
    /// More than 2^64 - 1 bytes.
    TooLarge,
}

/// Parses a size in bytes with an optional suffix (`b`, `k`, `M`, `G`, `T`, `P`, `E`; powers of 1024) and an
/// optional decimal fraction, or a hexadecimal number without suffix.
///
/// # Errors
/// [`SizeError`] says why not.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    // As the C library reads numbers.
    let text = text.trim_ascii_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).map_err(|_| SizeError::Malformed);
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
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
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || !whole.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Malformed);
    }
    let whole = if whole.is_empty() { "0" } else { whole };
    let whole: u128 = whole.parse().map_err(|_| SizeError::TooLarge)?;
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
    let bytes = bytes.checked_add(fraction_bytes(fraction, shift)?).ok_or(SizeError::TooLarge)?;
    u64::try_from(bytes).map_err(|_| SizeError::TooLarge)
}

fn fraction_bytes(fraction: &str, shift: u32) -> Result<u128, SizeError> {
    if fraction.is_empty() {
        return Ok(0);
    }
    if shift == 0 || fraction.len() > 18 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Malformed);
    }
    let digits: u128 = fraction.parse().map_err(|_| SizeError::Malformed)?;
    let power = u32::try_from(fraction.len()).map_err(|_| SizeError::Malformed)?;
    Ok((digits << shift) / 10_u128.pow(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_and_fractions_are_cut_off() {
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size(".5M"), Ok(1 << 19));
        assert_eq!(parse_size("0x10"), Ok(16));
        assert_eq!(parse_size("7"), Ok(7));
        assert_eq!(parse_size(" +1k"), Ok(1024));
    }

    #[test]
    fn nonsense_and_overflow_are_told_apart() {
        assert_eq!(parse_size("16E"), Err(SizeError::TooLarge));
        assert_eq!(parse_size("-1"), Err(SizeError::Malformed));
        assert_eq!(parse_size("1kk"), Err(SizeError::Malformed));
        assert_eq!(parse_size(""), Err(SizeError::Malformed));
    }
}
