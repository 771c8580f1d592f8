//! Messages as JSON, in the shape that REST gives them: proto3 JSON with 64-bit integers as numbers, enums as
//! lower-case words without their prefix, and `bytes` fields that hold text (option `oc.v1.text`) as text.

use std::sync::LazyLock;

use oc_proto::DESCRIPTORS;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, ExtensionDescriptor, FieldDescriptor, Kind,
    ReflectMessage as _, SerializeOptions, Value,
};
use serde_json::{Map, Value as Json};

#[expect(clippy::expect_used, reason = "our own bytes, made by our own build script")]
static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).expect("the contract's descriptors are valid"));

#[expect(clippy::expect_used, reason = "rest.proto is part of the contract")]
static TEXT: LazyLock<ExtensionDescriptor> =
    LazyLock::new(|| POOL.get_extension_by_name("oc.v1.text").expect("the contract has oc.v1.text"));

/// A message of the contract that commands print.
pub trait Shown: Message {
    /// Its name in the contract.
    const NAME: &'static str;
}

macro_rules! shown {
    ($($message:ident),* $(,)?) => {$(
        impl Shown for oc_proto::v1::$message {
            const NAME: &'static str = concat!("oc.v1.", stringify!($message));
        }
    )*};
}
shown!(
    AgentSession,
    Checkpoint,
    CreateDownloadUrlResponse,
    CreateKeyResponse,
    CreateUploadUrlResponse,
    ExecSession,
    FileInfo,
    Network,
    ForkCheckpointResponse,
    ForkSandboxResponse,
    GetExecResultResponse,
    HibernateSandboxResponse,
    HostReport,
    Key,
    Node,
    Preview,
    RotatePreviewAuthResponse,
    RunResponse,
    Sandbox,
    SandboxEvent,
    WatchDirectoryResponse,
);

/// The message as REST shows it.
#[expect(clippy::expect_used, reason = "both sides are compiled from the same descriptors")]
pub fn of<M: Shown>(message: &M) -> Json {
    let descriptor = POOL.get_message_by_name(M::NAME).expect("a message of the contract");
    let message = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .expect("the descriptor describes the message");
    show(&message)
}

/// Several messages as a JSON array.
pub fn list<M: Shown>(messages: &[M]) -> Json {
    messages.iter().map(of).collect()
}

/// Reads a message that a part of the mesh has printed as proto3 JSON. Fields that it does not have yet are left out.
///
/// # Errors
///
/// If it is no JSON, or none of such a message.
#[expect(clippy::expect_used, reason = "both sides are compiled from the same descriptors")]
pub fn read<M: Shown + Default>(text: &[u8]) -> Result<M, serde_json::Error> {
    let descriptor = POOL.get_message_by_name(M::NAME).expect("a message of the contract");
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let mut reader = serde_json::Deserializer::from_slice(text);
    let message = DynamicMessage::deserialize_with_options(descriptor, &mut reader, &options)?;
    reader.end()?;
    Ok(M::decode(message.encode_to_vec().as_slice()).expect("the descriptor describes the message"))
}

#[expect(clippy::expect_used, reason = "messages of the contract hold no value without a JSON form")]
fn show(message: &DynamicMessage) -> Json {
    let options = SerializeOptions::new().stringify_64_bit_integers(false).skip_default_fields(false);
    let mut json = message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("every message has a JSON form");
    adapt(message, &mut json);
    json
}

/// Turns proto3 JSON into REST's, in place.
fn adapt(message: &DynamicMessage, json: &mut Json) {
    // Well-known types are not objects, or have no field that would need it.
    let Json::Object(members) = json else { return };
    for field in message.descriptor().fields() {
        if !members.contains_key(field.json_name()) {
            continue;
        }
        match message.get_field(&field).as_ref() {
            Value::Bytes(bytes) if is_text(&field) => put_text(members, field.json_name(), bytes),
            value => {
                if let Some(member) = members.get_mut(field.json_name()) {
                    adapt_value(&field.kind(), value, member);
                }
            }
        }
    }
}

fn adapt_value(kind: &Kind, value: &Value, json: &mut Json) {
    match (kind, value) {
        (Kind::Enum(descriptor), Value::EnumNumber(_)) => {
            if let Json::String(name) = json {
                *name = enum_word(descriptor.name(), name);
            }
        }
        (_, Value::Message(message)) => adapt(message, json),
        (kind, Value::List(values)) => {
            for (value, json) in values.iter().zip(json.as_array_mut().into_iter().flatten()) {
                adapt_value(kind, value, json);
            }
        }
        _ => {}
    }
}

fn is_text(field: &FieldDescriptor) -> bool {
    matches!(field.options().get_extension(&TEXT).as_ref(), Value::Bool(true))
}

/// Text under the field's name; bytes that are no text are also given exactly, under `<name>Base64`.
fn put_text(members: &mut Map<String, Json>, name: &str, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let exact = members.insert(name.to_owned(), Json::String(text.clone().into_owned()));
    if let (std::borrow::Cow::Owned(_), Some(exact)) = (text, exact) {
        members.insert(format!("{name}Base64"), exact);
    }
}

/// `SANDBOX_STATE_RUNNING` of `SandboxState` is `running`.
pub fn enum_word(enum_name: &str, value_name: &str) -> String {
    let mut prefix = String::new();
    for (position, letter) in enum_name.char_indices() {
        if letter.is_uppercase() && position > 0 {
            prefix.push('_');
        }
        prefix.push(letter.to_ascii_uppercase());
    }
    prefix.push('_');
    value_name.strip_prefix(&prefix).unwrap_or(value_name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::{FileInfo, FileType, RunResponse, Sandbox, SandboxState};
    use prost_types::Timestamp;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_sandbox_looks_as_rest_shows_it() {
        let sandbox = Sandbox {
            sandbox_id: "sb-1".into(),
            state: SandboxState::Running.into(),
            memory_mb: 1024,
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            started_at: Some(Timestamp { seconds: 0, nanos: 0 }),
            ..Sandbox::default()
        };
        let json = of(&sandbox);
        assert_eq!(json["sandboxID"], "sb-1");
        assert_eq!(json["status"], "running");
        assert_eq!(json["memoryMB"], 1024);
        assert_eq!(json["metadata"], json!({ "k": "v" }));
        assert_eq!(json["startedAt"], "1970-01-01T00:00:00Z");
        assert_eq!(json.get("endAt"), None);
    }

    #[test]
    fn sixty_four_bit_integers_are_numbers() {
        let info = FileInfo { size: 1 << 40, r#type: FileType::Symlink.into(), ..FileInfo::default() };
        assert_eq!(of(&info)["size"], 1_u64 << 40);
        assert_eq!(of(&info)["type"], "symlink");
        assert_eq!(list(&[info.clone(), info])[1]["type"], "symlink");
    }

    #[test]
    fn output_is_text_and_what_is_no_text_comes_twice() {
        let response = RunResponse {
            stdout: "häh\n".as_bytes().into(),
            stderr: b"\xff\x00"[..].into(),
            ..RunResponse::default()
        };
        let json = of(&response);
        assert_eq!(json["stdout"], "häh\n");
        assert_eq!(json.get("stdoutBase64"), None);
        assert_eq!(json["stderr"], "\u{fffd}\0");
        assert_eq!(json["stderrBase64"], "/wA=");
    }

    #[test]
    fn an_unknown_enum_number_is_kept() {
        let sandbox = Sandbox { state: 99, ..Sandbox::default() };
        assert_eq!(of(&sandbox)["status"], 99);
    }
}
