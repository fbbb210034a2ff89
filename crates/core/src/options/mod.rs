//! [`Options`]: nested key-value trees with which nodes are opened and images are created.
//!
//! Options come as JSON (`json:{…}`, QMP), as dotted keys (`file.filename=x,read-only=on`) or from a file name. All
//! three forms are converted to one tree, [`Options`]. Values from dotted keys are strings, so values are read
//! leniently, as QEMU does: `on`/`off` for booleans, digits for numbers. A driver declares its own options as a serde
//! struct, and [`Options::extract`] fills this struct.

mod json;
mod keyval;
mod lenient;
mod list;
mod size;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use json::parse_json;
pub use list::{ListItem, split_list};
pub use size::{SizeError, parse_bool, parse_number, parse_size};

use crate::{Error, Result};

/// A tree of options.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options(Map<String, Value>);

/// Maximum depth of nesting. Options come from users and must not exhaust the stack.
const MAX_DEPTH: usize = 128;

impl Options {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses a JSON object. Keys may be dotted.
    ///
    /// # Errors
    /// When `text` is not JSON or not an object, or when a key is nested too deeply.
    pub fn from_json(text: &str) -> Result<Self> {
        let Value::Object(map) = parse_json(text)? else {
            return Err(Error::invalid("Invalid JSON object given"));
        };
        Self::from_map(map)
    }

    /// Converts a JSON object and nests its dotted keys. The elements of a list get their indices as keys. If both a
    /// dotted key and a nested object give a value, the value of the nested object is used.
    ///
    /// # Errors
    /// When a key is nested too deeply.
    pub fn from_map(map: Map<String, Value>) -> Result<Self> {
        Self::from_map_below(map, 0)
    }

    /// Like [`Self::from_map`], for an object at a depth of `depth` keys. Every part of a dotted key adds to the depth.
    fn from_map_below(map: Map<String, Value>, depth: usize) -> Result<Self> {
        let mut options = Self::new();
        for (key, value) in map {
            let depth = depth.saturating_add(key.split('.').count());
            if depth > MAX_DEPTH {
                return Err(nested_too_deeply(&key));
            }
            match value {
                Value::Object(inner) => {
                    let inner = Self::from_map_below(inner, depth)?;
                    options.set(&key, Value::Object(inner.0))?;
                }
                Value::Array(list) if !list.is_empty() => {
                    let indexed = list.into_iter().enumerate();
                    let inner = indexed.map(|(index, value)| (index.to_string(), value)).collect();
                    let inner = Self::from_map_below(inner, depth)?;
                    options.set(&key, Value::Object(inner.0))?;
                }
                _ if key.contains('.') && options.has(&key) => {}
                other => options.set(&key, other)?,
            }
        }
        Ok(options)
    }

    /// Whether a dotted key has a value.
    fn has(&self, key: &str) -> bool {
        let mut parts = parts_of(key);
        let last = parts.next_back().unwrap_or_default();
        let parent = parts.try_fold(&self.0, |map, part| map.get(part)?.as_object());
        parent.is_some_and(|map| map.contains_key(last))
    }

    /// Parses an option list with dotted keys. [`split_list`] describes the syntax and `implied`.
    ///
    /// # Errors
    /// When a key is nested too deeply.
    pub fn from_dotted(text: &str, implied: Option<&str>) -> Result<Self> {
        let mut options = Self::new();
        for item in split_list(text, implied) {
            options.set(&item.key, item.value)?;
        }
        Ok(options)
    }

