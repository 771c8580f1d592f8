//! What is no request, or cannot be passed on: each is answered with the right status, logged with the request ID that the answer
//! has, and none hangs.

use std::{collections::HashMap, time::Duration};

use http::Method;
use oc_gateway::listener::{Limits, head::MAX_FIELDS};
use oc_mesh::keys;
use oc_proto::{mesh::SandboxRecord, v1::SandboxState};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    mesh::{DELETED, Mesh, SANDBOX, UNWAKABLE, put, sandbox_record},
    ports::{Server, closed, says},
    process::Gateway,
    websocket::PATIENCE,
};

/// All answers to these bytes, until the gateway ends the connection.
async fn raw(mesh: &Mesh, bytes: impl AsRef<[u8]>) -> String {
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    let mut answers = Vec::new();
    let talk = async {
        let (mut read, mut write) = stream.split();
        // Who is refused amid what it sends sees the answer, and no reset.
        let (_, ended) = tokio::join!(write.write_all(bytes.as_ref()), read.read_to_end(&mut answers));
        ended.unwrap();
    };
    tokio::time::timeout(PATIENCE, talk).await.expect("it hangs");
    String::from_utf8(answers).unwrap()
}

/// A mesh whose gateway waits for those that are still sending, however slow this machine is.
async fn patient() -> Mesh {
    Mesh::with(Limits::default(), |settings| settings.linger = PATIENCE).await
}

/// Status, code and request ID of an answer.
fn read(answer: &str) -> (u16, String, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let id = head.lines().find_map(|line| line.strip_prefix("x-request-id: ")).expect(head);
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    (status, body["code"].as_str().unwrap_or_default().to_owned(), id.to_owned())
}

fn preview(sandbox: &str, port: impl std::fmt::Display) -> String {
    format!("{sandbox}-p{port}.preview.localhost")
}

/// Heads that are refused, by their fields, and what they are answered.
fn heads() -> Vec<(&'static str, String, u16, &'static str)> {
    let (length, chunked) = ("Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n");
    let fields = |what, fields: String| (what, fields, 400, "INVALID_ARGUMENT");
    vec![
        fields("a length, chunked", format!("{length}{chunked}")),
        fields("chunked, a length", format!("{chunked}{length}")),
        fields("two lengths", format!("{length}Content-Length: 6\r\n")),
        fields("a list of lengths", "Content-Length: 5, 5\r\n".into()),
        fields("a length below nothing", "Content-Length: -1\r\n".into()),
        fields("chunked twice", format!("{chunked}{chunked}")),
        fields("chunked and more", "Transfer-Encoding: chunked, identity\r\n".into()),
        fields("no chunks", "Transfer-Encoding: gzip\r\n".into()),
        fields("nothing", "Transfer-Encoding:\r\n".into()),
        fields("a space in a name", "Content-Length : 5\r\n".into()),
        fields("a folded line", "X: a\r\n b\r\n".into()),
        fields("a NUL", "X: a\0b\r\n".into()),
        ("many fields", "x: y\r\n".repeat(200), 431, "HEAD_TOO_LARGE"),
        ("a large field", format!("x: {}\r\n", "y".repeat(2 << 20)), 431, "HEAD_TOO_LARGE"),
    ]
}

#[tokio::test]
async fn nothing_of_a_request_with_two_lengths_reaches_anybody() {
    let (mesh, server) = (patient().await, Server::start().await);
    for host in ["localhost", &preview(SANDBOX, server.port)] {
        for (what, fields, status, code) in heads() {
            let text = format!(
                "POST /api/sandboxes HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {}\r\n{fields}\r\n5\r\nhello\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
                mesh.key
            );
            let answer = raw(&mesh, text).await;
            let (refused, reason, _) = read(&answer);
            assert_eq!((refused, reason.as_str()), (status, code), "{host}: {what}: {answer}");
            assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        }
    }
    assert_eq!((server.connections(), mesh.scheduler.0.lock().len()), (0, 0));
}

