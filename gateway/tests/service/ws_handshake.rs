//! Who may attach by WebSocket, and how others are refused before there is one.

use http::Method;
use oc_gateway::{listener::Limits, ws};
use oc_mesh::error::Reason;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    mesh::{CREATING, DELETED, FAILED, FOREIGN, HIBERNATED, Mesh, SANDBOX, STRANDED},
    websocket::{PATIENCE, Seen},
};

fn path(sandbox: &str, session: &str) -> String {
    format!("/api/sandboxes/{sandbox}/exec/{session}")
}

/// What a refused handshake is answered.
async fn refusal(mesh: &Mesh, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
    match mesh.websocket(path, headers).await {
        Ok(_) => panic!("not refused: {path} {headers:?}"),
        Err((status, code)) => (status.as_u16(), code),
    }
}

#[tokio::test]
async fn a_credential_is_taken_wherever_clients_put_it() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1").say("hi");
    let token = mesh.token(SANDBOX);
    for credential in [mesh.key.as_str(), token.as_str()] {
        let bearer = format!("Bearer {credential}");
        for (headers, query, answered) in [
            (vec![("x-api-key", credential)], String::new(), None),
            (vec![("authorization", bearer.as_str())], String::new(), None),
            (vec![], format!("?token={credential}"), None),
            (vec![], format!("?api_key={credential}"), None),
            (vec![("x-api-key", credential)], format!("?api_key={credential}"), None),
            (
                vec![("sec-websocket-protocol", &*format!("oc.raw, oc.bearer.{credential}"))],
                String::new(),
                Some("oc.raw"),
            ),
            (
                vec![("sec-websocket-protocol", &*format!("oc.bearer.{credential}, oc.v1.exec"))],
                String::new(),
                Some("oc.v1.exec"),
            ),
        ] {
            for prefix in ["", "/api"] {
                for stream in ["exec", "agent", "pty"] {
                    let path = format!("{prefix}/sandboxes/{SANDBOX}/{stream}/e-1{query}");
                    let mut client = mesh.websocket(&path, &headers).await.expect(&path);
                    assert_eq!(client.subprotocol.as_deref(), answered);
                    if answered != Some("oc.v1.exec") {
                        let expected = if stream == "pty" { &b"hi"[..] } else { b"\x01hi" };
                        assert_eq!(client.bytes().await, expected, "{path}");
                    }
                }
            }
        }
    }
    for (_, sandbox, caller) in mesh.agent.0.calls.lock().iter() {
        assert_eq!((sandbox.as_str(), caller.tenant.as_str()), (SANDBOX, "ours"));
    }
}

#[tokio::test]
async fn whoever_may_not_attach_is_refused_with_a_status() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1");
    let key = [("x-api-key", mesh.key.as_str())];
    let token = |token: String| ("authorization", format!("Bearer {token}"));
    let here = path(SANDBOX, "e-1");
    assert_eq!(refusal(&mesh, &here, &[]).await, (401, "UNAUTHENTICATED".into()));
    for (header, expected) in [
        (token(mesh.token(FOREIGN)), (403, "WRONG_SANDBOX")),
        (token(mesh.expired_token(SANDBOX)), (401, "TOKEN_EXPIRED")),
        (token(mesh.forged_token()), (403, "INVALID_CREDENTIALS")),
        (("x-api-key", mesh.foreign_key.clone()), (404, "SANDBOX_NOT_FOUND")),
        (("sec-websocket-protocol", "oc.v1.exec, oc.bearer.osb_1".to_owned()), (403, "INVALID_CREDENTIALS")),
    ] {
        let (status, code) = refusal(&mesh, &here, &[(header.0, &header.1)]).await;
        assert_eq!((status, code.as_str()), expected);
    }
    for protocol in ["oc.raw", "oc.v1.exec"] {
        let headers = [key[0], ("sec-websocket-protocol", protocol)];
        for (sandbox, expected) in [
            (FOREIGN, (404, "SANDBOX_NOT_FOUND")),
            (DELETED, (410, "SANDBOX_DELETED")),
            (FAILED, (410, "SANDBOX_FAILED")),
            (CREATING, (503, "SANDBOX_NOT_READY")),
            (STRANDED, (503, "HOST_UNAVAILABLE")),
        ] {
            let (status, code) = refusal(&mesh, &path(sandbox, "e-1"), &headers).await;
            assert_eq!((status, code.as_str()), expected, "{sandbox} {protocol}");
        }
        assert!(mesh.agent.0.calls.lock().is_empty());
    }
    assert_eq!(refusal(&mesh, &path(SANDBOX, "e-9"), &key).await, (404, "SESSION_NOT_FOUND".into()));
    let long = "e".repeat(200);
    assert_eq!(refusal(&mesh, &path(SANDBOX, &long), &key).await, (404, "SESSION_NOT_FOUND".into()));
    let number = format!("{here}?offset=x");
    assert_eq!(refusal(&mesh, &number, &key).await, (400, "INVALID_ARGUMENT".into()));
    assert_eq!(refusal(&mesh, &path(SANDBOX, "%ff"), &key).await, (400, "INVALID_ARGUMENT".into()));
    assert_eq!(refusal(&mesh, "/api/sandboxes/x/files/y", &key).await.0, 404);
}