    /// Sets a value by its dotted key, and creates the missing objects of the path. If a key has both a plain value and
    /// nested values, the plain value is stored under the empty key among the nested ones. The code that takes the key
    /// out decides whether this is an error.
    ///
    /// # Errors
    /// When the key is nested too deeply.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        let parts: Vec<&str> = parts_of(key).collect();
        if parts.len() > MAX_DEPTH {
            return Err(nested_too_deeply(key));
        }
        let mut map = &mut self.0;
        let mut parts = parts.into_iter().peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                set_in(map, part, value.into());
                break;
            }
            let entry = map.entry(part).or_insert_with(|| Value::Object(Map::new()));
            if !entry.is_object() {
                let plain = std::mem::take(entry);
                *entry = Value::Object(Map::from_iter([(String::new(), plain)]));
            }
            let Value::Object(inner) = entry else { break };
            map = inner;
        }
        Ok(())
    }

    /// Sets a value by its plain key.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Sets a value unless the key already has a value.
    pub fn insert_default(&mut self, key: &str, value: impl Into<Value>) {
        if !self.0.contains_key(key) {
            self.insert(key, value);
        }
    }

    /// Sets all values of `other`. Objects are merged key by key, at every depth.
    pub fn overlay(&mut self, other: &Options) {
        for (key, value) in &other.0 {
            match (self.0.get_mut(key), value) {
                (Some(Value::Object(own)), Value::Object(theirs)) => merge(own, theirs),
                _ => self.insert(key, value.clone()),
            }
        }
    }

    /// The dotted key of the first remaining value, at any depth.
    pub fn first_key(&self) -> Option<String> {
        let shown = |part: &str| if part == EMPTY_PART { String::new() } else { part.to_owned() };
        let (part, mut value) = self.0.iter().next()?;
        let mut path = shown(part);
        while let Some((part, inner)) = value.as_object().and_then(|map| map.iter().next()) {
            // The plain value of a key that also has nested values has no part of its own.
            if !part.is_empty() {
                path.push('.');
                path.push_str(&shown(part));
            }
            value = inner;
        }
        Some(path)
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

    /// Removes a value and returns it.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key)
    }

    /// Removes a value and returns it as text. A boolean becomes `on` or `off`. A JSON `null` counts as missing.
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

    /// Removes a boolean and returns it.
    ///
    /// # Errors
    /// When the value is not a boolean.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(value) => match value.as_str().and_then(parse_bool) {
                Some(on) => Ok(Some(on)),
                None => Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
            },
        }
    }

    /// Removes a size and returns it in bytes. Text may have a suffix (`64k`, `1.5G`).
    ///
    /// # Errors
    /// When the value is not a size.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        let text = match self.take(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
        };
        parse_size(&text).map(Some).map_err(|error| size_fault(error, key, &text))
    }

    /// Removes a number without a unit and returns it.
    ///
    /// # Errors
    /// When the value is not a number.
    pub fn take_number(&mut self, key: &str) -> Result<Option<u64>> {
        let text = match self.take(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
        };
        parse_number(&text).map(Some).map_err(|error| number_fault(error, key, &text))
    }

    /// Removes a signed integer and returns it. Text may have a suffix unless the number is negative. Error messages
    /// contain the name `shown`.
    ///
    /// # Errors
    /// When the value is not a number, or does not fit into a signed 64-bit integer.
    pub fn take_signed(&mut self, key: &str, shown: &str) -> Result<Option<i64>> {
        let too_large = || Error::invalid(format!("Parameter '{shown}' expects integer"));
        if let Some(text) = self.get_str(key).filter(|text| text.starts_with('-')) {
            let number = text.parse().map_err(|_| too_large())?;
            self.take(key);
            return Ok(Some(number));
        }
        let number = self.take_size(key)?.map(i64::try_from).transpose();
        number.map_err(|_| too_large())
    }

    /// Removes a nested object and returns it; `None` if the key is absent or not an object.
    pub fn take_options(&mut self, key: &str) -> Option<Options> {
        match self.0.get(key) {
            Some(Value::Object(_)) => match self.take(key) {
                Some(Value::Object(map)) => Some(Self(map)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Removes all keys that are fields of `T` and fills a `T` with their values. Other keys stay.
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

    /// The remaining keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The remaining keys and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether the tree contains no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The tree as a JSON object.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }
}

fn nested_too_deeply(key: &str) -> Error {
    Error::invalid(format!("Parameter '{key}' is nested too deeply"))
}

/// The form in which an empty part of a dotted key is stored (`cache.`, `a..b`). The empty key has another meaning; see
/// [`Options::set`]. A key of an option list never contains this character.
const EMPTY_PART: &str = "=";

/// The parts of a dotted key, as they are stored. The empty key remains as it is.
fn parts_of(key: &str) -> impl DoubleEndedIterator<Item = &str> {
    let is_empty = |part: &str| part.is_empty() && !key.is_empty();
    key.split('.').map(move |part| if is_empty(part) { EMPTY_PART } else { part })
}

/// Sets the value of a key in one object. A plain value is added to existing nested values under the empty key.
fn set_in(map: &mut Map<String, Value>, key: &str, value: Value) {
    match (map.get_mut(key), value) {
        (Some(Value::Object(inner)), plain) if !plain.is_object() => {
            inner.insert(String::new(), plain);
        }
        (Some(Value::Object(inner)), Value::Object(more)) => merge(inner, &more),
        (Some(plain), Value::Object(mut inner)) => {
            inner.insert(String::new(), std::mem::take(plain));
            *plain = Value::Object(inner);
        }
        (_, value) => {
            map.insert(key.to_owned(), value);
        }
    }
}

fn merge(own: &mut Map<String, Value>, theirs: &Map<String, Value>) {
    for (key, value) in theirs {
        match (own.get_mut(key), value) {
            (Some(Value::Object(own)), Value::Object(theirs)) => merge(own, theirs),
            _ => {
                own.insert(key.clone(), value.clone());
            }
        }
    }
}

/// The error for a text that is not a size.
pub fn size_fault(error: SizeError, key: &str, text: &str) -> Error {
    match error {
        SizeError::OutOfRange => {
            Error::invalid(format!("Value '{text}' is out of range for parameter '{key}'"))
        }
        SizeError::Malformed => {
            Error::invalid(format!("Parameter '{key}' expects a non-negative number below 2^64"))
                .with_hint(SIZE_HINT)
        }
    }
}

/// The error for a text that is not a number.
pub fn number_fault(error: SizeError, key: &str, text: &str) -> Error {
    match error {
        SizeError::OutOfRange => {
            Error::invalid(format!("Value '{text}' is too large for parameter '{key}'"))
        }
        SizeError::Malformed => Error::invalid(format!("Parameter '{key}' expects a number")),
    }
}

const SIZE_HINT: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.";

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
    fn dots_and_objects_count_towards_one_limit_of_the_depth() {
        let dots = |count: usize| vec!["a"; count].join(".");
        let nested = |outer, inner| {
            let (outer, inner) = (dots(outer), dots(inner));
            Options::from_json(&format!(r#"{{"{outer}":{{"{inner}":[1]}}}}"#))
        };
        nested(100, MAX_DEPTH - 101).unwrap();
        let error = nested(100, MAX_DEPTH - 100).unwrap_err().to_string();
        assert!(error.ends_with("is nested too deeply"), "{error}");
    }

    #[test]
    fn a_key_used_both_plain_and_nested_keeps_both_values_in_either_order() {
        for text in ["file=x,file.filename=y", "file.filename=y,file=x"] {
            let mut options = Options::from_dotted(text, None).unwrap();
            let file = options.take_options("file").unwrap();
            assert_eq!((file.get_str(""), file.get_str("filename")), (Some("x"), Some("y")));
        }
    }

    #[test]
    fn nested_values_win_over_dotted_ones_and_list_elements_have_their_indices() {
        let nested = r#"{"file":{"filename":"a"},"file.filename":"b","list":["x",{"y":1}]}"#;
        let dotted = r#"{"file.filename":"b","file":{"filename":"a"},"list.0":"x","list.1.y":1}"#;
        let options = Options::from_json(nested).unwrap();
        assert_eq!(options, Options::from_json(dotted).unwrap());
        assert!(options.has("file.filename") && options.has("list.1.y") && !options.has("file.x"));
    }

    #[test]
    fn overlaying_keeps_values_that_the_other_tree_does_not_set() {
        let mut options = Options::from_dotted("a.b.c=1,a.b.d=2", None).unwrap();
        options.overlay(&Options::from_dotted("a.b.d=3,a.e=4", None).unwrap());
        assert_eq!(options, Options::from_dotted("a.b.c=1,a.b.d=3,a.e=4", None).unwrap());
    }

    #[test]
    fn the_first_remaining_key_includes_all_its_parts() {
        let first = |text: &str| Options::from_dotted(text, None).unwrap().first_key();
        assert_eq!(first("a.b.c=1,d=2").as_deref(), Some("a.b.c"));
        assert_eq!(first("a=1,a.b=2").as_deref(), Some("a"));
        for odd in ["cache.", ".", ".a", "a..b", "a..", "a.b."] {
            let options = Options::from_dotted(&format!("{odd}=1"), None).unwrap();
            assert_eq!(options.first_key().as_deref(), Some(odd));
            assert_eq!(Options::from_json(&options.to_json().to_string()).unwrap(), options);
        }
        let both = Options::from_dotted("a=1,a.b=2", None).unwrap();
        assert_eq!(Options::from_json(&both.to_json().to_string()).unwrap(), both);
        let mut file = Options::from_dotted("file.=1", None).unwrap();
        assert_eq!(file.take_options("file").unwrap().first_key().as_deref(), Some(""));
        assert_eq!(first(""), None);
    }

    #[test]
    fn signed_integers_keep_their_sign_and_their_limits() {
        let taken = |text: &str| {
            let mut options = Options::from_dotted(&format!("a={text}"), None).unwrap();
            options.take_signed("a", "the-a").map_err(|error| error.to_string())
        };
        assert_eq!(taken("-1"), Ok(Some(-1)));
        assert_eq!(taken("2k"), Ok(Some(2048)));
        assert_eq!(taken("-9223372036854775808"), Ok(Some(i64::MIN)));
        for beyond in ["9223372036854775808", "18446744073709551615", "-9223372036854775809"] {
            assert_eq!(taken(beyond), Err("Parameter 'the-a' expects integer".to_owned()));
        }
        assert_eq!(Options::new().take_signed("a", "a").unwrap(), None);
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
