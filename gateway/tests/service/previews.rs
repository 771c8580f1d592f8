//! Ports of sandboxes by host name, over real sockets on both sides.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use oc_gateway::{app::Settings, listener::Limits};
use oc_mesh::keys;
use oc_proto::{
    mesh::{PreviewDomain, PreviewEntry, SandboxRecord},
    v1::SandboxState,
};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};
use tonic::body::Body;

use crate::{
    client::{Answer, client, collect},
    http2::Http2,
    mesh::{CREATING, DELETED, FAILED, FOREIGN, HIBERNATED, Mesh, SANDBOX, put, sandbox_record},
    ports::{Server, closed, says},
};

pub const PATIENCE: Duration = Duration::from_secs(20);
const TOKEN: &str = "0123456789abcdef";

pub fn host(sandbox: &str, port: impl std::fmt::Display) -> String {
    format!("{sandbox}-p{port}.preview.localhost")
}

/// A request to a host name, whichever it is.
pub fn request(
    mesh: &Mesh,
    http2: bool,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Body,
) -> Request<Body> {
    // In HTTP/2 the client takes the authority out of the URL, which must lead to the gateway.
    let mut request = Request::builder().uri(format!("http://{}{path}", mesh.address)).header("host", host);
    if http2 {
        request = Request::builder().uri(format!("http://{}{path}", mesh.address));
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}

pub async fn get(mesh: &Mesh, host: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    collect(client(false).request(request(mesh, false, host, path, headers, Body::empty())).await.unwrap())
        .await
}

/// The same by HTTP/2, on a connection of its own.
async fn get_h2(mesh: &Mesh, host: &str, path: &str) -> Answer {
    let stream = TcpStream::connect(mesh.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder().uri(format!("http://{host}{path}")).body(Body::empty()).unwrap();
    let answer = collect(sender.send_request(request).await.unwrap()).await;
    driver.abort();
    answer
}

pub async fn raw(mesh: &Mesh, text: &str) -> String {
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    let _ = stream.write_all(text.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it hangs");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Meshes with a host that hands connections to ports over, and with one that carries their bytes.
pub async fn both_ways(change: fn(&mut Settings)) -> [Mesh; 2] {
    let (over, carried) =
        (Mesh::with(Limits::default(), change).await, Mesh::with(Limits::default(), change).await);
    carried.agent.0.handoffs.lock().take();
    [over, carried]
}

#[tokio::test]
async fn a_port_is_reached_by_both_versions_and_learns_who_asks() {
    for mesh in both_ways(|_| ()).await {
        let server = Server::start().await;
        let name = host(SANDBOX, server.port);
        let headers = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=10.0.0.1"),
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("te", "trailers"),
            ("oc-tenant", "root"),
            ("authorization", "Basic eDp5"),
            ("cookie", "a=b"),
            ("x-request-id", "r-7"),
        ];
        let answer = get(&mesh, &name, "/echo?a=%20b", &headers).await;
        assert_eq!(
            (answer.status, &answer.headers["x-request-id"]),
            (StatusCode::OK, &"r-7".parse().unwrap())
        );
        assert!(!answer.headers.contains_key("keep-alive"));
        let told = answer.json();
        assert_eq!((&told["method"], &told["target"]), (&"GET".into(), &"/echo?a=%20b".into()));
        let seen = &told["headers"];
        assert_eq!(seen["host"], name);
        assert_eq!(
            (&seen["x-forwarded-host"], &seen["x-forwarded-port"]),
            (&name.clone().into(), &"80".into())
        );
        assert_eq!(
            (&seen["x-forwarded-for"], &seen["x-forwarded-proto"]),
            (&"127.0.0.1".into(), &"http".into())
        );
        assert_eq!((&seen["authorization"], &seen["cookie"]), (&"Basic eDp5".into(), &"a=b".into()));
        for gone in ["forwarded", "x-hop", "te", "connection", "transfer-encoding"] {
            assert!(seen.get(gone).is_none(), "{gone}: {seen}");
        }
        let answer = get_h2(&mesh, &name, "/healthz").await;
        assert_eq!((answer.status, &answer.json()["target"]), (StatusCode::OK, &"/healthz".into()));
        assert_eq!(answer.json()["headers"]["host"], name);
        // One after the other they share a connection.
        assert_eq!(server.connections(), 1);
        let calls = mesh.agent.0.calls.lock();
        assert!(calls.iter().all(|(rpc, sandbox, caller)| (*rpc, sandbox.as_str(), caller.tenant.as_str())
            == ("ForwardPort", SANDBOX, "ours")));
    }
}

#[tokio::test]
async fn a_proxy_of_ours_says_whom_it_asks_for() {
    let trust = |network: &str| {
        let network = network.parse().unwrap();
        Mesh::with(Limits::default(), move |settings| settings.trusted_proxies = vec![network])
    };
    let server = Server::start().await;
    let name = host(SANDBOX, server.port);
    let said = [
        ("x-forwarded-for", "192.0.2.1, 10.0.0.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "app.example"),
        ("x-forwarded-port", "8443"),
        ("forwarded", "for=192.0.2.1"),
    ];
    for (network, told) in [
        ("127.0.0.0/8", ["192.0.2.1, 10.0.0.1, 127.0.0.1", "https", "app.example", "8443"]),
        ("10.0.0.0/8", ["127.0.0.1", "http", &name, "80"]),
    ] {
        let mesh = trust(network).await;
        let seen = get(&mesh, &name, "/echo", &said).await.json()["headers"].clone();
        let seen_ways =
            ["for", "proto", "host", "port"].map(|what| seen[format!("x-forwarded-{what}")].clone());
        assert_eq!(seen_ways, told);
        assert!(seen.get("forwarded").is_none() && seen["host"] == name, "{seen}");
    }
}

#[tokio::test]
async fn websockets_pass_and_hold_a_place_until_they_end() {
    for mesh in both_ways(|_| ()).await {
        let server = Server::start().await;
        let stream = TcpStream::connect(mesh.address).await.unwrap();
        let asked = format!("ws://{}:{}/ws", host(SANDBOX, server.port), mesh.address.port())
            .into_client_request()
            .unwrap();
        let (mut socket, answer) = tokio_tungstenite::client_async(asked, stream).await.unwrap();
        assert!(answer.headers().contains_key("x-request-id"));
        for size in [0, 5, 300 << 10] {
            let message = Message::binary(vec![3; size]);
            socket.send(message.clone()).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), message);
        }
        // The gateway ends them when it goes down.
        mesh.stop.cancel();
        assert!(!matches!(tokio::time::timeout(PATIENCE, socket.next()).await.unwrap(), Some(Ok(_))));
    }
}

#[tokio::test]
async fn websockets_pass_by_http2() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let url = |port: u16, path: &str| format!("http://{}{path}", host(SANDBOX, port));
    let mut client = Http2::over(TcpStream::connect(mesh.address).await.unwrap()).await;
    let (mut socket, headers) = client.connect("websocket", &url(server.port, "/ws"), &[]).await.unwrap();
    assert!(headers.contains_key("x-request-id"));
    for between in ["sec-websocket-accept", "upgrade", "connection"] {
        assert!(!headers.contains_key(between), "{headers:?}");
    }
    let (mut other, _) = client.connect("websocket", &url(server.port, "/ws"), &[]).await.unwrap();
    for size in [0, 5, 300 << 10] {
        for socket in [&mut socket, &mut other] {
            let message = Message::binary(vec![3; size]);
            socket.send(message.clone()).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), message);
        }
    }
    // One that its client closes ends, and nothing else of the connection.
    other.close(None).await.unwrap();
    while other.next().await.is_some() {}
    assert_eq!(client.get(&url(server.port, "/echo")).await.status, 200);

    let (forbids, _tasks) = says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
    let (another, _tasks) = says(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n",
    )
    .await;
    let refused = client.connect("websocket", &url(forbids, "/"), &[]).await.unwrap_err();
    assert_eq!((refused.status.as_u16(), &refused.body[..]), (403, &b"no"[..]));
    // A success would be taken for a WebSocket.
    for (port, path) in [(server.port, "/echo"), (another, "/")] {
        let refused = client.connect("websocket", &url(port, path), &[]).await.unwrap_err();
        assert_eq!(refused.error(), (502, "PORT_RESET".into()));
    }
    let refused = client.connect("connect-udp", &url(server.port, "/ws"), &[]).await.unwrap_err();
    assert_eq!(refused.error(), (400, "INVALID_ARGUMENT".into()));

    mesh.stop.cancel();
    assert!(!matches!(tokio::time::timeout(PATIENCE, socket.next()).await.unwrap(), Some(Ok(_))));
}