#[tokio::test]
async fn a_hibernated_sandbox_is_woken() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1").say("awake");
    let headers = [("x-api-key", mesh.key.as_str())];
    let mut client = mesh.websocket(&path(HIBERNATED, "e-1"), &headers).await.unwrap();
    assert_eq!(client.bytes().await, b"\x01awake");
}

#[tokio::test]
async fn a_handshake_that_is_wrong_is_refused() {
    let mesh = Mesh::start().await;
    mesh.agent.0.sessions.start("e-1");
    let head = |changed: &str| {
        let mut head =
            format!("GET {} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n", path(SANDBOX, "e-1"), mesh.key);
        for line in [
            "connection: Upgrade",
            "upgrade: websocket",
            "sec-websocket-version: 13",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        ] {
            let name = line.split(':').next().unwrap();
            let line = if changed.starts_with(name) { changed } else { line };
            head.push_str(line);
            head.push_str("\r\n");
        }
        head + "\r\n"
    };
    for (changed, status) in [
        ("", "101"),
        ("sec-websocket-version: 8", "426"),
        ("sec-websocket-key: x", "400"),
        // No WebSocket is asked for: this is REST's.
        ("upgrade: h2c", "200"),
        ("connection: keep-alive", "200"),
    ] {
        let mut stream = TcpStream::connect(mesh.address).await.unwrap();
        stream.write_all(head(changed).as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let length = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]).to_lowercase();
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{changed}: {answer}");
        assert_eq!(answer.contains("sec-websocket-version: 13"), status == "426", "{answer}");
        assert_eq!(answer.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), status == "101", "{answer}");
    }
    let described = mesh.call(Method::GET, &path(SANDBOX, "e-1"), "").await;
    assert_eq!((described.status.as_u16(), described.json()["sessionID"].as_str()), (200, Some("e-1")));
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_where_the_operator_says_so() {
    let mesh = Mesh::with(Limits::default(), |settings| {
        settings.allowed_origins = vec!["https://console.example".into()];
    })
    .await;
    mesh.agent.0.sessions.start("e-1");
    let here = path(SANDBOX, "e-1");
    let from = |origin: &'static str| [("x-api-key", mesh.key.as_str()), ("origin", origin)];
    let refused = (403, Reason::OriginNotAllowed.as_str().to_owned());
    assert_eq!(refusal(&mesh, &here, &from("https://evil.example")).await, refused);
    assert!(mesh.websocket(&here, &from("https://console.example")).await.is_ok());
    assert!(mesh.websocket(&here, &from("https://console.example")[..1]).await.is_ok());
    let own = format!("http://{}", mesh.address);
    assert!(mesh.websocket(&here, &[("x-api-key", &mesh.key), ("origin", &own)]).await.is_ok());
    let rest = mesh.send(Method::GET, "/api/sandboxes", &from("https://evil.example"), "").await;
    assert_eq!(rest.error(), refused);
}

#[tokio::test]
async fn places_are_limited_and_given_back_and_requests_need_none() {
    let mesh = Mesh::with(Limits::default(), |settings| {
        settings.max_requests = 1;
        settings.websockets = ws::Limits { max: 2, ..ws::Limits::default() };
    })
    .await;
    let session = mesh.agent.0.sessions.start("e-1");
    let key = [("x-api-key", mesh.key.as_str())];
    let here = path(SANDBOX, "e-1");
    let mut clients = vec![mesh.attach("exec/e-1").await, mesh.attach("exec/e-1").await];
    assert_eq!(refusal(&mesh, &here, &key).await, (503, "OVERLOADED".into()));
    assert_eq!(mesh.call(Method::GET, "/api/sandboxes", "").await.status, 200);
    assert_eq!(clients[0].bytes().await, [4]);
    clients.pop().unwrap().socket.close(None).await.unwrap();
    session.until(|state| state.attached == 1).await;
    let again = async { while mesh.websocket(&here, &key).await.is_err() {} };
    tokio::time::timeout(PATIENCE, again).await.expect("the place is not given back");
    session.say("still there");
    assert_eq!(clients[0].next().await, Seen::Bytes(b"\x01still there".to_vec()));
}
