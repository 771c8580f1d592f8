//! Messages to JSON.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Buf as _, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};
use prost_reflect::{
    DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _,
    Value,
};
use serde::ser::{Error as _, Serialize, SerializeMap, Serializer};

use super::{BASE64_SUFFIX, Json, enum_prefix, structs::is_struct};

impl Json {
    /// A whole message as a JSON object.
    ///
    /// # Errors
    /// It is not such a message, or holds a value that JSON has no form for, such as a timestamp after the year 9999.
    pub fn encode(&self, descriptor: MessageDescriptor, message: Bytes) -> Result<Bytes, EncodeError> {
        let message = DynamicMessage::decode(descriptor, message)?;
        Ok(serde_json::to_vec(&MessageJson { json: self, message: &message })?.into())
    }

    /// One field of a message as a JSON value, as its default where it is absent.
    ///
    /// A list of messages is decoded and shown element by element: it may be long, and a decoded message takes many
    /// times its length.
    ///
    /// # Errors
    /// As for [`Json::encode`].
    pub fn encode_field(
        &self,
        descriptor: MessageDescriptor,
        message: Bytes,
        field: &FieldDescriptor,
    ) -> Result<Bytes, EncodeError> {
        if let (true, Kind::Message(element)) = (field.is_list(), field.kind()) {
            return self.encode_list(message, field.number(), &element);
        }
        let message = DynamicMessage::decode(descriptor, message)?;
        let value = message.get_field(field);
        Ok(serde_json::to_vec(&FieldJson { json: self, field, value: &value })?.into())
    }

    fn encode_list(
        &self,
        mut message: Bytes,
        number: u32,
        element: &MessageDescriptor,
    ) -> Result<Bytes, EncodeError> {
        let mut text = vec![b'['];
        while message.has_remaining() {
            let (tag, wire_type) = decode_key(&mut message)?;
            if (tag, wire_type) != (number, WireType::LengthDelimited) {
                skip_field(wire_type, tag, &mut message, DecodeContext::default())?;
                continue;
            }
            let encoded = length_delimited(&mut message)?;
            let message = DynamicMessage::decode(element.clone(), encoded)?;
            if text.len() > 1 {
                text.push(b',');
            }
            serde_json::to_writer(&mut text, &MessageJson { json: self, message: &message })?;
        }
        text.push(b']');
        Ok(text.into())
    }
}

/// Why a message has no JSON form.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Its bytes are not such a message.
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
    /// A value has no form.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

fn length_delimited(message: &mut Bytes) -> Result<Bytes, prost::DecodeError> {
    let mut bytes = Bytes::new();
    // Without copying: `Bytes` out of `Bytes`.
    prost::encoding::bytes::merge(WireType::LengthDelimited, &mut bytes, message, DecodeContext::default())?;
    Ok(bytes)
}

struct MessageJson<'a> {
    json: &'a Json,
    message: &'a DynamicMessage,
}

impl Serialize for MessageJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let descriptor = self.message.descriptor();
        match descriptor.full_name() {
            "google.protobuf.Timestamp" => return serializer.serialize_str(&timestamp(self.message)?),
            "google.protobuf.Duration" => return serializer.serialize_str(&duration(self.message)?),
            _ if is_struct(&descriptor) => return self.message.serialize(serializer),
            _ => {}
        }
        let mut map = serializer.serialize_map(None)?;
        for field in descriptor.fields() {
            // A field that knows whether it is set is left out when it is not; the others show their default.
            if field.supports_presence() && !self.message.has_field(&field) {
                continue;
            }
            let value = self.message.get_field(&field);
            map.serialize_entry(
                field.json_name(),
                &FieldJson { json: self.json, field: &field, value: &value },
            )?;
            if let Value::Bytes(bytes) = &*value
                && self.json.is_text(&field)
                && std::str::from_utf8(bytes).is_err()
            {
                let name = format!("{}{BASE64_SUFFIX}", field.json_name());
                map.serialize_entry(&name, &STANDARD.encode(bytes))?;
            }
        }
        map.end()
    }
}

/// The value of a field: a list, a map or one value.
struct FieldJson<'a> {
    json: &'a Json,
    field: &'a FieldDescriptor,
    value: &'a Value,
}