#[tokio::test]
async fn a_token_is_asked_for_before_anything_is_said_or_woken() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let hash = hex::encode(Sha256::digest(TOKEN));
    for (id, state) in [(SANDBOX, SandboxState::Running), (HIBERNATED, SandboxState::Hibernated)] {
        let record =
            SandboxRecord { preview_token_hash: hash.clone(), ..sandbox_record(id, "ours", state, "host-a") };
        put(&mesh.store, &keys::sandbox(id), &record).await;
    }
    let name = host(SANDBOX, server.port);
    let refused = async {
        // Its copy of the record comes a moment later.
        while get(&mesh, &name, "/", &[]).await.status != 401
            || get(&mesh, &host(HIBERNATED, 80), "/", &[]).await.status != 401
        {}
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    mesh.scheduler.0.lock().clear();
    let none = get(&mesh, &name, "/", &[]).await;
    assert!(none.headers["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
    for wrong in [
        ("x-oc-preview-token", "0123456789abcdeg"),
        ("authorization", "Bearer 0123456789abcdeg"),
        ("authorization", &format!("Bearer {}", mesh.key)),
        ("x-api-key", &mesh.key),
    ] {
        let answer = get(&mesh, &name, "/", &[wrong]).await;
        assert_eq!((answer.status, &answer.body), (none.status, &none.body));
    }
    assert_eq!(get(&mesh, &host(HIBERNATED, 80), "/", &[]).await.body, none.body);
    assert_eq!(mesh.scheduler.0.lock().len(), 0);
    let answer =
        get(&mesh, &name, "/echo", &[("x-oc-preview-token", TOKEN), ("authorization", "Basic eDp5")]).await;
    let seen = answer.json();
    assert_eq!(seen["headers"]["authorization"], "Basic eDp5");
    assert!(!seen.to_string().contains(TOKEN));
    let answer = get(&mesh, &name, "/echo", &[("authorization", &format!("Bearer {TOKEN}"))]).await;
    assert!(answer.status == 200 && !answer.json().to_string().contains(TOKEN));
}

#[tokio::test]
async fn a_hibernated_sandbox_wakes_for_a_request() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    assert_eq!(get(&mesh, &host(HIBERNATED, server.port), "/echo", &[]).await.status, 200);
    let calls = mesh.scheduler.0.lock();
    assert!(calls.iter().any(|call| call.0 == "WakeSandbox"), "{calls:?}");
}

#[tokio::test]
async fn what_cannot_be_reached_is_said_with_the_right_status() {
    let mesh = Mesh::start().await;
    let (closed, _held) = closed();
    for (name, code, reason) in [
        ("preview.localhost".to_owned(), 404, "PREVIEW_NOT_FOUND"),
        ("x.preview.localhost".to_owned(), 404, "PREVIEW_NOT_FOUND"),
        (host(SANDBOX, 0), 404, "PREVIEW_NOT_FOUND"),
        (host(SANDBOX, 65_536), 404, "PREVIEW_NOT_FOUND"),
        (host("sb-00000000000000000099", 80), 404, "SANDBOX_NOT_FOUND"),
        (host(DELETED, 80), 410, "SANDBOX_DELETED"),
        (host(FAILED, 80), 410, "SANDBOX_FAILED"),
        (host(CREATING, 80), 503, "SANDBOX_NOT_READY"),
        (host(SANDBOX, closed), 502, "PORT_NOT_LISTENING"),
    ] {
        let answer = get(&mesh, &name, "/healthz", &[]).await;
        assert_eq!(answer.error(), (code, reason.to_owned()), "{name}");
        assert!(answer.headers.contains_key("x-request-id"));
        let page = get(&mesh, &name, "/", &[("accept", "text/html,*/*")]).await;
        assert_eq!(
            (page.status.as_u16(), &page.headers["content-type"]),
            (code, &"text/html; charset=utf-8".parse().unwrap())
        );
        let (page, id) = (
            String::from_utf8(page.body.to_vec()).unwrap(),
            page.headers["x-request-id"].to_str().unwrap().to_owned(),
        );
        assert!(page.contains(reason) && page.contains(&id), "{page}");
    }
    // The API is where it was.
    assert_eq!(get(&mesh, "localhost", "/healthz", &[]).await.status, 200);
}

#[tokio::test]
async fn what_two_parsers_could_read_in_two_ways_never_reaches_a_port() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let name = host(SANDBOX, server.port);
    for (what, text) in [
        ("absolute", format!("GET http://{name}/ HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")),
        (
            "absolute elsewhere",
            format!("GET http://other/ HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n"),
        ),
        ("authority", format!("CONNECT {name}:80 HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")),
        (
            "two hosts",
            format!("GET / HTTP/1.1\r\nHost: localhost\r\nHost: {name}\r\nConnection: close\r\n\r\n"),
        ),
        ("asterisk", format!("OPTIONS * HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")),
    ] {
        let answer = raw(&mesh, &text).await;
        let code = answer.split(' ').nth(1).unwrap_or_default();
        assert_eq!(code, "400", "{what}: {answer}");
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn ports_that_misbehave_are_told_and_none_hangs() {
    for mesh in both_ways(|settings| settings.previews.answer = Duration::from_millis(300)).await {
        let server = Server::start().await;
        let late = get(&mesh, &host(SANDBOX, server.port), "/never", &[]).await;
        assert_eq!(late.error(), (504, "DEADLINE_EXCEEDED".into()));
    }
    // None of these is told by its time.
    for mesh in both_ways(|settings| settings.previews.answer = PATIENCE).await {
        for (bytes, reason) in [
            (&b""[..], "PORT_RESET"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "PORT_RESET"),
            (b"HTTP/1.1 200 OK\r\nContent-Le", "PORT_RESET"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "PORT_RESET"),
            (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "PORT_RESET"),
        ] {
            let (port, _tasks) = says(bytes).await;
            let answer = get(&mesh, &host(SANDBOX, port), "/", &[]).await;
            assert_eq!(answer.error(), (502, reason.into()), "{}", String::from_utf8_lossy(bytes));
        }
        // One that breaks amid its answer must not look whole.
        for bytes in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha",
        ] {
            let (port, _tasks) = says(bytes).await;
            let asked = request(&mesh, false, &host(SANDBOX, port), "/", &[], Body::empty());
            // It may break before its head is on the way.
            if let Ok(response) = client(false).request(asked).await {
                assert!(response.into_body().collect().await.is_err());
            }
        }
        // One of HTTP/1.0 ends its answer by its end.
        let (port, _tasks) = says(b"HTTP/1.0 200 OK\r\n\r\nwhole").await;
        assert_eq!(get(&mesh, &host(SANDBOX, port), "/", &[]).await.body, "whole");
    }
}

#[tokio::test]
async fn connections_that_a_port_has_ended_are_replaced() {
    for mesh in both_ways(|_| ()).await {
        let server = Server::start().await;
        let name = host(SANDBOX, server.port);
        for _ in 0..5 {
            assert_eq!(get(&mesh, &name, "/once", &[]).await.status, 200);
            assert_eq!(get(&mesh, &name, "/echo", &[]).await.status, 200);
        }
    }
}

#[tokio::test]
async fn one_sandbox_takes_no_more_than_its_places() {
    let limits = |settings: &mut Settings| {
        settings.previews.per_sandbox = 2;
        settings.previews.place = Duration::from_millis(200);
    };
    let mesh = Mesh::with(Limits::default(), limits).await;
    let server = Server::start().await;
    let name = host(SANDBOX, server.port);
    let mut held = Vec::new();
    for _ in 0..2 {
        let asked = request(&mesh, false, &name, "/events", &[], Body::empty());
        held.push(client(false).request(asked).await.unwrap());
    }
    assert_eq!(get(&mesh, &name, "/echo", &[]).await.error(), (503, "OVERLOADED".into()));
    assert_eq!(get(&mesh, &host(FOREIGN, server.port), "/echo", &[]).await.status, 200);
    drop(held);
    let freed = async { while get(&mesh, &name, "/echo", &[]).await.status != 200 {} };
    tokio::time::timeout(PATIENCE, freed).await.unwrap();
}

#[tokio::test]
async fn a_preview_may_have_a_host_name_of_its_own() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let entry = PreviewEntry { port: server.port.into(), domain: "app.example".into(), ..Default::default() };
    let record = SandboxRecord {
        previews: vec![entry],
        ..sandbox_record(SANDBOX, "ours", SandboxState::Running, "host-a")
    };
    put(&mesh.store, &keys::sandbox(SANDBOX), &record).await;
    for domain in ["app.example", "stale.example"] {
        let claim = PreviewDomain { sandbox_id: SANDBOX.into(), claimed_at: None };
        put(&mesh.store, &keys::preview_domain(domain), &claim).await;
    }
    let there = async { while get(&mesh, "app.example", "/echo", &[]).await.status != 200 {} };
    tokio::time::timeout(PATIENCE, there).await.unwrap();
    // A claim alone leads nowhere; before its copy is there the name is none of ours.
    let stale = async {
        loop {
            match get(&mesh, "stale.example", "/echo", &[]).await.error() {
                (404, reason) if reason == "ROUTE_NOT_FOUND" => {}
                other => return other,
            }
        }
    };
    let stale = tokio::time::timeout(PATIENCE, stale).await.unwrap();
    assert_eq!(stale, (404, "PREVIEW_NOT_FOUND".into()));

    let path = format!("/api/sandboxes/{SANDBOX}/preview");
    let made = mesh.call(Method::POST, &path, r#"{"port": 8080, "authConfig": {}}"#).await;
    assert_eq!((made.status.as_u16(), &made.json()["hostname"]), (201, &host(SANDBOX, 8080).into()));
    assert_eq!(mesh.call(Method::POST, &path, r#"{"port": 80}"#).await.status, 200);
}
