//! `google.protobuf.Struct`: any JSON object, such as the settings of an agent's MCP servers.
//!
//! Each value of it costs many times its text, and it may nest, so both are bounded here.

use std::{cell::Cell, fmt};

use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Values that one object may have, all together.
const MAX_VALUES: usize = 4096;

/// Objects and lists within each other. Each is three messages deep, and decoders of protobuf stop at a hundred.
const MAX_DEPTH: usize = 24;

/// Whether a message is one.
pub(super) fn is_struct(descriptor: &MessageDescriptor) -> bool {
    descriptor.full_name() == "google.protobuf.Struct"
}

/// Reads the members of an object.
pub(super) fn from_map<'de, A: MapAccess<'de>>(
    descriptor: &MessageDescriptor,
    map: A,
) -> Result<DynamicMessage, A::Error> {
    let left = Cell::new(MAX_VALUES);
    let read = members(Seed { left: &left, depth: MAX_DEPTH }, map)?;
    DynamicMessage::decode(descriptor.clone(), read.encode_to_vec().as_slice()).map_err(A::Error::custom)
}

fn members<'de, A: MapAccess<'de>>(seed: Seed<'_>, mut map: A) -> Result<Struct, A::Error> {
    let mut read = Struct::default();
    while let Some(key) = map.next_key::<String>()? {
        let value = map.next_value_seed(seed)?;
        read.fields.insert(key, value);
    }
    Ok(read)
}

/// Reads one value.
#[derive(Clone, Copy)]
struct Seed<'a> {
    /// Values that may still come.
    left: &'a Cell<usize>,
    /// Levels that may still come.
    depth: usize,
}

impl Seed<'_> {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1);
        depth.map(|depth| Self { depth, ..self }).ok_or_else(|| E::custom("an object is nested too deeply"))
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or_else(|| D::Error::custom(format!("more than {MAX_VALUES} values")))?);
        deserializer.deserialize_any(self)
    }
}

fn value<E>(kind: Kind) -> Result<Value, E> {
    Ok(Value { kind: Some(kind) })
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        value(Kind::NullValue(0))
    }

    fn visit_bool<E: Error>(self, given: bool) -> Result<Value, E> {
        value(Kind::BoolValue(given))
    }

    #[allow(clippy::cast_precision_loss, reason = "a JSON number is a double to begin with")]
    fn visit_i64<E: Error>(self, given: i64) -> Result<Value, E> {
        value(Kind::NumberValue(given as f64))
    }

    #[allow(clippy::cast_precision_loss, reason = "as above")]
    fn visit_u64<E: Error>(self, given: u64) -> Result<Value, E> {
        value(Kind::NumberValue(given as f64))
    }

    fn visit_f64<E: Error>(self, given: f64) -> Result<Value, E> {
        value(Kind::NumberValue(given))
    }

    fn visit_str<E: Error>(self, given: &str) -> Result<Value, E> {
        value(Kind::StringValue(given.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let seed = self.deeper()?;
        let mut list = ListValue::default();
        while let Some(element) = seq.next_element_seed(seed)? {
            list.values.push(element);
        }
        value(Kind::ListValue(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        value(Kind::StructValue(members(self.deeper()?, map)?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Json;
    use super::*;
    use crate::surface::Surface;

    fn read(text: &str) -> Result<DynamicMessage, serde_json::Error> {
        let surface = Surface::load().unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.StartAgentRequest").unwrap();
        let mut message = DynamicMessage::new(descriptor);
        Json::new(&surface).unwrap().decode(text.as_bytes(), &mut message)?;
        Ok(message)
    }

    #[test]
    fn an_object_goes_there_and_back() {
        let servers = json!({
            "files": {"command": "npx", "args": ["-y", "@x/y", null], "env": {}, "timeout": 1.5, "on": true},
            "": [],
        });
        let message = read(&json!({"mcpServers": servers, "prompt": "hi"}).to_string()).unwrap();
        let encoded = message.encode_to_vec();
        let typed = oc_proto::v1::StartAgentRequest::decode(encoded.as_slice()).unwrap();
        let typed = typed.mcp_servers.unwrap();
        assert!(matches!(typed.fields["files"].kind, Some(Kind::StructValue(_))));
        let surface = Surface::load().unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.StartAgentRequest").unwrap();
        let shown = Json::new(&surface).unwrap().encode(descriptor, encoded.into()).unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
        assert_eq!(shown["mcpServers"], servers);
        assert_eq!(shown.get("model"), None, "what is absent is left out");
    }

    #[test]
    fn only_an_object_is_one_and_it_is_bounded() {
        assert!(read(r#"{"mcpServers": null}"#).unwrap().get_field_by_name("mcp_servers").is_some());
        for wrong in ["[]", "\"x\"", "1", "true"] {
            let error = read(&format!(r#"{{"mcpServers": {wrong}}}"#)).unwrap_err().to_string();
            assert!(error.contains("`mcpServers` must be an object"), "{error}");
        }
        let long = json!({"mcpServers": {"a": vec![0; MAX_VALUES]}}).to_string();
        assert!(read(&long).unwrap_err().to_string().contains("more than"));
        let nested = |depth: usize| {
            format!(r#"{{"mcpServers": {{"a": {}{}}}}}"#, "[".repeat(depth), "]".repeat(depth))
        };
        assert!(read(&nested(MAX_DEPTH)).is_ok());
        assert!(read(&nested(MAX_DEPTH + 1)).unwrap_err().to_string().contains("nested too deeply"));
        assert!(read(&nested(10_000)).is_err());
    }
}