#[tokio::test]
async fn a_refusal_comes_in_its_turn_and_is_the_last() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let name = preview(SANDBOX, server.port);
    let post = format!("POST /echo HTTP/1.1\r\nHost: {name}\r\n");
    let chunked = format!("{post}Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n");
    let sized = format!("{post}Content-Length: 4\r\n\r\n0\r\n\r");
    let upgrade =
        format!("GET /echo HTTP/1.1\r\nHost: {name}\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n");
    let bad = "HEAD / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n";
    let text = [chunked.as_str(), &sized, &upgrade, &chunked, bad, &sized].concat();
    let answers = raw(&mesh, text).await;
    let bodies: Vec<_> = answers.split("HTTP/1.1 ").skip(1).collect();
    let statuses: Vec<_> = bodies.iter().map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "200", "200", "200", "400"], "{answers}");
    for (answer, bytes) in bodies.iter().zip([3, 4, 0, 3]) {
        assert!(answer.contains(&format!("\"bytes\":{bytes}")), "{answer}");
    }
    // An answer to HEAD has no body.
    assert!(bodies[4].ends_with("\r\n\r\n"), "{answers}");
}

#[tokio::test]
async fn a_page_is_shown_to_who_reads() {
    let mesh = patient().await;
    for (what, wrong, status, _) in heads() {
        let ask = |host: &str| {
            let fields = format!("Accept: text/html\r\nX-Request-ID: r-9\r\n{wrong}");
            raw(&mesh, format!("GET / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"))
        };
        let answer = ask(&preview(SANDBOX, 80)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {answer}");
        assert!(answer.contains("text/html") && answer.contains("request r-9"), "{what}: {answer}");
        let (status_there, _, id) = read(&ask("localhost").await);
        assert_eq!((status_there, id.as_str()), (status, "r-9"), "{what}");
    }
}

#[tokio::test]
async fn as_many_fields_are_taken_as_the_limit_says() {
    let mesh = Mesh::start().await;
    // With those that every request has.
    for (more, expected) in [(MAX_FIELDS - 2, "200"), (MAX_FIELDS - 1, "431")] {
        let fields = "x: y\r\n".repeat(more);
        let head = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}\r\n");
        let answer = raw(&mesh, head).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected} ")), "{more}: {answer}");
    }
}

