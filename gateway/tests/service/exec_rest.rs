//! Sessions, terminals and agents by REST, in the names of the published clients.

use http::Method;
use serde_json::{Value, json};

use crate::mesh::{Mesh, SANDBOX};

fn path(rest: &str) -> String {
    format!("/api/sandboxes/{SANDBOX}/{rest}")
}

#[tokio::test]
async fn a_command_that_runs_on_is_accepted_and_one_that_ended_is_answered() {
    let mesh = Mesh::start().await;
    let ended = mesh.call(Method::POST, &path("exec/run-async"), r#"{"cmd": "true"}"#).await;
    assert_eq!(ended.status, 200);
    assert_eq!(ended.json()["exitCode"], 0);
    assert_eq!(ended.json()["stdout"], "done");
    assert_eq!(ended.json().get("execId"), None);
    let runs = mesh.call(Method::POST, &path("exec/run-async"), r#"{"cmd": "sleep"}"#).await;
    assert_eq!(runs.status, 202);
    let runs = runs.json();
    assert_eq!((&runs["execId"], &runs["running"]), (&json!("e-1"), &json!(true)));
    assert_eq!(runs["startedAt"], "2023-11-14T22:13:20Z");
    assert_eq!(runs.get("exitCode"), None);
}

#[tokio::test]
async fn sessions_have_the_names_that_clients_read() {
    let mesh = Mesh::start().await;
    let started = mesh.call(Method::POST, &path("exec"), r#"{"cmd": "bash", "args": ["-l"]}"#).await;
    assert_eq!(started.status, 201);
    let started = started.json();
    for (name, value) in [
        ("sessionID", json!("e-1")),
        ("sandboxID", json!("sb-1")),
        ("command", json!("bash")),
        ("args", json!(["-l"])),
        ("running", json!(true)),
        ("startedAt", json!("2023-11-14T22:13:20Z")),
        ("attachedClients", json!(1)),
    ] {
        assert_eq!(started[name], value, "{name}");
    }
    for absent in ["exitCode", "endedAt", "terminal"] {
        assert_eq!(started.get(absent), None, "{absent}");
    }
    let listed = mesh.call(Method::GET, &path("exec"), "").await.json();
    let exit_codes: Vec<Option<&Value>> =
        listed.as_array().unwrap().iter().map(|session| session.get("exitCode")).collect();
    assert_eq!(exit_codes, [None, Some(&json!(0))]);
    let terminal = mesh.call(Method::POST, &path("pty"), r#"{"cols": 80, "rows": 24}"#).await;
    assert_eq!((terminal.status.as_u16(), terminal.json()["sessionID"].as_str()), (201, Some("t-1")));
    let result = mesh.call(Method::GET, &path("exec/e-1/result?waitMs=1"), "").await.json();
    assert_eq!((&result["running"], result.get("exitCode")), (&json!(true), None));
}

#[tokio::test]
async fn a_kill_needs_no_body() {
    let mesh = Mesh::start().await;
    for body in ["", "{}", r#"{"signal": 15}"#] {
        let killed = mesh.call(Method::POST, &path("exec/e-1/kill"), body).await;
        assert_eq!((killed.status.as_u16(), killed.body.len()), (204, 0), "{body}");
    }
    let deleted = mesh.call(Method::DELETE, &path("pty/t-1"), "").await;
    assert_eq!((deleted.status.as_u16(), deleted.body.len()), (204, 0));
    assert_eq!(*mesh.agent.0.signals.lock(), [None, None, Some(15), None]);
    let resized = mesh.call(Method::POST, &path("pty/t-1/resize"), r#"{"cols": 1, "rows": 2}"#).await;
    assert_eq!(resized.status, 204);
}

#[tokio::test]
async fn an_agents_mcp_servers_are_any_object() {
    let mesh = Mesh::start().await;
    let body = json!({
        "prompt": "hi",
        "mcpServers": {"files": {"command": "npx", "args": ["-y", "x"], "env": {"A": "b"}, "timeout": 3}},
    });
    let started = mesh.call(Method::POST, &path("agent"), body.to_string()).await;
    assert_eq!((started.status.as_u16(), started.json()["sessionID"].as_str()), (201, Some("a-1")));
    let servers = mesh.agent.0.mcp_servers.lock()[0].clone().unwrap();
    assert!(format!("{servers:?}").contains("npx"), "{servers:?}");
    let wrong = mesh.call(Method::POST, &path("agent"), r#"{"mcpServers": [1]}"#).await;
    assert_eq!(wrong.error(), (400, "INVALID_ARGUMENT".to_owned()));
    let listed = mesh.call(Method::GET, &path("agent"), "").await.json();
    assert_eq!(listed[0]["sessionID"], "a-1");
    for (route, body) in [
        ("agent/a-1/prompt", r#"{"text": "more"}"#),
        ("agent/a-1/interrupt", ""),
        ("agent/a-1/configure", r#"{"options": {"mcpServers": {}}}"#),
        ("agent/a-1/kill", ""),
    ] {
        let answer = mesh.call(Method::POST, &path(route), body).await;
        assert_eq!(answer.status, 204, "{route}: {:?}", answer.body);
    }
}
