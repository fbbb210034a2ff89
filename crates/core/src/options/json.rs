//! The JSON dialect of QEMU: standard JSON, but strings may stand in single quotes, and a key may not come twice
//! in an object. Faults are reported in QEMU's words.

use serde_json::{Map, Number, Value};

use super::MAX_DEPTH;
use crate::{Error, Result};

/// Parses one value, with nothing but white space around it.
///
/// # Errors
/// When it is not JSON.
pub fn parse_json(text: &str) -> Result<Value> {
    let mut parser = Parser { rest: text };
    parser.skip_space();
    if parser.rest.is_empty() {
        return Err(Error::invalid("Expecting a JSON value"));
    }
    let value = parser.value(0)?;
    parser.skip_space();
    if parser.rest.is_empty() { Ok(value) } else { fault("expecting end of input") }
}

fn fault<T>(text: impl std::fmt::Display) -> Result<T> {
    Err(Error::invalid(format!("JSON parse error, {text}")))
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    /// Takes the next character if it is this one.
    fn takes(&mut self, c: char) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH {
            return fault("nested too deeply");
        }
        self.skip_space();
        match self.rest.chars().next() {
            None => fault("premature EOI"),
            Some('{') => self.object(depth),
            Some('[') => self.list(depth),
            Some('"' | '\'') => Ok(Value::String(self.string()?)),
            Some('-' | '0'..='9') => self.number(),
            Some('a'..='z') => self.keyword(),
            Some('}' | ']' | ':' | ',') => fault("expecting value"),
            Some(other) => fault(format_args!("stray '{other}'")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value> {
        let mut map = Map::new();
        self.takes('{');
        if self.takes('}') {
            return Ok(Value::Object(map));
        }
        loop {
            self.skip_space();
            let key = match self.rest.chars().next() {
                None => return fault("premature EOI"),
                Some('"' | '\'') => self.string()?,
                Some('}' | ']' | ':' | ',') => return fault("expecting value"),
                Some(_) => return fault("key is not a string in object"),
            };
            if !self.takes(':') {
                return fault(if self.rest.is_empty() {
                    "premature EOI"
                } else {
                    "missing : in object pair"
                });
            }
            let value = self.value(depth.saturating_add(1))?;
            if map.insert(key, value).is_some() {
                return fault("duplicate key");
            }
            if self.takes('}') {
                return Ok(Value::Object(map));
            }
            if !self.takes(',') {
                return fault(if self.rest.is_empty() {
                    "premature EOI"
                } else {
                    "expected separator in dict"
                });
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value> {
        let mut list = Vec::new();
        self.takes('[');
        if self.takes(']') {
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value(depth.saturating_add(1))?);
            if self.takes(']') {
                return Ok(Value::Array(list));
            }
            if !self.takes(',') {
                return fault(if self.rest.is_empty() {
                    "premature EOI"
                } else {
                    "expected separator in list"
                });
            }
        }
    }

    fn keyword(&mut self) -> Result<Value> {
        let end = self.rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            other => fault(format_args!("invalid keyword '{other}'")),
        }
    }

    fn number(&mut self) -> Result<Value> {
        let in_number = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        let end = self.rest.find(|c: char| !in_number(c)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        let parsed = text.parse::<Number>();
        parsed.map(Value::Number).or_else(|_| fault(format_args!("stray '{text}'")))
    }

    fn string(&mut self) -> Result<String> {
        let mut chars = self.rest.chars();
        let quote = chars.next();
        let mut text = String::new();
        loop {
            match chars.next() {
                None => return fault("premature EOI"),
                Some('\\') => text.push(escaped(&mut chars)?),
                found if found == quote => break,
                Some(control) if control < ' ' => return fault(format_args!("stray '{control}'")),
                Some(other) => text.push(other),
            }
        }
        self.rest = chars.as_str();
        Ok(text)
    }
}

/// The character of the escape sequence behind a backslash.
fn escaped(chars: &mut std::str::Chars<'_>) -> Result<char> {
    let Some(kind) = chars.next() else { return fault("premature EOI") };
    match kind {
        '"' | '\'' | '\\' | '/' => Ok(kind),
        'b' => Ok('\u{8}'),
        'f' => Ok('\u{c}'),
        'n' => Ok('\n'),
        'r' => Ok('\r'),
        't' => Ok('\t'),
        'u' => {
            let mut units = vec![unit(chars)?];
            if matches!(units.first(), Some(0xd800..0xdc00)) && chars.as_str().starts_with("\\u") {
                chars.nth(1);
                units.push(unit(chars)?);
            }
            match char::decode_utf16(units).next() {
                Some(Ok(c)) if c != '\0' => Ok(c),
                _ => fault("invalid Unicode escape in string"),
            }
        }
        other => fault(format_args!("invalid escape sequence '\\{other}' in string")),
    }
}

/// Four hexadecimal digits.
fn unit(chars: &mut std::str::Chars<'_>) -> Result<u16> {
    let digits: String = chars.take(4).collect();
    let all_digits = digits.len() == 4 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    match u16::from_str_radix(&digits, 16) {
        Ok(unit) if all_digits => Ok(unit),
        _ => fault(format_args!("invalid escape sequence '\\u{digits}' in string")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn strings_stand_in_single_or_double_quotes() {
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
    fn faults_are_told_in_the_words_of_qemus_tools() {
        let cases = [
            ("", "Expecting a JSON value"),
            ("{", "JSON parse error, premature EOI"),
            ("{'a':1,'a':2}", "JSON parse error, duplicate key"),
            ("{'a':1,}", "JSON parse error, expecting value"),
            ("{'a' 1}", "JSON parse error, missing : in object pair"),
            ("{'a':1 'b':2}", "JSON parse error, expected separator in dict"),
            ("[1 2]", "JSON parse error, expected separator in list"),
            ("nope", "JSON parse error, invalid keyword 'nope'"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_json(text).unwrap_err().to_string(), expected, "{text}");
        }
        assert!(parse_json(&"[".repeat(100_000)).is_err());
        assert!(parse_json("'\\ud800'").is_err());
    }
}
