//! Reads option values as leniently as QEMU does. Text is accepted as a boolean (`on`), a number (`4096`) or a size if
//! the field has such a type. A number or a boolean is accepted as text if the field is text.

use std::borrow::Cow;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde_json::{Map, Value};

use super::size::{SizeError, parse_bool, parse_size};
use super::size_fault;
use crate::{Error, Result};

/// Fills a `T` from a map of option values.
pub(super) fn from_map<T: DeserializeOwned>(map: &Map<String, Value>) -> Result<T> {
    let read = |map: Map<String, Value>| T::deserialize(Lenient(Value::Object(map)));
    read(map.clone()).map_err(|error: DeError| {
        // Every field has a default, so each option can be parsed alone. The invalid option is the option that fails
        // alone.
        let alone =
            |(key, value): (&String, &Value)| Map::from_iter([(key.clone(), value.clone())]);
        let blamed = map.iter().find(|entry| read(alone(*entry)).is_err());
        let key = blamed.map_or("", |(key, _)| key);
        let text = error.to_string();
        let shown = blamed.and_then(|(_, value)| as_text(value));
        let size = shown.as_deref().map(|text| (text, parse_size(text)));
        match size {
            Some((wrong, Err(error))) if text == NOT_A_SIZE => size_fault(error, key, wrong),
            _ if text == NOT_A_SIZE => size_fault(SizeError::Malformed, key, ""),
            _ => Error::invalid(text.replace(KEY, key)),
        }
    })
}

/// Placeholder for the option's name in messages, until the name is known.
const KEY: &str = "\0";
const NOT_A_SIZE: &str = "Parameter '\0' expects a non-negative number below 2^64";
/// The text of a number, or the text itself.
fn as_text(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(text.into()),
        // A number without a fraction is written as an integer: `4096.0` and `4.096e3` become "4096".
        Value::Number(number) => {
            let text = number.to_string();
            let whole = number.as_f64().filter(|value| number.is_f64() && value.abs() < 1e17);
            let whole = whole.filter(|value| value.fract() == 0.0);
            Some(whole.map_or(text, |value| format!("{value:.0}")).into())
        }
        _ => None,
    }
}

struct Lenient(Value);

type DeError = serde::de::value::Error;

impl<'de> IntoDeserializer<'de, DeError> for Lenient {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

fn custom(text: String) -> DeError {
    serde::de::Error::custom(text)
}

impl Lenient {
    fn unsigned(&self) -> Result<u64, DeError> {
        let size = as_text(&self.0).and_then(|text| parse_size(&text).ok());
        size.ok_or_else(|| custom(NOT_A_SIZE.to_owned()))
    }

    fn signed(&self) -> Result<i64, DeError> {
        match &self.0 {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        }
        .ok_or_else(|| custom(format!("Parameter '{KEY}' expects a number")))
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $read:ident),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            visitor.$visit(self.$read()?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Lenient {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(on) => visitor.visit_bool(on),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(n), _) => visitor.visit_u64(n),
                (None, Some(n)) => visitor.visit_i64(n),
                (None, None) => visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Array(list) => {
                visitor.visit_seq(SeqDeserializer::new(list.into_iter().map(Lenient)))
            }
            Value::Object(map) => visitor.visit_map(MapDeserializer::new(
                map.into_iter().map(|(key, value)| (key, Lenient(value))),
            )),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0 {
            Value::Bool(on) => visitor.visit_bool(*on),
            value => match value.as_str().and_then(parse_bool) {
                Some(on) => visitor.visit_bool(on),
                None => Err(custom(format!("Parameter '{KEY}' expects 'on' or 'off'"))),
            },
        }
    }

    numbers! {
        deserialize_u8 visit_u64 unsigned,
        deserialize_u16 visit_u64 unsigned,
        deserialize_u32 visit_u64 unsigned,
        deserialize_u64 visit_u64 unsigned,
        deserialize_i8 visit_i64 signed,
        deserialize_i16 visit_i64 signed,
        deserialize_i32 visit_i64 signed,
        deserialize_i64 visit_i64 signed,
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            Value::Number(number) => visitor.visit_string(number.to_string()),
            Value::Bool(on) => visitor.visit_str(if on { "on" } else { "off" }),
            other => Err(custom(format!(
                "Invalid parameter type for '{KEY}', expected: string, not {other}"
            ))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match self.0 {
            Value::String(text) => {
                let plain: serde::de::value::StringDeserializer<DeError> = text.into_deserializer();
                plain.deserialize_enum(name, variants, visitor)
            }
            other => {
                Err(custom(format!("Parameter '{KEY}' expects one of {variants:?}, not {other}")))
            }
        }
    }

    serde::forward_to_deserialize_any! {
        f32 f64 char bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
        i128 u128
    }
}
