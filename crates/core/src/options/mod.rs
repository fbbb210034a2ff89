//! Options: the nested key-value trees that nodes are opened and images created with.
//!
//! They come as JSON (`json:{…}`, QMP), as dotted keys (`file.filename=x,read-only=on`) or from a file
//! name, and all become one tree, [`Options`]. Values from dotted keys are strings, so reading a value
//! is lenient in QEMU's way: `on`/`off` for booleans, digits for numbers. A driver's own options are one
//! serde struct, filled by [`Options::extract`].

mod lenient;
mod size;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use size::{SizeError, parse_size};

use crate::{Error, Result};

/// A tree of options.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options(Map<String, Value>);

/// Deepest nesting accepted: options come from users and must not exhaust the stack.
const MAX_DEPTH: usize = 128;

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses a JSON object. Keys may be dotted.
    ///
    /// # Errors
    /// When it is not JSON, not an object, or contradicts itself.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::invalid(format!("JSON parse error, {error}")))?;
        let Value::Object(map) = value else {
            return Err(Error::invalid("Invalid JSON object given"));
        };
        Self::from_map(map)
    }

    /// Takes over a JSON object, nesting its dotted keys.
    ///
    /// # Errors
    /// When keys contradict one another.
    pub fn from_map(map: Map<String, Value>) -> Result<Self> {
        let mut options = Self::new();
        for (key, value) in map {
            let value = match value {
                Value::Object(inner) => Value::Object(Self::from_map(inner)?.0),
                other => other,
            };
            options.set(&key, value)?;
        }
        Ok(options)
    }

    /// Parses `key=value,key=value` with dotted keys; a comma in a value is doubled. A first element
    /// without `=` is the value of `implied`, later ones mean `on`.
    ///
    /// # Errors
    /// When keys contradict one another.
    pub fn from_dotted(text: &str, implied: Option<&str>) -> Result<Self> {
        let mut options = Self::new();
        for (index, (key, value)) in split_keyval(text).into_iter().enumerate() {
            match (value, implied) {
                (Some(value), _) => options.set(&key, value)?,
                (None, Some(implied)) if index == 0 => options.set(implied, key)?,
                (None, _) => match key.strip_prefix("no") {
                    Some(rest)
                        if !rest.is_empty() && !rest.starts_with('-') && key != "node-name" =>
                    {
                        options.set(rest, "off")?;
                    }
                    _ => options.set(&key, "on")?,
                },
            }
        }
        Ok(options)
    }

    /// Sets a value by its dotted key, making the objects on the way.
    ///
    /// # Errors
    /// When a key on the way has a plain value, or is nested too deeply.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        let parts: Vec<&str> = key.split('.').collect();
        if parts.len() > MAX_DEPTH {
            return Err(Error::invalid(format!("Parameter '{key}' is nested too deeply")));
        }
        let Some((last, path)) = parts.split_last() else { return Ok(()) };
        let mut map = &mut self.0;
        for part in path {
            let entry = map.entry((*part).to_owned()).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(inner) = entry else {
                return Err(Error::invalid(format!("Parameters '{part}.*' used inconsistently")));
            };
            map = inner;
        }
        map.insert((*last).to_owned(), value.into());
        Ok(())
    }

    /// Sets a value by its plain key.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Sets a value unless the key has one.
    pub fn insert_default(&mut self, key: &str, value: impl Into<Value>) {
        if !self.0.contains_key(key) {
            self.insert(key, value);
        }
    }

    /// Sets all that `other` has; objects are merged key by key.
    pub fn overlay(&mut self, other: &Options) {
        for (key, value) in &other.0 {
            match (self.0.get_mut(key), value) {
                (Some(Value::Object(own)), Value::Object(theirs)) => {
                    own.extend(theirs.iter().map(|(key, value)| (key.clone(), value.clone())));
                }
                _ => self.insert(key, value.clone()),
            }
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The value of a key, if it is text.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }

    /// Whether a key has a value.
    pub fn contains(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Takes a value out.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key)
    }

    /// Takes text out.
    ///
    /// # Errors
    /// When the value is an object or a list.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Bool(on)) => Ok(Some(if on { "on" } else { "off" }.to_owned())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => {
                Err(Error::invalid(format!("Invalid parameter type for '{key}', expected: string")))
            }
        }
    }

    /// Takes a boolean out.
    ///
    /// # Errors
    /// When the value is something else.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(Value::String(text)) if text == "on" || text == "true" || text == "yes" => {
                Ok(Some(true))
            }
            Some(Value::String(text)) if text == "off" || text == "false" || text == "no" => {
                Ok(Some(false))
            }
            Some(_) => Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
        }
    }

    /// Takes a size in bytes out; text may have a suffix (`64k`, `1.5G`).
    ///
    /// # Errors
    /// When the value is something else.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        let wrong = |text: &str| match parse_size(text) {
            Err(SizeError::Malformed) if text.trim_start().starts_with('-') => {
                Error::invalid(format!("Value '{text}' is out of range for parameter '{key}'"))
            }
            Err(SizeError::TooLarge) => {
                Error::invalid(format!("Value '{text}' is too large for parameter '{key}'"))
            }
            _ => Error::invalid(format!(
                "Parameter '{key}' expects a non-negative number below 2^64"
            ))
            .with_hint(lenient::SIZE_HINT),
        };
        match self.take(key) {
            None => Ok(None),
            Some(Value::Number(number)) => {
                number.as_u64().map(Some).ok_or_else(|| wrong(&number.to_string()))
            }
            Some(Value::String(text)) => parse_size(&text).map(Some).map_err(|_| wrong(&text)),
            Some(_) => Err(wrong("")),
        }
    }

    /// Takes a nested object out; `None` if the key is absent or not an object.
    pub fn take_options(&mut self, key: &str) -> Option<Options> {
        match self.0.get(key) {
            Some(Value::Object(_)) => match self.take(key) {
                Some(Value::Object(map)) => Some(Self(map)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Takes out all keys that `T` has as fields and fills it; others stay.
    ///
    /// # Errors
    /// When a value does not fit its field.
    pub fn extract<T: DeserializeOwned + serde::Serialize + Default>(&mut self) -> Result<T> {
        let Ok(Value::Object(fields)) = serde_json::to_value(T::default()) else {
            return Err(Error::invalid("options are not an object"));
        };
        let mut own = Map::new();
        for key in fields.keys() {
            if let Some(value) = self.take(key) {
                own.insert(key.clone(), value);
            }
        }
        lenient::from_map(&own)
    }

    /// The keys left, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The keys and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As a JSON object.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }
}

/// Splits `a=b,c,d=e,,f` at single commas into keys and values; doubled commas become one.
pub fn split_keyval(text: &str) -> Vec<(String, Option<String>)> {
    let mut elements = Vec::new();
    let mut element = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' {
            if chars.peek() == Some(&',') {
                chars.next();
                element.push(',');
                continue;
            }
            elements.push(std::mem::take(&mut element));
            continue;
        }
        element.push(c);
    }
    elements.push(element);
    let split = |element: String| match element.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (element, None),
    };
    elements.into_iter().filter(|element| !element.is_empty()).map(split).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_keys_and_json_make_the_same_tree() {
        let dotted = Options::from_dotted("driver=qcow2,file.driver=file,file.filename=a,,b", None);
        let json = Options::from_json(
            r#"{"driver":"qcow2","file":{"driver":"file"},"file.filename":"a,b"}"#,
        );
        assert_eq!(dotted.unwrap(), json.unwrap());
    }

    #[test]
    fn a_key_used_both_plain_and_nested_is_refused() {
        let error = Options::from_dotted("file=x,file.filename=y", None).unwrap_err();
        assert_eq!(error.to_string(), "Parameters 'file.*' used inconsistently");
    }

    #[test]
    fn extract_takes_only_the_fields_of_the_struct() {
        #[derive(Default, serde::Serialize, serde::Deserialize, PartialEq, Debug)]
        #[serde(rename_all = "kebab-case", default)]
        struct Own {
            lazy_refcounts: bool,
            cache_size: Option<u64>,
            name: Option<String>,
        }
        let mut options =
            Options::from_dotted("lazy-refcounts=on,cache-size=4096,other=1,name=5", None).unwrap();
        let own: Own = options.extract().unwrap();
        let expected =
            Own { lazy_refcounts: true, cache_size: Some(4096), name: Some("5".to_owned()) };
        assert_eq!(own, expected);
        assert_eq!(options.keys().collect::<Vec<_>>(), ["other"]);
    }
}
