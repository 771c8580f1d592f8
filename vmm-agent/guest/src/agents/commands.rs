//! What an agent's wrapper is told: JSON objects, one a line.

use oc_proto::v1::{AgentOptions, StartAgentRequest};
use prost::bytes::Bytes;
use prost_types::{Struct, Value as ProtoValue, value::Kind};
use serde_json::{Map, Number, Value, json};
use tonic::Status;

use crate::refusal::Refusal;

/// Longest prompt, bytes. The wrapper takes no longer one either.
const MAX_PROMPT: usize = 1 << 20;
/// How an agent may be permitted what it does.
const PERMISSION_MODES: [&str; 4] = ["default", "acceptEdits", "bypassPermissions", "plan"];

/// What an agent is told first: how it works, and what to do if that is known. Takes it out of `request`.
///
/// # Errors
///
/// `INVALID_ARGUMENT`.
pub fn start(request: &mut StartAgentRequest) -> Result<Bytes, Status> {
    let options = AgentOptions {
        model: request.model.take(),
        system_prompt: request.system_prompt.take(),
        allowed_tools: std::mem::take(&mut request.allowed_tools),
        permission_mode: request.permission_mode.take(),
        max_turns: request.max_turns.take(),
        mcp_servers: request.mcp_servers.take(),
    };
    let mut lines = Vec::from(configure(options, std::mem::take(&mut request.resume))?);
    if !request.prompt.is_empty() {
        lines.extend_from_slice(&prompt(&request.prompt)?);
    }
    Ok(lines.into())
}

/// Something to do.
///
/// # Errors
///
/// `INVALID_ARGUMENT` for nothing, or too much.
pub fn prompt(text: &str) -> Result<Bytes, Status> {
    match text.len() {
        0 => Err(invalid("text is empty")),
        1..=MAX_PROMPT => Ok(line(json!({ "type": "prompt", "text": text }))),
        bytes => Err(invalid(format!("text is {bytes} bytes; at most {MAX_PROMPT} are taken"))),
    }
}

/// Stop.
pub fn interrupt() -> Bytes {
    line(json!({ "type": "interrupt" }))
}

/// How it works from now on, and the conversation to go on with, if `resume` names one.
///
/// # Errors
///
/// `INVALID_ARGUMENT`.
pub fn configure(options: AgentOptions, resume: String) -> Result<Bytes, Status> {
    let AgentOptions { model, system_prompt, allowed_tools, permission_mode, max_turns, mcp_servers } =
        options;
    if let Some(mode) = permission_mode.as_deref().filter(|mode| !PERMISSION_MODES.contains(mode)) {
        let shown: String = mode.chars().take(40).collect();
        return Err(invalid(format!("permissionMode {shown:?} is none of {}", PERMISSION_MODES.join(", "))));
    }
    if max_turns.is_some_and(|turns| turns < 1) {
        return Err(invalid("maxTurns is less than 1"));
    }
    let mut command = Map::from_iter([("type".to_owned(), json!("configure"))]);
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            command.insert(name.to_owned(), value);
        }
    };
    set("model", model.map(Value::from));
    set("systemPrompt", system_prompt.map(Value::from));
    set("allowedTools", (!allowed_tools.is_empty()).then(|| allowed_tools.into()));
    set("permissionMode", permission_mode.map(Value::from));
    set("maxTurns", max_turns.map(Value::from));
    set("mcpServers", mcp_servers.map(object));
    set("resume", (!resume.is_empty()).then(|| resume.into()));
    Ok(line(command.into()))
}

fn invalid(text: impl Into<String>) -> Status {
    Refusal::InvalidArgument.status(text)
}

/// JSON has no newline outside of strings unless it is laid out, and escapes it inside.
fn line(command: Value) -> Bytes {
    format!("{command}\n").into()
}

/// The JSON object that a `Struct` stands for. Its decoder has bounded its depth.
fn object(fields: Struct) -> Value {
    fields.fields.into_iter().map(|(name, field)| (name, value(field))).collect()
}