#[tokio::test]
async fn a_request_of_http10_needs_no_host() {
    let mesh = Mesh::start().await;
    let answer = raw(&mesh, "GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(answer.split(' ').nth(1) == Some("200") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
}

#[tokio::test]
async fn what_two_parsers_could_split_in_two_ways_reaches_nobody() {
    let (mesh, server) = (patient().await, Server::start().await);
    let name = preview(SANDBOX, server.port);
    for head in [
        format!("GET /echo HTTP/1.1\nHost: {name}\n\n"),
        format!("GET /echo HTTP/1.1\r\nHost: {name}\nX: y\r\n\r\n"),
        format!("POST /echo HTTP/1.1\r\nHost: {name}\r\nX: y\nContent-Length: 40\r\n\r\n"),
        format!("GET /echo HTTP/1.1\r\nHost: {name}\r\n\n"),
        format!("\nGET /echo HTTP/1.1\r\nHost: {name}\r\n\r\n"),
    ] {
        let answer = raw(&mesh, format!("{head}GET /echo HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
        let (status, code, _) = read(&answer);
        assert_eq!((status, code.as_str()), (400, "INVALID_ARGUMENT"), "{head:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{head:?}: {answer}");
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn http2_that_breaks_its_rules_is_logged_with_its_peer() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    for wrong in [
        // Data of no stream, a ping that is too short, and what is no frame.
        &b"\0\0\x01\0\0\0\0\0\0x"[..],
        b"\0\0\x01\x06\0\0\0\0\0x",
        &b"x".repeat(64),
    ] {
        let mut stream = TcpStream::connect(mesh.address).await.unwrap();
        stream.write_all(&[PREFACE, SETTINGS, wrong].concat()).await.unwrap();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("it hangs");
    }
    // Who goes as anybody may is not told of.
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    stream.write_all(&[PREFACE, SETTINGS].concat()).await.unwrap();
    drop(stream);
    let log = gateway.stop().await;
    let lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let given_up: Vec<_> = lines.filter(|line| line["fault"].is_string()).collect();
    assert_eq!(given_up.len(), 3, "{log:#?}");
    assert!(
        given_up.iter().all(|line| line["peer"] == "127.0.0.1" && line["level"] == "INFO"),
        "{given_up:?}"
    );
}

#[tokio::test]
async fn a_head_that_stops_is_answered() {
    let limits = Limits { header_timeout: Duration::from_millis(300), ..Limits::default() };
    let mesh = Mesh::with_limits(limits, 4096).await;
    for start in ["GET / HTTP/1.1\r\nHost: x", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /"] {
        let answers = raw(&mesh, start).await;
        let last = answers.rsplit_once("HTTP/1.1 ").unwrap().1;
        assert!(last.starts_with("408 ") && last.contains("REQUEST_TIMEOUT"), "{answers}");
    }
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(read(&answer).0, 400);
}

#[tokio::test]
async fn a_body_that_is_malformed_or_stops_is_no_request_either() {
    let (mesh, server) = (Mesh::start().await, Server::start().await);
    let name = preview(SANDBOX, server.port);
    for body in ["5;x\r\nabcdeX0\r\n\r\n", "zz\r\n", "5\nabcde\r\n0\r\n\r\n", "fffffffffffffffff\r\n"] {
        for head in [
            format!("POST /echo HTTP/1.1\r\nHost: {name}\r\n"),
            format!(
                "PUT /api/sandboxes/{SANDBOX}/files?path=/x HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\n",
                mesh.key
            ),
            format!("POST /api/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\n", mesh.key),
        ] {
            let answer = raw(&mesh, format!("{head}Transfer-Encoding: chunked\r\n\r\n{body}")).await;
            let (status, code, _) = read(&answer);
            assert_eq!((status, code.as_str()), (400, "INVALID_ARGUMENT"), "{head}{body}: {answer}");
        }
    }
    assert_eq!(mesh.scheduler.0.lock().len(), 0);
}

#[tokio::test]
async fn everything_that_is_refused_is_logged_with_its_id() {
    let (mut mesh, server) = (Mesh::start().await, Server::start().await);
    let hash = hex::encode(Sha256::digest("0123456789abcdef"));
    let locked = "sb-00000000000000000042";
    let record = SandboxRecord {
        preview_token_hash: hash,
        ..sandbox_record(locked, "ours", SandboxState::Running, "host-a")
    };
    put(&mesh.store, &keys::sandbox(locked), &record).await;
    let gateway = Gateway::start(&mut mesh).await;
    let (broken, _tasks) = says(b"HTTP/1.1 200 OK\r\nContent-Le").await;
    let (closed, _held) = closed();
    let name = preview(SANDBOX, server.port);
    let get = |target: &str, host: &str| {
        format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    };
    let mut cases: Vec<(String, String, u16, &str)> = heads()
        .into_iter()
        .flat_map(|(what, fields, status, code)| {
            ["localhost", &name].map(|host| {
                let text = format!("POST / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n");
                (format!("{what} to {host}"), text, status, code)
            })
        })
        .collect();
    let mut case = |what: &str, text: String, status, code| cases.push((what.into(), text, status, code));
    case("no HTTP", "SSH-2.0-OpenSSH_9.2\r\n".into(), 400, "INVALID_ARGUMENT");
    case("TLS", "\x16\x03\x01\x02\0\x01\0".into(), 400, "INVALID_ARGUMENT");
    case("another version", get("/", &name).replace("HTTP/1.1", "HTTP/2.7"), 400, "INVALID_ARGUMENT");
    case("no target", get("http://[::1/", &name), 400, "INVALID_ARGUMENT");
    case("a long target", get(&format!("/{}", "x".repeat(70_000)), &name), 414, "TARGET_TOO_LONG");
    case("absolute", get(&format!("http://{name}/"), &name), 400, "INVALID_ARGUMENT");
    case("absolute, of another", get("http://other/", &name), 400, "INVALID_ARGUMENT");
    case("asterisk", get("*", &name).replace("GET", "OPTIONS"), 400, "INVALID_ARGUMENT");
    case("authority", get(&format!("{name}:80"), &name).replace("GET", "CONNECT"), 400, "INVALID_ARGUMENT");
    case("authority, no preview", get("x:80", "localhost").replace("GET", "CONNECT"), 404, "ROUTE_NOT_FOUND");
    case("two hosts", get("/", &format!("localhost\r\nHost: {name}")), 400, "INVALID_ARGUMENT");
    case("two hosts, no preview", get("/healthz", "localhost\r\nHost: x"), 400, "INVALID_ARGUMENT");
    case("no host", get("/healthz", "x").replace("Host: x\r\n", ""), 400, "INVALID_ARGUMENT");
    case("lines that end with LF", get("/", &name).replace('\r', ""), 400, "INVALID_ARGUMENT");
    case("a line that ends with LF", get("/healthz", "localhost\nX: y"), 400, "INVALID_ARGUMENT");
    let chunked = format!("POST /echo HTTP/1.1\r\nHost: {name}\r\nTransfer-Encoding: chunked\r\n\r\n");
    case("chunks that are none", format!("{chunked}5\r\nabcdeX"), 400, "INVALID_ARGUMENT");
    case("no port's name", get("/", "x.preview.localhost"), 404, "PREVIEW_NOT_FOUND");
    case("port 0", get("/", &preview(SANDBOX, 0)), 404, "PREVIEW_NOT_FOUND");
    case("port 65536", get("/", &preview(SANDBOX, 65_536)), 404, "PREVIEW_NOT_FOUND");
    case("nobody's", get("/", &preview("sb-00000000000000000099", 80)), 404, "SANDBOX_NOT_FOUND");
    case("deleted", get("/", &preview(DELETED, 80)), 410, "SANDBOX_DELETED");
    case("no token", get("/", &preview(locked, 80)), 401, "UNAUTHENTICATED");
    let wrong = format!("{}\r\nX-OC-Preview-Token: 0123456789abcdeg", preview(locked, 80));
    case("a wrong token", get("/", &wrong), 401, "UNAUTHENTICATED");
    case("nobody listens", get("/", &preview(SANDBOX, closed)), 502, "PORT_NOT_LISTENING");
    case("breaks off", get("/", &preview(SANDBOX, broken)), 502, "PORT_RESET");
    case("does not wake", get("/", &preview(UNWAKABLE, 80)), 503, "NO_CAPACITY");
    case("an unknown path", get("/nothing", "localhost"), 404, "ROUTE_NOT_FOUND");

    let mut expected = HashMap::new();
    for (what, text, status, code) in cases {
        let answer = raw(&mesh, text).await;
        let (refused, reason, id) = read(&answer);
        assert_eq!((refused, reason.as_str()), (status, code), "{what}: {answer}");
        assert!(expected.insert(id, (status, what)).is_none());
    }
    // One that is in order all the while.
    assert_eq!(mesh.send(Method::GET, "/healthz", &[], "").await.status, 200);
    let log = gateway.stop().await;
    let lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    for line in lines.filter(|line| line["message"] == "request") {
        let (status, what) = expected.remove(line["request_id"].as_str().unwrap()).expect("an ID of nobody");
        assert_eq!(line["status"], status, "{what}: {line}");
    }
    assert!(expected.is_empty(), "not logged: {expected:?}");
}
