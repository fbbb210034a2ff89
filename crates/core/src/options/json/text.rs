//! Decodes JSON strings: the text between the quotes, with its escape sequences.

use super::fault;
use crate::{Result, names};

/// The text of a quoted string.
///
/// # Errors
/// When an escape sequence is wrong.
pub(super) fn unquote(quoted: &str) -> Result<String> {
    let mut text = String::with_capacity(quoted.len());
    // `rest` always ends with the closing quote. The quote is one byte long.
    let mut rest = quoted.get(1..).unwrap_or_default();
    while rest.len() > 1 {
        let (plain, escape) = match rest.find('\\') {
            Some(position) => rest.split_at(position),
            None => rest.split_at(rest.len().saturating_sub(1)),
        };
        text.push_str(plain);
        rest = escape;
        if let Some(sequence) = escape.strip_prefix('\\') {
            rest = unescape(sequence, &mut text)?;
        }
    }
    Ok(text)
}

/// Appends the character of the escape sequence after a backslash, and returns the text after the escape sequence.
/// `sequence` includes the closing quote of the string.
fn unescape<'s>(sequence: &'s str, text: &mut String) -> Result<&'s str> {
    let mut chars = sequence.chars();
    let c = match chars.next() {
        Some(c @ ('"' | '\'' | '\\' | '/')) => c,
        Some('b') => '\u{8}',
        Some('f') => '\u{c}',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some('u') => return unicode(chars.as_str(), text),
        _ => return fault("invalid escape sequence in string"),
    };
    text.push(c);
    Ok(chars.as_str())
}

/// Like [`unescape`], for a character that is written as one or two UTF-16 units. `sequence` begins with the digits of
/// the first unit.
fn unicode<'s>(sequence: &'s str, text: &mut String) -> Result<&'s str> {
    let (first, mut rest) = unit(sequence);
    let mut units = vec![first];
    if matches!(first, Some(0xd800..0xdc00))
        && let Some(next) = rest.strip_prefix("\\u")
    {
        let (second, after) = unit(next);
        units.push(second);
        rest = after;
    }
    let units: Option<Vec<u16>> = units.into_iter().collect();
    let decoded =
        units.map(|units| char::decode_utf16(units).collect::<std::result::Result<String, _>>());
    match decoded {
        // QEMU stores this character as two bytes that are not UTF-8, so that it does not end a C string.
        Some(Ok(decoded)) if decoded == "\0" => text.push_str(&names::to_text(&[0xc0, 0x80])),
        Some(Ok(decoded)) if !decoded.chars().any(is_noncharacter) => text.push_str(&decoded),
        _ => {
            let read = sequence.len().saturating_sub(rest.len());
            let read = sequence.get(..read).unwrap_or(sequence);
            return fault(format_args!("\\u{read} is not a valid Unicode character"));
        }
    }
    Ok(rest)
}

/// The UTF-16 unit of the first four characters, if all are hexadecimal digits; and the text after these characters.
fn unit(text: &str) -> (Option<u16>, &str) {
    let end = text.char_indices().nth(4).map_or(text.len(), |(position, _)| position);
    let (digits, rest) = text.split_at(end);
    let all_digits = digits.len() == 4 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    (u16::from_str_radix(digits, 16).ok().filter(|_| all_digits), rest)
}

/// Whether Unicode reserves this code point as a noncharacter.
fn is_noncharacter(c: char) -> bool {
    matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe
}
