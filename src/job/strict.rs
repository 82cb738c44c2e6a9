//! Free-form JSON from a publisher, read strictly: no key twice, and no more of it kept than may be echoed.
//!
//! `serde_json::Value` alone would keep the last of two equal keys, and grow to many times the body.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

/// Bytes of metadata as compact JSON.
pub(super) const METADATA_MAX: usize = 4 << 10;

/// The job's metadata, if it is small enough to be echoed.
#[derive(Debug)]
pub(super) enum Metadata {
    /// At most [`METADATA_MAX`] bytes.
    Fits(Map<String, Value>),
    /// More than that; only counted.
    TooLarge,
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Metadata, A::Error> {
                // A value takes at least two bytes, itself and what separates it from the next.
                let mut budget = METADATA_MAX;
                Ok(match (Node { budget: &mut budget }).visit_map(map)? {
                    Some(Value::Object(object)) if fits(&object) => Metadata::Fits(object),
                    _ => Metadata::TooLarge,
                })
            }
        }
        deserializer.deserialize_any(MetadataVisitor)
    }
}

fn fits(object: &Map<String, Value>) -> bool {
    serde_json::to_string(object).is_ok_and(|json| json.len() <= METADATA_MAX)
}

/// Reads any value while `budget` lasts; each value takes one from it. `None` where it did not last.
pub(super) struct Node<'a> {
    budget: &'a mut usize,
}

impl<'a> Node<'a> {
    pub(super) fn new(budget: &'a mut usize) -> Self {
        Self { budget }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Option<Value>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.budget.checked_sub(1) {
            Some(left) => {
                *self.budget = left;
                deserializer.deserialize_any(self)
            }
            None => {
                deserializer.deserialize_ignored_any(IgnoredAny)?;
                Ok(None)
            }
        }
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Some(Value::Null))
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(Value::Bool(value)))
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value.into()))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value.into()))
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(Value::String(text.to_owned())))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Some(Vec::new());
        while let Some(item) = seq.next_element_seed(Node { budget: &mut *self.budget })? {
            match (item, &mut items) {
                (Some(item), Some(items)) => items.push(item),
                _ => items = None,
            }
        }
        Ok(items.map(Value::Array))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut object = Some(Map::new());
        while let Some(key) = map.next_key::<String>()? {
            if object.as_ref().is_some_and(|object| object.contains_key(&key)) {
                return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
            }
            let item = map.next_value_seed(Node { budget: &mut *self.budget })?;
            match (item, &mut object) {
                (Some(item), Some(object)) => drop(object.insert(key, item)),
                _ => object = None,
            }
        }
        Ok(object.map(Value::Object))
    }
}
