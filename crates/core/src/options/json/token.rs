//! Splits a JSON text into tokens. The tokens are not interpreted.

/// A token with its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token<'t> {
    /// One of `{ } [ ] : ,`.
    Mark(char),
    /// A number.
    Number(&'t str),
    /// Lower case letters.
    Keyword(&'t str),
    /// A string with its quotes.
    Text(&'t str),
}

/// Splits a text into tokens. An incomplete token is returned as an error, and so is a character with which no token
/// can begin.
pub(super) struct Tokens<'t> {
    rest: &'t str,
}

impl<'t> Tokens<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { rest: text }
    }

    /// Consumes a token of `len` bytes.
    fn take(&mut self, len: usize) -> &'t str {
        let (token, rest) = self.rest.split_at_checked(len).unwrap_or((self.rest, ""));
        self.rest = rest;
        token
    }

    /// Consumes the text up to `position` and the character there, which the token does not allow.
    fn take_invalid(&mut self, position: usize) -> &'t str {
        let wrong = self.rest.get(position..).and_then(|rest| rest.chars().next());
        self.take(position.saturating_add(wrong.map_or(0, char::len_utf8)))
    }
}

impl<'t> Iterator for Tokens<'t> {
    type Item = Result<Token<'t>, &'t str>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let first = self.rest.chars().next()?;
        Some(match first {
            '{' | '}' | '[' | ']' | ':' | ',' => {
                self.take(1);
                Ok(Token::Mark(first))
            }
            'a'..='z' => {
                let len = self.rest.bytes().take_while(u8::is_ascii_lowercase).count();
                Ok(Token::Keyword(self.take(len)))
            }
            '"' | '\'' => match text_len(self.rest) {
                Ok(len) => Ok(Token::Text(self.take(len))),
                Err(position) => Err(self.take_invalid(position)),
            },
            '-' | '0'..='9' => match number_len(self.rest) {
                Ok(len) => Ok(Token::Number(self.take(len))),
                Err(position) => Err(self.take_invalid(position)),
            },
            _ => Err(self.take_invalid(0)),
        })
    }
}

/// The length of the string at the start of the text, or the position of the character that the string does not allow.
fn text_len(text: &str) -> Result<usize, usize> {
    let mut chars = text.char_indices();
    let quote = chars.next().map(|(_, quote)| quote);
    let mut escaped = false;
    for (position, c) in chars {
        match c {
            _ if c < ' ' => return Err(position),
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if Some(c) == quote => return Ok(position.saturating_add(1)),
            _ => {}
        }
    }
    Err(text.len())
}

/// The length of the number at the start of the text, or the position of the character that the number does not allow.
fn number_len(text: &str) -> Result<usize, usize> {
    let bytes = text.as_bytes();
    let at = |position: usize| bytes.get(position).copied();
    let digits = |from: usize| {
        let digits = bytes.get(from..).unwrap_or_default();
        match digits.iter().take_while(|byte| byte.is_ascii_digit()).count() {
            0 => Err(from),
            count => Ok(from.saturating_add(count)),
        }
    };
    let start = usize::from(at(0) == Some(b'-'));
    let mut end = digits(start)?;
    if at(start) == Some(b'0') && end > start.saturating_add(1) {
        return Err(start.saturating_add(1));
    }
    if at(end) == Some(b'.') {
        end = digits(end.saturating_add(1))?;
    }
    if matches!(at(end), Some(b'e' | b'E')) {
        end = end.saturating_add(1);
        end = digits(end.saturating_add(usize::from(matches!(at(end), Some(b'+' | b'-')))))?;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_contains_the_stray_character_and_the_token_before_it() {
        let cases = [
            ("'a\nb'", "'a\n"),
            ("\"abc", "\"abc"),
            ("'a\\'", "'a\\'"),
            ("012", "01"),
            ("-x", "-x"),
            ("1.,", "1.,"),
            ("1e+}", "1e+}"),
            ("1.", "1."),
            (" ;", ";"),
            ("A", "A"),
            ("\u{e9}x", "\u{e9}"),
        ];
        for (text, stray) in cases {
            assert_eq!(Tokens::new(text).next(), Some(Err(stray)), "{text}");
        }
    }

    #[test]
    fn a_number_ends_where_another_token_begins() {
        for (text, number) in [("-0.5e-3,", "-0.5e-3"), ("0]", "0"), ("10true", "10")] {
            assert_eq!(Tokens::new(text).next(), Some(Ok(Token::Number(number))), "{text}");
        }
    }
}
