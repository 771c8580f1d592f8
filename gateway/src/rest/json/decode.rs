//! JSON to messages, straight from the text: nothing is built for members that no field takes, so a hostile
//! body costs no more memory than the message it fills.

use std::{collections::HashMap, fmt};

use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _, Value,
};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{BASE64_SUFFIX, Json, value::ValueSeed};

/// Elements that one list or map of a request may have. Each costs far more memory than its text.
const MAX_ELEMENTS: usize = 65_536;

impl Json {
    /// Fills `message` from a JSON object. An empty text is an empty object: clients announce JSON and send nothing.
    ///
    /// # Errors
    /// What is wrong, with the name of the field and the place in the text. Nesting is bounded by `serde_json`.
    pub fn decode(&self, text: &[u8], message: &mut DynamicMessage) -> Result<(), serde_json::Error> {
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        MessageSeed { json: self, message }.deserialize(&mut deserializer)?;
        deserializer.end()
    }

    /// Fills one field of `message` from a JSON value.
    ///
    /// # Errors
    /// As for [`Json::decode`].
    pub fn decode_field(
        &self,
        text: &[u8],
        message: &mut DynamicMessage,
        field: &FieldDescriptor,
    ) -> Result<(), serde_json::Error> {
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let seed = FieldSeed { json: self, field, base64: false };
        if let Some(value) = seed.deserialize(&mut deserializer)? {
            message.set_field(field, value);
        }
        deserializer.end()
    }
}

/// Fills a message from an object.
pub(super) struct MessageSeed<'a> {
    pub(super) json: &'a Json,
    pub(super) message: &'a mut DynamicMessage,
}

impl<'de> DeserializeSeed<'de> for MessageSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MessageSeed<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let descriptor = self.message.descriptor();
        // Of a text and its exact bytes the bytes win, in whichever order they come.
        let mut exact = Vec::new();
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let Some((field, base64)) = find_field(self.json, &descriptor, &key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            match map.next_value_seed(FieldSeed { json: self.json, field: &field, base64 })? {
                _ if !base64 && exact.contains(&field.number()) => {}
                Some(value) => {
                    self.message.set_field(&field, value);
                    if base64 {
                        exact.push(field.number());
                    }
                }
                None => self.message.clear_field(&field),
            }
        }
        Ok(())
    }
}

/// The field that a key names, and whether the key asks for base64.
fn find_field(json: &Json, message: &MessageDescriptor, key: &str) -> Option<(FieldDescriptor, bool)> {
    let named = |field: &FieldDescriptor, key: &str| {
        field.json_name().eq_ignore_ascii_case(key) || field.name().eq_ignore_ascii_case(key)
    };
    if let Some(field) = message.fields().find(|field| named(field, key)) {
        return Some((field, false));
    }
    let split = key.len().checked_sub(BASE64_SUFFIX.len())?;
    let (name, suffix) = (key.get(..split)?, key.get(split..)?);
    if !suffix.eq_ignore_ascii_case(BASE64_SUFFIX) {
        return None;
    }
    message.fields().find(|field| json.is_text(field) && named(field, name)).map(|field| (field, true))
}

/// Reads the value of a field; `None` where it is `null`.
struct FieldSeed<'a> {
    json: &'a Json,
    field: &'a FieldDescriptor,
    base64: bool,
}

impl<'de> DeserializeSeed<'de> for FieldSeed<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Value>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for FieldSeed<'_> {
    type Value = Option<Value>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a value for `{}`", self.field.json_name())
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let Self { json, field, base64 } = self;
        let kind = field.kind();
        let value = if field.is_map() {
            deserializer.deserialize_any(MapVisitor { json, field })?
        } else if field.is_list() {
            deserializer.deserialize_any(ListVisitor { json, field, kind: &kind })?
        } else {
            ValueSeed { json, field, kind: &kind, base64 }.deserialize(deserializer)?
        };
        Ok(Some(value))
    }
}

struct ListVisitor<'a> {
    json: &'a Json,
    field: &'a FieldDescriptor,
    kind: &'a Kind,
}

impl<'de> Visitor<'de> for ListVisitor<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a list for `{}`", self.field.json_name())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let Self { json, field, kind } = self;
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(ValueSeed { json, field, kind, base64: false })? {
            if values.len() == MAX_ELEMENTS {
                return Err(A::Error::custom(too_many(field)));
            }
            values.push(value);
        }
        Ok(Value::List(values))
    }
}

struct MapVisitor<'a> {
    json: &'a Json,
    field: &'a FieldDescriptor,
}

impl<'de> Visitor<'de> for MapVisitor<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "an object for `{}`", self.field.json_name())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let Self { json, field } = self;
        let Kind::Message(entry) = field.kind() else { return Err(A::Error::custom("no map")) };
        let (key_kind, kind) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
        let mut values = HashMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let key = map_key(&key_kind, key).ok_or_else(|| {
                A::Error::custom(format!("a key of `{}` has the wrong type", field.json_name()))
            })?;
            if values.len() == MAX_ELEMENTS && !values.contains_key(&key) {
                return Err(A::Error::custom(too_many(field)));
            }
            let value = map.next_value_seed(ValueSeed { json, field, kind: &kind, base64: false })?;
            values.insert(key, value);
        }
        Ok(Value::Map(values))
    }
}

fn too_many(field: &FieldDescriptor) -> String {
    format!("`{}` has more than {MAX_ELEMENTS} elements", field.json_name())
}

fn map_key(kind: &Kind, key: String) -> Option<MapKey> {
    Some(match kind {
        Kind::String => MapKey::String(key),
        Kind::Bool => MapKey::Bool(key.parse().ok()?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => MapKey::I32(key.parse().ok()?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => MapKey::I64(key.parse().ok()?),
        Kind::Uint32 | Kind::Fixed32 => MapKey::U32(key.parse().ok()?),
        Kind::Uint64 | Kind::Fixed64 => MapKey::U64(key.parse().ok()?),
        _ => return None,
    })
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
