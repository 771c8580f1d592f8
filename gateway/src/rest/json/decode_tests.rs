use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::surface::Surface;

fn read(name: &str, text: &[u8]) -> Result<DynamicMessage, String> {
    let surface = Surface::load().unwrap();
    let mut message = DynamicMessage::new(surface.pool().get_message_by_name(name).unwrap());
    Json::new(&surface).unwrap().decode(text, &mut message).map_err(|error| error.to_string())?;
    Ok(message)
}

fn run(text: &[u8]) -> Result<oc_proto::v1::RunRequest, String> {
    let message = read("oc.v1.RunRequest", text)?;
    oc_proto::v1::RunRequest::decode(message.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

fn create(text: &str) -> Result<oc_proto::v1::CreateSandboxRequest, String> {
    let message = read("oc.v1.CreateSandboxRequest", text.as_bytes())?;
    oc_proto::v1::CreateSandboxRequest::decode(message.encode_to_vec().as_slice())
        .map_err(|error| error.to_string())
}

#[test]
fn keys_match_without_regard_to_case_in_either_spelling() {
    for key in ["templateID", "templateId", "TEMPLATEID", "template_id", "Template_ID"] {
        assert_eq!(create(&format!("{{\"{key}\": \"base\"}}")).unwrap().template_id, "base", "{key}");
    }
}

#[test]
fn unknown_members_are_skipped_whatever_they_hold() {
    let request =
        create(r#"{"burst": {"a": [1, {"b": null}]}, "memoryMB": 512, "sandboxFamily": 1e9}"#).unwrap();
    assert_eq!(request.memory_mb, 512);
}

#[test]
fn nothing_is_an_empty_object_and_null_an_absent_field() {
    assert_eq!(create("").unwrap(), Default::default());
    assert_eq!(create(" \n").unwrap(), Default::default());
    assert_eq!(create("null").unwrap(), Default::default());
    assert_eq!(create(r#"{"timeout": null, "envs": null}"#).unwrap().timeout, None);
    assert_eq!(create(r#"{"timeout": 0}"#).unwrap().timeout, Some(0));
}

#[test]
fn whole_numbers_are_taken_in_every_form_and_only_in_range() {
    for text in ["300", "300.0", "3e2", "\"300\""] {
        assert_eq!(create(&format!("{{\"timeout\": {text}}}")).unwrap().timeout, Some(300), "{text}");
    }
    for text in ["2147483648", "-2147483649", "1.5", "1e300", "true", "\"\"", "[]", "{}", "\"1x\""] {
        let error = create(&format!("{{\"timeout\": {text}}}")).unwrap_err();
        assert!(error.contains("`timeout`"), "{text}: {error}");
    }
}

#[test]
fn wrong_types_name_the_field() {
    for (text, field) in [
        (r#"{"cmd": 1}"#, "`cmd`"),
        (r#"{"args": "x"}"#, "`args`"),
        (r#"{"args": [1]}"#, "`args`"),
        (r#"{"args": [null]}"#, "`args`"),
        (r#"{"envs": []}"#, "`envs`"),
        (r#"{"envs": {"A": 1}}"#, "`envs`"),
        (r#"{"stdin": 5}"#, "`stdin`"),
        (r#"{"stdinBase64": "*"}"#, "`stdin`"),
    ] {
        let error = run(text.as_bytes()).unwrap_err();
        assert!(error.contains(field), "{text}: {error}");
    }
}

#[test]
fn malformed_text_is_refused() {
    for text in [
        &b"{"[..],
        b"{}x",
        b"[]",
        b"1",
        b"\"a\"",
        b"{\"cmd\": \"\xff\"}",
        b"{\"cmd\": \"\\ud800\"}",
        b"{\"cmd\" 1}",
        b"\xef\xbb\xbf{}",
        b"{\"cmd\": \"a\",}",
    ] {
        assert!(run(text).is_err(), "{}", String::from_utf8_lossy(text));
    }
}

#[test]
fn depth_and_number_of_elements_are_bounded() {
    let deep = format!("{{\"x\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(run(deep.as_bytes()).is_ok(), "what is skipped is skipped without recursion");
    assert!(run(deep.replace('x', "args").as_bytes()).unwrap_err().contains("`args`"));
    let wide = format!("{{\"args\": [{}\"\"]}}", "\"\",".repeat(70_000));
    assert!(run(wide.as_bytes()).unwrap_err().contains("`args`"));
}

#[test]
fn the_last_of_repeated_members_wins() {
    let request = run(br#"{"cmd": "a", "args": ["x"], "CMD": "b", "args": ["y"]}"#).unwrap();
    assert_eq!((request.cmd.as_str(), request.args.as_slice()), ("b", &["y".to_owned()][..]));
}

#[test]
fn text_bytes_are_taken_as_text_or_base64() {
    assert_eq!(run(r#"{"stdin": "é\u0000"}"#.as_bytes()).unwrap().stdin, "é\0".as_bytes());
    for text in ["/yE=", "/yE", "_yE"] {
        assert_eq!(
            run(format!("{{\"stdinBase64\": \"{text}\"}}").as_bytes()).unwrap().stdin,
            &b"\xff!"[..],
            "{text}"
        );
    }
}

#[test]
fn enums_and_times_are_taken_as_they_are_shown() {
    for text in ["\"running\"", "\"RUNNING\"", "\"SANDBOX_STATE_RUNNING\"", "2", "\"2\""] {
        let message = read("oc.v1.Sandbox", format!("{{\"status\": {text}}}").as_bytes()).unwrap();
        let sandbox = oc_proto::v1::Sandbox::decode(message.encode_to_vec().as_slice()).unwrap();
        assert_eq!(sandbox.state(), oc_proto::v1::SandboxState::Running, "{text}");
    }
    assert!(read("oc.v1.Sandbox", br#"{"status": "flying"}"#).unwrap_err().contains("`status`"));
    let message = read("oc.v1.Sandbox", br#"{"startedAt": "2023-11-14T22:13:20Z"}"#).unwrap();
    let sandbox = oc_proto::v1::Sandbox::decode(message.encode_to_vec().as_slice()).unwrap();
    assert_eq!(sandbox.started_at.unwrap().seconds, 1_700_000_000);
    for text in ["5", "{}", "\"soon\"", "{\"seconds\": 1}"] {
        let error = read("oc.v1.Sandbox", format!("{{\"startedAt\": {text}}}").as_bytes()).unwrap_err();
        assert!(error.contains("`startedAt`"), "{error}");
    }
}

proptest! {
    #[test]
    fn hostile_bytes_are_read_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = run(&text);
    }

    #[test]
    fn hostile_json_is_read_or_refused(text in r#"[{}\[\]",:0-9a-zA-Z\\u.+-]{0,80}"#) {
        let _ = run(text.as_bytes());
        let _ = create(&text);
    }

    #[test]
    fn any_bytes_survive_the_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let surface = Surface::load().unwrap();
        let json = Json::new(&surface).unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.RunRequest").unwrap();
        let request = oc_proto::v1::RunRequest { stdin: bytes.clone().into(), ..Default::default() };
        let text = json.encode(descriptor.clone(), request.encode_to_vec().into()).unwrap();
        let mut again = DynamicMessage::new(descriptor);
        json.decode(&text, &mut again).unwrap();
        let again = oc_proto::v1::RunRequest::decode(again.encode_to_vec().as_slice()).unwrap();
        prop_assert_eq!(again.stdin, bytes);
    }
}
