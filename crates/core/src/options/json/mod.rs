//! Parses the JSON dialect of QEMU: standard JSON, except that strings may have single quotes, and that a duplicate key
//! in an object is an error. Error messages have QEMU's wording.
//!
//! | file | concern |
//! |---|---|
//! | `token` | splitting the text into tokens |
//! | `text` | strings and their escape sequences |
//!
//! The tokens of a value are collected until its brackets are closed, and then parsed. So a character that belongs to
//! no token is reported even if a syntax error precedes it.

mod text;
mod token;

use std::iter::Peekable;
use std::vec::IntoIter;

use serde_json::{Map, Number, Value};

use super::MAX_DEPTH;
use crate::{Error, Result};
use token::{Token, Tokens};

/// Parses a text that contains one value, with optional white space around it.
///
/// # Errors
/// When the text is not JSON, contains another value, or is nested too deeply.
pub fn parse_json(text: &str) -> Result<Value> {
    let mut tokens = Tokens::new(text);
    let Some(first) = tokens_of_a_value(&mut tokens) else {
        return Err(Error::invalid("Expecting a JSON value"));
    };
    let value = Parser { tokens: first?.into_iter().peekable() }.value()?;
    match tokens_of_a_value(&mut tokens) {
        Some(_) => Err(Error::invalid("Expecting at most one JSON value")),
        None => Ok(value),
    }
}

fn fault<T>(text: impl std::fmt::Display) -> Result<T> {
    Err(Error::invalid(format!("JSON parse error, {text}")))
}

/// Returns the tokens of the next value. A value that begins with a bracket ends when all its brackets are closed, or
/// at the end of the text. `None` if no token is left.
fn tokens_of_a_value<'t>(tokens: &mut Tokens<'t>) -> Option<Result<Vec<Token<'t>>>> {
    let mut found = Vec::new();
    let (mut braces, mut brackets) = (0_usize, 0_usize);
    for token in tokens.by_ref() {
        let token = match token {
            Ok(token) => token,
            Err(stray) => return Some(fault(format_args!("stray '{stray}'"))),
        };
        let mut too_many = false;
        match token {
            Token::Mark('{') => braces += 1,
            Token::Mark('[') => brackets += 1,
            Token::Mark('}') if braces > 0 => braces -= 1,
            Token::Mark(']') if brackets > 0 => brackets -= 1,
            Token::Mark('}' | ']') => too_many = true,
            _ => {}
        }
        if braces.saturating_add(brackets) > MAX_DEPTH {
            return Some(Err(Error::invalid("JSON nesting depth limit exceeded")));
        }
        found.push(token);
        if too_many || braces == 0 && brackets == 0 {
            return Some(Ok(found));
        }
    }
    (!found.is_empty()).then_some(Ok(found))
}

/// Parses the tokens of one value. The nesting is not deeper than [`MAX_DEPTH`].
struct Parser<'t> {
    tokens: Peekable<IntoIter<Token<'t>>>,
}

impl Parser<'_> {
    fn value(&mut self) -> Result<Value> {
        match self.tokens.next() {
            None => fault("premature EOI"),
            Some(Token::Mark('{')) => self.object(),
            Some(Token::Mark('[')) => self.list(),
            Some(Token::Mark(_)) => fault("expecting value"),
            Some(Token::Text(quoted)) => text::unquote(quoted).map(Value::String),
            Some(Token::Number(digits)) => match digits.parse::<Number>() {
                Ok(number) => Ok(Value::Number(number)),
                Err(_) => fault(format_args!("invalid number '{digits}'")),
            },
            Some(Token::Keyword("true")) => Ok(Value::Bool(true)),
            Some(Token::Keyword("false")) => Ok(Value::Bool(false)),
            Some(Token::Keyword("null")) => Ok(Value::Null),
            Some(Token::Keyword(other)) => fault(format_args!("invalid keyword '{other}'")),
        }
    }

    fn object(&mut self) -> Result<Value> {
        let mut map = Map::new();
        if self.takes('}') {
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return fault("key is not a string in object");
            };
            self.expect(':', "missing : in object pair")?;
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return fault("duplicate key");
            }
            if self.takes('}') {
                return Ok(Value::Object(map));
            }
            self.expect(',', "expected separator in dict")?;
        }
    }

    fn list(&mut self) -> Result<Value> {
        let mut list = Vec::new();
        if self.takes(']') {
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            if self.takes(']') {
                return Ok(Value::Array(list));
            }
            self.expect(',', "expected separator in list")?;
        }
    }

    /// Consumes the next token if the token is this punctuation mark.
    fn takes(&mut self, mark: char) -> bool {
        self.tokens.next_if(|token| *token == Token::Mark(mark)).is_some()
    }

    fn expect(&mut self, mark: char, missing: &str) -> Result<()> {
        match self.tokens.next() {
            None => fault("premature EOI"),
            Some(token) if token == Token::Mark(mark) => Ok(()),
            Some(_) => fault(missing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn strings_may_have_single_or_double_quotes() {
        let value = parse_json(
            r#" {'a': "it's", "b": 'say "x"', 'c': ["\'", '\'', '\u00e9\ud83d\ude00']} "#,
        );
        assert_eq!(value.unwrap(), json!({"a": "it's", "b": "say \"x\"", "c": ["'", "'", "é😀"]}));
    }

    #[test]
    fn everything_else_is_standard_json() {
        let text = r#"{"a":[1,-2,1.5e3,18446744073709551615,true,false,null,{}],"b":{"c":[]}}"#;
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(parse_json(text).unwrap(), expected);
    }

    #[test]
    fn faults_are_reported_in_the_words_of_qemus_tools() {
        let cases = [
            ("", "Expecting a JSON value"),
            ("{", "JSON parse error, premature EOI"),
            ("{'a':1,'a':2}", "JSON parse error, duplicate key"),
            ("{'a':1,}", "JSON parse error, expecting value"),
            ("{'a' 1}", "JSON parse error, missing : in object pair"),
            ("{'a':1 'b':2}", "JSON parse error, expected separator in dict"),
            ("[1 2]", "JSON parse error, expected separator in list"),
            ("nope", "JSON parse error, invalid keyword 'nope'"),
            ("{a:1}", "JSON parse error, invalid keyword 'a'"),
            ("{1:1}", "JSON parse error, key is not a string in object"),
            ("{'a':b.c}", "JSON parse error, stray '.'"),
            ("{'a':1};", "Expecting at most one JSON value"),
            ("{}}", "Expecting at most one JSON value"),
            ("[}", "JSON parse error, expecting value"),
            ("'a\\x'", "JSON parse error, invalid escape sequence in string"),
            ("'\\u12'", "JSON parse error, \\u12' is not a valid Unicode character"),
            (
                "'\\ud800\\u0041'",
                "JSON parse error, \\ud800\\u0041 is not a valid Unicode character",
            ),
            ("'\\ufffe'", "JSON parse error, \\ufffe is not a valid Unicode character"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_json(text).unwrap_err().to_string(), expected, "{text}");
        }
        assert!(parse_json(&"[".repeat(100_000)).is_err());
        assert!(parse_json("'\\ud800'").is_err());
    }
}