fn value(value: ProtoValue) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(truth)) => truth.into(),
        Some(Kind::NumberValue(number)) => number_of(number),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::ListValue(list)) => list.values.into_iter().map(self::value).collect(),
        Some(Kind::StructValue(fields)) => object(fields),
    }
}

/// Whole numbers as such: 8080, not 8080.0. What JSON cannot write is `null`, as in JavaScript.
fn number_of(number: f64) -> Value {
    /// Beyond it a double does not hold every whole number (`Number.MAX_SAFE_INTEGER`).
    const MAX_SAFE: f64 = 9_007_199_254_740_991.0;
    if number.fract() == 0.0 && number.abs() <= MAX_SAFE {
        #[expect(clippy::cast_possible_truncation, reason = "whole, and within what an i64 holds")]
        let whole = number as i64;
        return whole.into();
    }
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(line: &[u8]) -> Value {
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1, "one line");
        serde_json::from_slice(line.strip_suffix(b"\n").unwrap()).unwrap()
    }

    fn proto(kind: Kind) -> ProtoValue {
        ProtoValue { kind: Some(kind) }
    }

    #[test]
    fn an_agent_is_configured_and_then_prompted() {
        let mut request = StartAgentRequest {
            prompt: "Do \"it\"\nnow".into(),
            model: Some("m".into()),
            allowed_tools: vec!["Bash".into()],
            max_turns: Some(3),
            resume: "0000".into(),
            ..Default::default()
        };
        let lines = start(&mut request).unwrap();
        let (first, second) = lines.split_at(1 + lines.iter().position(|&byte| byte == b'\n').unwrap());
        assert_eq!(
            parsed(first),
            json!({ "type": "configure", "model": "m", "allowedTools": ["Bash"], "maxTurns": 3, "resume": "0000" })
        );
        assert_eq!(parsed(second), json!({ "type": "prompt", "text": "Do \"it\"\nnow" }));
        let nothing = start(&mut StartAgentRequest::default()).unwrap();
        assert_eq!(parsed(&nothing), json!({ "type": "configure" }));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let options = |mode: &str, turns| AgentOptions {
            permission_mode: Some(mode.into()),
            max_turns: Some(turns),
            ..Default::default()
        };
        for (mode, turns) in [("yolo", 1), ("", 1), ("plan", 0), ("plan", -1)] {
            let refused = configure(options(mode, turns), String::new()).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{mode} {turns}");
        }
        configure(options("plan", 1), String::new()).unwrap();
        assert!(prompt("").is_err());
        assert!(prompt(&"x".repeat(MAX_PROMPT + 1)).is_err());
        prompt(&"x".repeat(MAX_PROMPT)).unwrap();
    }

    #[test]
    fn servers_are_told_as_they_were_given() {
        let list = prost_types::ListValue {
            values: vec![
                proto(Kind::StringValue("-y".into())),
                proto(Kind::NumberValue(8080.0)),
                proto(Kind::NumberValue(-0.5)),
                proto(Kind::NumberValue(f64::NAN)),
                proto(Kind::BoolValue(true)),
                proto(Kind::NullValue(0)),
                ProtoValue { kind: None },
            ],
        };
        let server = Struct { fields: [("args".to_owned(), proto(Kind::ListValue(list)))].into() };
        let servers = Struct { fields: [("files".to_owned(), proto(Kind::StructValue(server)))].into() };
        let options = AgentOptions { mcp_servers: Some(servers), ..Default::default() };
        let line = configure(options, String::new()).unwrap();
        assert!(std::str::from_utf8(&line).unwrap().contains("8080,"), "whole numbers are written as such");
        assert_eq!(
            parsed(&line)["mcpServers"],
            json!({ "files": { "args": ["-y", 8080, -0.5, null, true, null, null] } })
        );
    }

    proptest! {
        #[test]
        fn whatever_is_said_is_one_line(text in "\\PC{1,40}|[\\x00-\\x1f\"\\\\]{1,40}", number in any::<f64>()) {
            prop_assert_eq!(&parsed(&prompt(&text).unwrap())["text"], &json!(text));
            let back = number_of(number);
            prop_assert_eq!(back.as_f64(), number.is_finite().then_some(number));
        }
    }
}
