//! Parses definitions of objects: `secret,id=s0,data=x`. The syntax is that of option lists, with stricter rules for
//! keys. A key consists of names and indices joined by dots; the first part is a name. A name begins with a letter or
//! `_`, and consists of letters, digits, `-` and `_`. Every key has a value.

use serde_json::Value;

use super::{MAX_DEPTH, Options, list::take_value};
use crate::{Error, Result};

impl Options {
    /// Parses a definition. A first element without `=` is the value of `implied`.
    ///
    /// # Errors
    /// When a key is malformed, has no value, or has both a plain value and nested values.
    pub fn from_keyval(text: &str, implied: &str) -> Result<Self> {
        Self::parse_keyval(text, implied, None)
    }

    /// Like [`Self::from_keyval`], but elements `help` and `?` without a value are accepted. The second result is whether the
    /// definition has such an element.
    ///
    /// # Errors
    /// Like [`Self::from_keyval`].
    pub fn from_keyval_or_help(text: &str, implied: &str) -> Result<(Self, bool)> {
        let mut help = false;
        Ok((Self::parse_keyval(text, implied, Some(&mut help))?, help))
    }

    fn parse_keyval(text: &str, implied: &str, mut help: Option<&mut bool>) -> Result<Self> {
        let mut options = Self::new();
        let mut rest = text;
        let mut is_first = true;
        while !rest.is_empty() {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            let is_implied = is_first;
            is_first = false;
            let (key, value) = match (after.strip_prefix('='), &mut help) {
                (None, Some(help)) if matches!(word, "help" | "?") => {
                    **help = true;
                    rest = after.strip_prefix(',').unwrap_or(after);
                    continue;
                }
                (Some(after), _) => (word, after),
                (None, _) if is_implied && !word.is_empty() => (implied, rest),
                (None, _) if word.is_empty() => return Err(invalid(word)),
                (None, _) => {
                    return Err(Error::invalid(format!("Expected '=' after parameter '{word}'")));
                }
            };
            check(key)?;
            let (value, after) = take_value(value);
            if options.is_used_otherwise(key) {
                let outer = key.split('.').next().unwrap_or_default();
                return Err(Error::invalid(format!("Parameters '{outer}.*' used inconsistently")));
            }
            options.set(key, value)?;
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        Ok(options)
    }

    /// Whether setting `key` would give a key both a plain value and nested values.
    fn is_used_otherwise(&self, key: &str) -> bool {
        let mut map = &self.0;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            match (map.get(part), parts.peek().is_some()) {
                (Some(Value::Object(inner)), true) => map = inner,
                (Some(value), is_nested) => return is_nested != value.is_object(),
                (None, _) => return false,
            }
        }
        false
    }
}

fn invalid(key: &str) -> Error {
    Error::invalid(format!("Invalid parameter '{key}'"))
}

/// Refuses a malformed key. The first part must be a name; each later part must be a name or an index.
fn check(key: &str) -> Result<()> {
    let is_name = |part: &str| {
        part.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    };
    let mut parts = key.split('.');
    let first_is_name = parts.next().is_some_and(is_name);
    let is_index = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let all_well = first_is_name && parts.clone().all(|part| is_name(part) || is_index(part));
    if all_well && parts.count() < MAX_DEPTH { Ok(()) } else { Err(invalid(key)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_no_names_or_have_no_value_are_refused() {
        let message = |text| Options::from_keyval(text, "qom-type").unwrap_err().to_string();
        assert_eq!(message(","), "Invalid parameter ''");
        assert_eq!(message("secret,id"), "Expected '=' after parameter 'id'");
        assert_eq!(message("secret,=x"), "Invalid parameter ''");
        assert_eq!(message("secret,1x=x"), "Invalid parameter '1x'");
        assert_eq!(message("secret,x.=1"), "Invalid parameter 'x.'");
        assert_eq!(message("secret,data=y,data.x=1"), "Parameters 'data.*' used inconsistently");
        assert_eq!(message("secret,data.x=1,data=y"), "Parameters 'data.*' used inconsistently");
        let options = Options::from_keyval("secret,id=s,data=a,,b,data=c,", "qom-type").unwrap();
        assert_eq!(options.get_str("data"), Some("c"));
    }

    #[test]
    fn help_is_accepted_in_any_place_if_the_caller_allows_it() {
        let parse = |text| {
            let parsed = Options::from_keyval_or_help(text, "qom-type");
            parsed.map(|(options, help)| (options.get_str("qom-type").map(str::to_owned), help))
        };
        let of = |kind: Option<&str>, help| (kind.map(str::to_owned), help);
        for text in ["help", "?", "help,id=x", "id=x,help"] {
            assert_eq!(parse(text).unwrap(), of(None, true), "{text}");
        }
        for text in ["secret,help", "secret,?,data=x", "qom-type=secret,help,help"] {
            assert_eq!(parse(text).unwrap(), of(Some("secret"), true), "{text}");
        }
        assert_eq!(parse("secret,help=x").unwrap(), of(Some("secret"), false));
        for text in ["help,secret", "secret,x,help", ",help"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(Options::from_keyval("secret,help", "qom-type").is_err());
    }
}
