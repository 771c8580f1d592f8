//! Requests that are refused: each with its status, its stable code, and nothing disturbed.

use std::sync::Arc;

use oc_integration::mesh::Mesh;
use reqwest::Method;
use serde_json::{Value, json};

pub async fn bad_creates_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    // A tenant of its own: other tests come and go meanwhile.
    let rest = mesh.rest_of_new_tenant("refused").await?.1;
    let long = "x".repeat(70 << 10);
    let cases: [(Value, (u16, &str)); 14] = [
        (json!({ "templateID": "nothing" }), (404, "TEMPLATE_NOT_FOUND")),
        (json!({ "templateID": "../base" }), (400, "INVALID_ARGUMENT")),
        (json!({ "memoryMB": 3 }), (400, "INVALID_SIZE")),
        (json!({ "memoryMB": -1024 }), (400, "INVALID_SIZE")),
        (json!({ "memoryMB": 2_000_000_000 }), (400, "INVALID_SIZE")),
        (json!({ "cpuCount": 3 }), (400, "INVALID_SIZE")),
        (json!({ "memoryMB": 1024, "cpuCount": 4 }), (400, "INVALID_SIZE")),
        (json!({ "diskMB": 1 }), (400, "INVALID_SIZE")),
        (json!({ "diskMB": 300_000 }), (400, "INVALID_SIZE")),
        (json!({ "memoryMB": "lots" }), (400, "INVALID_ARGUMENT")),
        (json!({ "timeout": -1 }), (400, "INVALID_ARGUMENT")),
        (json!({ "envs": { "A=B": "x" } }), (400, "INVALID_ARGUMENT")),
        (json!({ "envs": { "A": long } }), (400, "INVALID_ARGUMENT")),
        (json!({ "metadata": { "a": long } }), (400, "INVALID_ARGUMENT")),
    ];
    for (body, (status, code)) in cases {
        let answer = rest.post("/api/sandboxes", body.clone()).await?;
        let shown: String = body.to_string().chars().take(80).collect();
        assert_eq!(answer.refusal(), (status, code.to_owned()), "{shown}");
        assert!(!answer.json()["error"].as_str().unwrap().is_empty());
    }
    assert_eq!(rest.list().await?, [""; 0], "a refused create has left something");
    // Unknown fields and unusual spellings are none.
    let sandbox = rest.create(json!({ "MEMORYmb": 1024, "secretStore": "later", "burst": true })).await?;
    sandbox.delete().await
}

pub async fn bad_commands_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox
        .run("echo 'echo hi' > plain; mkdir -p dir; printf '\\177ELFnonsense' > broken; chmod +x broken")
        .await?;
    let cases: [(Value, (u16, &str)); 14] = [
        (json!({ "cmd": "no-such-command", "args": ["x"] }), (400, "COMMAND_NOT_FOUND")),
        (json!({ "cmd": "./no-such-file", "args": ["x"] }), (400, "COMMAND_NOT_FOUND")),
        (json!({ "cmd": "./plain", "args": ["x"] }), (400, "COMMAND_NOT_EXECUTABLE")),
        (json!({ "cmd": "/home/sandbox/dir", "args": ["x"] }), (400, "COMMAND_NOT_EXECUTABLE")),
        (json!({ "cmd": "" }), (400, "INVALID_ARGUMENT")),
        (json!({}), (400, "INVALID_ARGUMENT")),
        (json!({ "cmd": "a\0b", "args": ["x"] }), (400, "INVALID_ARGUMENT")),
        (json!({ "cmd": "true", "args": ["a\0b"] }), (400, "INVALID_ARGUMENT")),
        (json!({ "cmd": "true", "envs": { "A": "a\0b" } }), (400, "INVALID_ARGUMENT")),
        (json!({ "cmd": "true", "cwd": "/nowhere" }), (400, "INVALID_PATH")),
        (json!({ "cmd": "true", "cwd": "plain" }), (400, "INVALID_PATH")),
        (json!({ "cmd": "true", "user": "nobody-here" }), (400, "UNKNOWN_USER")),
        (json!({ "cmd": "true", "timeout": -5 }), (400, "INVALID_ARGUMENT")),
        (json!({ "cmd": "x".repeat(200 << 10) }), (400, "INVALID_ARGUMENT")),
    ];
    for (body, (status, code)) in cases {
        let answer = sandbox.exec(body.clone()).await?;
        let shown: String = body.to_string().chars().take(80).collect();
        assert_eq!(answer.refusal(), (status, code.to_owned()), "{shown}");
    }
    sandbox.run("true").await?;
    sandbox.delete().await
}

