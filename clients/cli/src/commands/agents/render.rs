//! An agent's events for people: what it says in full, what it does in a line each.
//!
//! The events are messages of the Claude Agent SDK, passed on unread, and those of the wrapper around it (see
//! `oc/v1/agent_session.proto`). What has no place here, or is not as it should be, is left out.

use serde_json::Value;

use crate::output::Printable;

/// Characters of what a tool is given.
const DETAIL: usize = 160;
/// What of a tool's input says most, the best first.
const TELLING: [&str; 9] =
    ["command", "file_path", "path", "notebook_path", "pattern", "url", "query", "description", "prompt"];

/// The text of an event, if it has one for people.
pub fn text(kind: &str, event: &Value) -> Option<String> {
    let text = match kind {
        "assistant" => blocks(event).filter_map(said).collect::<Vec<_>>().join("\n"),
        "user" => blocks(event).filter_map(answered).collect::<Vec<_>>().join("\n"),
        "system" if event["subtype"] == "init" => format!(
            "[conversation {}, model {}]",
            event["session_id"].as_str().unwrap_or("?"),
            event["model"].as_str().unwrap_or("?")
        ),
        "result" => result(event),
        "tool_use_summary" => format!("[{}]", line(event["summary"].as_str()?)),
        "error" => format!("[error: {}]", line(event["message"].as_str().unwrap_or("unknown"))),
        "interrupted" => "[interrupted]".to_owned(),
        _ => return None,
    };
    (!text.is_empty()).then(|| Printable(&text).to_string())
}

/// A message's content: blocks, or just text.
fn blocks(event: &Value) -> impl Iterator<Item = &Value> {
    let content = &event["message"]["content"];
    content.as_array().map_or_else(|| std::slice::from_ref(content), Vec::as_slice).iter()
}

fn said(block: &Value) -> Option<String> {
    match block["type"].as_str() {
        Some("text") => block["text"].as_str().map(|text| text.trim_end().to_owned()),
        Some("tool_use") => {
            let name = block["name"].as_str().unwrap_or("?");
            let input = &block["input"];
            let telling = TELLING.iter().find_map(|key| input[*key].as_str());
            let detail = telling.map_or_else(|| input.to_string(), ToOwned::to_owned);
            Some(format!("> {name}: {}", line(&detail)))
        }
        _ => block.as_str().map(ToOwned::to_owned),
    }
}

/// Of what tools answered only that they failed is told.
fn answered(block: &Value) -> Option<String> {
    if block["type"] != "tool_result" || block["is_error"] != true {
        return None;
    }
    let content = &block["content"];
    let text = content.as_str().or_else(|| content[0]["text"].as_str()).unwrap_or("failed");
    Some(format!("! {}", line(text)))
}

fn result(event: &Value) -> String {
    let mut parts = vec![event["subtype"].as_str().unwrap_or("done").replace('_', " ")];
    if event["is_error"] == true {
        // What went well was said before.
        parts.extend(event["result"].as_str().filter(|text| !text.is_empty()).map(line));
    }
    parts.extend(event["num_turns"].as_u64().map(|turns| format!("{turns} turns")));
    parts.extend(event["duration_ms"].as_f64().map(|ms| format!("{:.1} s", ms / 1000.0)));
    parts.extend(event["total_cost_usd"].as_f64().map(|cost| format!("${cost:.4}")));
    format!("[{}]", parts.join(", "))
}

/// One line, not too long.
fn line(text: &str) -> String {
    let text = text.trim();
    let first = text.lines().next().unwrap_or_default();
    match first.char_indices().nth(DETAIL) {
        Some((end, _)) => format!("{}…", &first[..end]),
        None if first.len() < text.len() => format!("{first}…"),
        None => first.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_an_agent_says_is_printed_in_full_and_what_it_does_in_a_line() {
        let event = json!({ "type": "assistant", "message": { "content": [
            { "type": "thinking", "thinking": "hm" },
            { "type": "text", "text": "First,\nI look.\n" },
            { "type": "tool_use", "name": "Bash", "input": { "description": "d", "command": "ls\npwd" } },
            { "type": "tool_use", "name": "Odd", "input": { "n": 1 } },
        ] } });
        let expected = "First,\nI look.\n> Bash: ls…\n> Odd: {\"n\":1}";
        assert_eq!(text("assistant", &event).unwrap(), expected);
    }

    #[test]
    fn failures_of_tools_are_told_and_successes_are_not() {
        let event = |is_error: bool| {
            json!({ "message": { "content": [
                { "type": "tool_result", "is_error": is_error, "content": [{ "type": "text", "text": "no such file" }] },
            ] } })
        };
        assert_eq!(text("user", &event(true)).unwrap(), "! no such file");
        assert_eq!(text("user", &event(false)), None);
    }

    #[test]
    fn a_result_says_what_it_took() {
        let event = json!({ "subtype": "success", "is_error": false, "result": "x", "num_turns": 3,
            "duration_ms": 12_345, "total_cost_usd": 0.01234 });
        assert_eq!(text("result", &event).unwrap(), "[success, 3 turns, 12.3 s, $0.0123]");
        let event = json!({ "subtype": "error_max_turns", "is_error": true, "result": "too much" });
        assert_eq!(text("result", &event).unwrap(), "[error max turns, too much]");
    }

    #[test]
    fn an_agent_cannot_drive_the_terminal() {
        let event = json!({ "message": { "content": "a\u{1b}]0;owned\u{7}" } });
        assert_eq!(text("assistant", &event).unwrap(), "a\\u{1b}]0;owned\\u{7}");
        assert_eq!(text("ready", &json!({})), None);
    }

    proptest! {
        #[test]
        fn lines_are_short_and_single(text in "\\PC{0,300}\n?\\PC{0,10}") {
            let line = line(&text);
            prop_assert!(line.chars().count() <= DETAIL + 1 && !line.contains('\n'));
        }
    }
}