impl Serialize for FieldJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.json.is_text(self.field);
        match self.value {
            Value::List(values) => {
                let kind = self.field.kind();
                serializer.collect_seq(values.iter().map(|value| ValueJson {
                    json: self.json,
                    kind: &kind,
                    text,
                    value,
                }))
            }
            Value::Map(entries) => {
                let kind = match self.field.kind() {
                    Kind::Message(entry) => entry.map_entry_value_field().kind(),
                    kind => kind,
                };
                // In order of their keys: the same message is always the same text.
                let mut sorted: Vec<_> = entries.iter().map(|(key, value)| (map_key(key), value)).collect();
                sorted.sort_by(|(a, _), (b, _)| a.cmp(b));
                serializer.collect_map(
                    sorted
                        .into_iter()
                        .map(|(key, value)| (key, ValueJson { json: self.json, kind: &kind, text, value })),
                )
            }
            value => {
                ValueJson { json: self.json, kind: &self.field.kind(), text, value }.serialize(serializer)
            }
        }
    }
}

/// One value.
struct ValueJson<'a> {
    json: &'a Json,
    kind: &'a Kind,
    text: bool,
    value: &'a Value,
}

impl Serialize for ValueJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value {
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::I32(value) => serializer.serialize_i32(*value),
            Value::I64(value) => serializer.serialize_i64(*value),
            Value::U32(value) => serializer.serialize_u32(*value),
            Value::U64(value) => serializer.serialize_u64(*value),
            Value::F32(value) => float(f64::from(*value), serializer),
            Value::F64(value) => float(*value, serializer),
            Value::String(value) => serializer.serialize_str(value),
            Value::Bytes(bytes) if self.text => serializer.serialize_str(&String::from_utf8_lossy(bytes)),
            Value::Bytes(bytes) => serializer.serialize_str(&STANDARD.encode(bytes)),
            Value::EnumNumber(number) => match self.kind {
                Kind::Enum(descriptor) => enum_value(descriptor, *number, serializer),
                _ => serializer.serialize_i32(*number),
            },
            Value::Message(message) => MessageJson { json: self.json, message }.serialize(serializer),
            Value::List(_) | Value::Map(_) => Err(S::Error::custom("a list within a list")),
        }
    }
}

fn map_key(key: &MapKey) -> Cow<'_, str> {
    match key {
        MapKey::Bool(key) => Cow::Owned(key.to_string()),
        MapKey::I32(key) => Cow::Owned(key.to_string()),
        MapKey::I64(key) => Cow::Owned(key.to_string()),
        MapKey::U32(key) => Cow::Owned(key.to_string()),
        MapKey::U64(key) => Cow::Owned(key.to_string()),
        MapKey::String(key) => Cow::Borrowed(key),
    }
}