pub async fn bad_paths_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.run("mkdir dir; echo x > file; ln -s loop loop").await?;
    let long = "a".repeat(5000);
    for (method, route, path, expected) in [
        (Method::GET, "/files", "missing", (404, "FILE_NOT_FOUND")),
        (Method::GET, "/files", "dir", (400, "NOT_A_FILE")),
        (Method::GET, "/files", "../etc/passwd", (400, "INVALID_PATH")),
        (Method::GET, "/files", "a\0b", (400, "INVALID_PATH")),
        (Method::GET, "/files", "", (400, "INVALID_PATH")),
        (Method::GET, "/files", long.as_str(), (400, "INVALID_PATH")),
        (Method::PUT, "/files", "dir", (400, "NOT_A_FILE")),
        (Method::PUT, "/files", "/home/../etc/passwd", (400, "INVALID_PATH")),
        (Method::PUT, "/files", "file/below", (400, "NOT_A_DIRECTORY")),
        (Method::PUT, "/files", "loop", (400, "INVALID_PATH")),
        (Method::GET, "/files/list", "file", (400, "NOT_A_DIRECTORY")),
        (Method::GET, "/files/stat", "missing", (404, "FILE_NOT_FOUND")),
        (Method::POST, "/files/mkdir", "file", (409, "FILE_EXISTS")),
        (Method::DELETE, "/files", "missing", (404, "FILE_NOT_FOUND")),
        (Method::DELETE, "/files", "/", (400, "INVALID_PATH")),
    ] {
        let answer = sandbox.files(method.clone(), route, path).await?;
        let shown: String = path.chars().take(40).collect();
        assert_eq!(answer.refusal(), (expected.0, expected.1.to_owned()), "{method} {route} {shown:?}");
    }
    assert_eq!(sandbox.run("cat file").await?, "x\n");
    sandbox.delete().await
}

pub async fn bad_requests_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let raw = |body: Vec<u8>| {
        rest.request(Method::POST, "/api/sandboxes").header("content-type", "application/json").body(body)
    };
    for (body, expected) in [
        (b"{".to_vec(), (400, "INVALID_ARGUMENT")),
        (b"[1]".to_vec(), (400, "INVALID_ARGUMENT")),
        (b"\"\xff\"".to_vec(), (400, "INVALID_ARGUMENT")),
        ("[".repeat(100_000).into_bytes(), (400, "INVALID_ARGUMENT")),
        (vec![b' '; 64 << 20], (413, "MESSAGE_TOO_LARGE")),
    ] {
        let shown = String::from_utf8_lossy(&body[..body.len().min(10)]).into_owned();
        let answer = rest.send(raw(body)).await?;
        assert_eq!(answer.refusal(), (expected.0, expected.1.to_owned()), "{shown}");
    }
    assert_eq!(rest.get("/api/nothing").await?.refusal(), (404, "ROUTE_NOT_FOUND".into()));
    let answer = rest.send(rest.request(Method::PATCH, "/api/sandboxes")).await?;
    assert_eq!(answer.refusal(), (405, "METHOD_NOT_ALLOWED".into()));
    for id in ["sb-00000000000000000000", "nonsense", "sb-%00", "..%2f..%2fkeys"] {
        let answer = rest.get(&format!("/api/sandboxes/{id}")).await?;
        assert_eq!(answer.refusal(), (404, "SANDBOX_NOT_FOUND".into()), "{id}");
        let answer = rest.post(&format!("/api/sandboxes/{id}/exec/run"), json!({ "cmd": "true" })).await?;
        assert_eq!(answer.refusal(), (404, "SANDBOX_NOT_FOUND".into()), "{id}");
    }
    // Every answer names its request, and one that the client chose is kept.
    let answer =
        rest.send(rest.request(Method::GET, "/api/sandboxes").header("x-request-id", "mine-1")).await?;
    assert_eq!(answer.headers["x-request-id"], "mine-1");
    Ok(())
}

pub async fn bad_credentials_are_refused(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let list = || rest.anonymous(Method::GET, "/api/sandboxes");
    assert_eq!(rest.send(list()).await?.refusal(), (401, "UNAUTHENTICATED".into()));
    let wrong = format!("osb_{}", "0".repeat(64));
    for request in [
        list().header("x-api-key", &wrong),
        list().header("x-api-key", "osb_short"),
        list().header("x-api-key", "\u{7f}".repeat(5000).replace('\u{7f}', "z")),
        list().bearer_auth("a.b.c"),
    ] {
        let answer = rest.send(request).await?;
        assert!([401, 403].contains(&answer.status), "{}", answer.status);
        assert!(!String::from_utf8_lossy(&answer.body).contains("osb_"), "an error repeats the key");
    }
    Ok(())
}
