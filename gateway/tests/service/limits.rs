use std::time::Duration;

use http::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use oc_gateway::listener::Limits;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::body::Body;

use crate::{
    client::client,
    http2::Http2,
    mesh::{Mesh, SANDBOX},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Sends raw bytes and reads until the gateway closes the connection.
async fn raw(mesh: &Mesh, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("still open");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn probes_are_open() {
    let mesh = Mesh::start().await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(mesh.send(Method::GET, path, &[], "").await.status, 200, "{path}");
    }
    mesh.stop.cancel();
}

#[tokio::test]
async fn a_gateway_without_hosts_is_alive_but_not_ready() {
    let mesh = Mesh::start().await;
    let delete = oc_mesh::store::Op::Delete { key: oc_mesh::keys::host("host-a") };
    mesh.store.txn(oc_mesh::store::Txn { compare: vec![], then: vec![delete] }).await.unwrap();
    let not_ready = async {
        while mesh.send(Method::GET, "/readyz", &[], "").await.status != 503 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, not_ready).await.unwrap();
    assert_eq!(mesh.send(Method::GET, "/healthz", &[], "").await.status, 200);
}

#[tokio::test]
async fn slow_headers_end_the_connection() {
    let limits = Limits { header_timeout: Duration::from_millis(300), ..Limits::default() };
    let mesh = Mesh::with_limits(limits, 4096).await;
    for start in [
        &b""[..],
        b"P",
        b"PR",
        b"GET / HTTP/1.1\r\nX: ",
        b"PRI * HT",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    ] {
        raw(&mesh, start).await;
    }
}

#[tokio::test]
async fn what_nobody_takes_keeps_nobody_from_being_answered() {
    let mesh = Mesh::with_limits(Limits::default(), 2).await;
    let stream = TcpStream::connect(mesh.address).await.unwrap();
    let mut http2 = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    // Answers have room for their heads alone.
    http2.initial_stream_window_size(0);
    let (mut sender, connection) = http2.handshake(TokioIo::new(stream)).await.unwrap();
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(connection);
    let mut answers = Vec::new();
    for _ in 0..6 {
        let request = Request::get(format!("http://{}/nothing", mesh.address)).body(Body::empty()).unwrap();
        let answer = tokio::time::timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
        assert_eq!(answer.status(), 404);
        answers.push(answer);
    }
}

#[tokio::test]
async fn hostile_heads_are_refused() {
    let mesh = Mesh::start().await;
    let many = format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(500));
    let large = format!("GET /healthz HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "b".repeat(2 << 20));
    for head in [
        many.as_str(),
        large.as_str(),
        "NONSENSE\r\n\r\n",
        "GET /healthz HTTP/9.9\r\n\r\n",
        "POST /api/sandboxes HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let answer = raw(&mesh, head.as_bytes()).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
    assert_eq!(mesh.send(Method::GET, "/healthz", &[], "").await.status, 200, "others are not disturbed");
}

#[tokio::test]
async fn large_heads_of_http2_are_refused_alone() {
    let mesh = Mesh::start().await;
    let mut client = Http2::over(TcpStream::connect(mesh.address).await.unwrap()).await;
    let url = format!("http://{}/healthz", mesh.address);
    let large = Request::get(&url).header("x", "y".repeat(100 << 10)).body(Body::empty()).unwrap();
    let answer = tokio::time::timeout(PATIENCE, client.sender.send_request(large)).await.unwrap().unwrap();
    assert_eq!(answer.status(), 431);
    assert_eq!(client.get(&url).await.status, 200);
}

#[tokio::test]
async fn load_beyond_the_limit_is_shed_and_probes_are_not() {
    let mesh = Mesh::with_limits(Limits::default(), 1).await;
    let path = format!("/api/sandboxes/{SANDBOX}/exec/run");
    let body = json!({"cmd": "sleep", "args": ["3600"]}).to_string();
    let request = mesh.request(
        Method::POST,
        &path,
        &[("x-api-key", &mesh.key)],
        Body::new(http_body_util::Full::new(bytes::Bytes::from(body))),
    );
    let first = tokio::spawn(client(false).request(request));
    let refused = async {
        loop {
            let answer = mesh.call(Method::GET, "/api/sandboxes", "").await;
            if answer.status == 503 {
                break answer;
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(refused.error(), (503, "OVERLOADED".to_owned()));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(mesh.send(Method::GET, "/readyz", &[], "").await.status, 200);
    first.abort();
    let again = async { while mesh.call(Method::GET, "/api/sandboxes", "").await.status != 200 {} };
    tokio::time::timeout(PATIENCE, again)
        .await
        .expect("the place of a caller that went away is not given back");
}

#[tokio::test]
async fn requests_under_way_end_before_the_gateway_does() {
    let mut mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{SANDBOX}/files?path=/zeros/{}", 20 << 20);
    let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
    let response = client(false).request(request).await.unwrap();
    let _ = TcpStream::connect(mesh.address).await.unwrap();
    mesh.stop.cancel();
    use http_body_util::BodyExt as _;
    // The fakes stop with the gateway, but not before the calls that they are answering end.
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), 20 << 20);
    let ended = async { while mesh.tasks.join_next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, ended).await.expect("the gateway does not end");
    assert!(TcpStream::connect(mesh.address).await.is_err());
}