/// JSON has no number for these three; protobuf's mapping names them.
fn float<S: Serializer>(value: f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_nan() {
        serializer.serialize_str("NaN")
    } else if value.is_infinite() {
        serializer.serialize_str(if value > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        serializer.serialize_f64(value)
    }
}

/// A value that this build does not know is shown by its number: a newer part of the mesh sent it.
fn enum_value<S: Serializer>(
    descriptor: &EnumDescriptor,
    number: i32,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let Some(value) = descriptor.get_value(number) else { return serializer.serialize_i32(number) };
    let prefix = enum_prefix(descriptor);
    let name = value.name().strip_prefix(&prefix).unwrap_or_else(|| value.name());
    serializer.serialize_str(&name.to_ascii_lowercase())
}

/// RFC 3339 in UTC. Years beyond four digits have no such form.
fn timestamp<E: serde::ser::Error>(message: &DynamicMessage) -> Result<String, E> {
    const YEAR_0001: i64 = -62_135_596_800;
    const YEAR_9999: i64 = 253_402_300_799;
    let timestamp: prost_types::Timestamp = message.transcode_to().map_err(E::custom)?;
    let in_range =
        (YEAR_0001..=YEAR_9999).contains(&timestamp.seconds) && (0..1_000_000_000).contains(&timestamp.nanos);
    if !in_range {
        return Err(E::custom("a timestamp outside of the years 1 to 9999"));
    }
    Ok(timestamp.to_string())
}

fn duration<E: serde::ser::Error>(message: &DynamicMessage) -> Result<String, E> {
    let duration: prost_types::Duration = message.transcode_to().map_err(E::custom)?;
    Ok(duration.to_string())
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use serde_json::json;

    use super::*;
    use crate::surface::Surface;

    fn show<M: prost::Message>(name: &str, message: &M) -> serde_json::Value {
        let surface = Surface::load().unwrap();
        let descriptor = surface.pool().get_message_by_name(name).unwrap();
        let text = Json::new(&surface).unwrap().encode(descriptor, message.encode_to_vec().into()).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    #[test]
    fn names_and_values_are_those_that_published_clients_read() {
        let sandbox = oc_proto::v1::Sandbox {
            sandbox_id: "sb-1".into(),
            state: oc_proto::v1::SandboxState::Running.into(),
            memory_mb: 1024,
            metadata: [("b".into(), "2".into()), ("a".into(), "1".into())].into(),
            started_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            ..Default::default()
        };
        let shown = show("oc.v1.Sandbox", &sandbox);
        assert_eq!(shown["sandboxID"], "sb-1");
        assert_eq!(shown["status"], "running");
        assert_eq!(shown["memoryMB"], 1024);
        assert_eq!(shown["cpuCount"], 0, "defaults are shown");
        assert_eq!(shown["connectURL"], "");
        assert_eq!(shown["metadata"], json!({"a": "1", "b": "2"}));
        assert_eq!(shown["startedAt"], "2023-11-14T22:13:20Z");
        assert_eq!(shown.get("endAt"), None, "an absent time is left out");
    }

    #[test]
    fn output_is_text_and_its_exact_bytes_where_it_is_not() {
        let run = oc_proto::v1::RunResponse {
            exit_code: -1,
            stdout: Bytes::from_static(b"caf\xc3\xa9\0\n"),
            stderr: Bytes::from_static(b"\xff!"),
            stdout_bytes: u64::MAX,
            ..Default::default()
        };
        let shown = show("oc.v1.RunResponse", &run);
        assert_eq!(shown["exitCode"], -1);
        assert_eq!(shown["stdout"], "café\0\n");
        assert_eq!(shown.get("stdoutBase64"), None);
        assert_eq!(shown["stderr"], "\u{fffd}!");
        assert_eq!(shown["stderrBase64"], "/yE=");
        assert_eq!(shown["stdoutBytes"], u64::MAX);
    }

    #[test]
    fn unknown_enum_values_and_impossible_times_do_not_break_the_answer_silently() {
        let sandbox = oc_proto::v1::Sandbox { state: 77, ..Default::default() };
        assert_eq!(show("oc.v1.Sandbox", &sandbox)["status"], 77);

        let surface = Surface::load().unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.Sandbox").unwrap();
        let sandbox = oc_proto::v1::Sandbox {
            started_at: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
            ..Default::default()
        };
        assert!(Json::new(&surface).unwrap().encode(descriptor, sandbox.encode_to_vec().into()).is_err());
    }

    #[test]
    fn a_field_that_is_the_whole_answer_has_its_default_when_empty() {
        let surface = Surface::load().unwrap();
        let json = Json::new(&surface).unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.ListSandboxesResponse").unwrap();
        let field = descriptor.get_field_by_name("sandboxes").unwrap();
        assert_eq!(json.encode_field(descriptor.clone(), Bytes::new(), &field).unwrap(), "[]");
        let two = oc_proto::v1::ListSandboxesResponse {
            sandboxes: ["a", "b"]
                .map(|id| oc_proto::v1::Sandbox { sandbox_id: id.into(), ..Default::default() })
                .into(),
            next_page_token: "x".into(),
        };
        let shown = json.encode_field(descriptor, two.encode_to_vec().into(), &field).unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
        assert_eq!((shown[0]["sandboxID"].as_str(), shown[1]["sandboxID"].as_str()), (Some("a"), Some("b")));

        let descriptor = surface.pool().get_message_by_name("oc.v1.GetSandboxResponse").unwrap();
        let field = descriptor.get_field_by_name("sandbox").unwrap();
        let shown = json.encode_field(descriptor, Bytes::new(), &field).unwrap();
        assert!(shown.starts_with(b"{\"sandboxID\":\"\""), "{shown:?}");
    }
}
