//! One value of a field, from JSON or from text. Every error names the field and what it takes.

use std::fmt;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use prost_reflect::{DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor, Value};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::{
    Json,
    decode::MessageSeed,
    enum_prefix,
    structs::{self, is_struct},
};

const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Reads one scalar from text, as it stands in a path or a query.
///
/// # Errors
/// What the field expects.
pub fn from_text(json: &Json, field: &FieldDescriptor, text: &str) -> Result<Value, String> {
    let kind = field.kind();
    match &kind {
        Kind::Message(_) => Err("cannot be given here".to_owned()),
        Kind::Bool => match text {
            "true" | "1" => Ok(Value::Bool(true)),
            "false" | "0" => Ok(Value::Bool(false)),
            _ => Err("must be true or false".to_owned()),
        },
        _ => {
            let visitor = ValueVisitor { json, field, kind: &kind, base64: false };
            visitor.visit_str::<serde::de::value::Error>(text).map_err(|error| error.to_string())
        }
    }
}

/// Reads one value: an element of a list or map, or the value of a plain field.
#[derive(Clone, Copy)]
pub(super) struct ValueSeed<'a> {
    pub(super) json: &'a Json,
    pub(super) field: &'a FieldDescriptor,
    pub(super) kind: &'a Kind,
    /// Whether a text field's exact bytes are meant.
    pub(super) base64: bool,
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let Self { json, field, kind, base64 } = self;
        deserializer.deserialize_any(ValueVisitor { json, field, kind, base64 })
    }
}

struct ValueVisitor<'a> {
    json: &'a Json,
    field: &'a FieldDescriptor,
    kind: &'a Kind,
    base64: bool,
}

impl ValueVisitor<'_> {
    fn wrong<E: Error>(&self) -> E {
        E::custom(format!("`{}` must be {}", self.field.json_name(), self.wanted()))
    }

    fn wanted(&self) -> &'static str {
        match self.kind {
            Kind::Bool => "true or false",
            Kind::String => "a string",
            Kind::Bytes if self.base64 || !self.json.is_text(self.field) => "a string of base64",
            Kind::Bytes => "a string",
            Kind::Double | Kind::Float => "a number",
            Kind::Uint32 | Kind::Fixed32 => "a whole number from 0 to 4294967295",
            Kind::Uint64 | Kind::Fixed64 => "a whole number from 0 to 18446744073709551615",
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => "a whole number from -2147483648 to 2147483647",
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => "a whole number of 64 bits",
            Kind::Enum(_) => "one of its names",
            Kind::Message(message) if message.full_name() == "google.protobuf.Timestamp" => {
                "a time as in RFC 3339"
            }
            Kind::Message(message) if message.full_name() == "google.protobuf.Duration" => {
                "seconds, such as \"1.5s\""
            }
            Kind::Message(_) => "an object",
        }
    }

    /// A whole number, in the width of the field.
    fn integer<E: Error>(&self, number: i128) -> Result<Value, E> {
        match self.kind {
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => i32::try_from(number).ok().map(Value::I32),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => i64::try_from(number).ok().map(Value::I64),
            Kind::Uint32 | Kind::Fixed32 => u32::try_from(number).ok().map(Value::U32),
            Kind::Uint64 | Kind::Fixed64 => u64::try_from(number).ok().map(Value::U64),
            Kind::Enum(_) => i32::try_from(number).ok().map(Value::EnumNumber),
            #[allow(clippy::cast_precision_loss, reason = "a JSON number is a double to begin with")]
            Kind::Double => Some(Value::F64(number as f64)),
            #[allow(clippy::cast_precision_loss, reason = "as above")]
            Kind::Float => Some(Value::F32(number as f32)),
            _ => None,
        }
        .ok_or_else(|| self.wrong())
    }
}

impl<'de> Visitor<'de> for ValueVisitor<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} for `{}`", self.wanted(), self.field.json_name())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        if matches!(self.kind, Kind::Bool) { Ok(Value::Bool(value)) } else { Err(self.wrong()) }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.integer(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.integer(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        match self.kind {
            Kind::Double => Ok(Value::F64(value)),
            #[allow(clippy::cast_possible_truncation, reason = "the field has this width")]
            Kind::Float => Ok(Value::F32(value as f32)),
            // `60.0` and `6e1` are whole numbers. All that fit in 64 bits fit in 128.
            #[allow(clippy::cast_possible_truncation, reason = "checked to be whole and small")]
            _ if value.fract() == 0.0 && value.abs() < 2f64.powi(64) => self.integer(value as i128),
            _ => Err(self.wrong()),
        }
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        match self.kind {
            Kind::String => Ok(Value::String(value.to_owned())),
            Kind::Bytes if !self.base64 && self.json.is_text(self.field) => {
                Ok(Value::Bytes(Bytes::copy_from_slice(value.as_bytes())))
            }
            Kind::Bytes => {
                let engine = if value.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
                engine.decode(value).map(|bytes| Value::Bytes(bytes.into())).map_err(|_| self.wrong())
            }
            Kind::Enum(descriptor) => {
                enum_number(descriptor, value).map(Value::EnumNumber).ok_or_else(|| self.wrong())
            }
            Kind::Double => float_text(value).map(Value::F64).ok_or_else(|| self.wrong()),
            #[allow(clippy::cast_possible_truncation, reason = "the field has this width")]
            Kind::Float => {
                float_text(value).map(|value| Value::F32(value as f32)).ok_or_else(|| self.wrong())
            }
            Kind::Bool => Err(self.wrong()),
            Kind::Message(message) => well_known(message, value).ok_or_else(|| self.wrong()),
            // Protobuf's mapping writes 64-bit integers as strings, so strings are taken for all.
            _ => value.parse().map_err(|_| self.wrong()).and_then(|number: i128| self.integer(number)),
        }
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Err(self.wrong())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(self.wrong())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        let Kind::Message(descriptor) = self.kind else { return Err(self.wrong()) };
        if is_struct(descriptor) {
            return structs::from_map(descriptor, map).map(Value::Message);
        }
        if descriptor.full_name().starts_with("google.protobuf.") {
            return Err(self.wrong());
        }
        let mut message = DynamicMessage::new(descriptor.clone());
        MessageSeed { json: self.json, message: &mut message }.visit_map(map)?;
        Ok(Value::Message(message))
    }
}

fn float_text(text: &str) -> Option<f64> {
    match text {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        text => text.parse().ok().filter(|value: &f64| value.is_finite()),
    }
}

/// Takes `running`, `RUNNING` and `SANDBOX_STATE_RUNNING` alike, and a number.
fn enum_number(descriptor: &EnumDescriptor, text: &str) -> Option<i32> {
    let prefix = enum_prefix(descriptor);
    descriptor
        .values()
        .find(|value| {
            value.name().eq_ignore_ascii_case(text)
                || value.name().strip_prefix(&prefix).is_some_and(|short| short.eq_ignore_ascii_case(text))
        })
        .map(|value| value.number())
        .or_else(|| text.parse().ok())
}

fn well_known(descriptor: &MessageDescriptor, text: &str) -> Option<Value> {
    let mut message = DynamicMessage::new(descriptor.clone());
    match descriptor.full_name() {
        "google.protobuf.Timestamp" => {
            message.transcode_from(&text.parse::<prost_types::Timestamp>().ok()?).ok()?;
        }
        "google.protobuf.Duration" => {
            message.transcode_from(&text.parse::<prost_types::Duration>().ok()?).ok()?;
        }
        _ => return None,
    }
    Some(Value::Message(message))
}
