use std::time::Duration;

use http::{Method, Request};
use http_body_util::BodyExt as _;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use oc_gateway::listener::Limits;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::body::Body;

use crate::{
    client::client,
    http2::Http2,
    mesh::{Mesh, SANDBOX},
    ports::Server,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Sends raw bytes and reads until the gateway closes the connection.
async fn raw(mesh: &Mesh, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(mesh.address).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("still open");
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
    timeout(PATIENCE, not_ready).await.unwrap();
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

/// A client of HTTP/2 that takes so many bytes of each answer before it reads them.
async fn narrow(mesh: &Mesh, window: u32) -> (SendRequest<Body>, JoinSet<hyper::Result<()>>) {
    let stream = TcpStream::connect(mesh.address).await.unwrap();
    let mut http2 = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    http2.initial_stream_window_size(window);
    let (sender, connection) = http2.handshake(TokioIo::new(stream)).await.unwrap();
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    (sender, driver)
}

/// What is asked of a port.
fn of_port(server: &Server, path: &str) -> Request<Body> {
    let url = format!("http://{SANDBOX}-p{}.preview.localhost/{path}", server.port);
    Request::get(url).body(Body::empty()).unwrap()
}

#[tokio::test]
async fn what_nobody_takes_keeps_nobody_from_being_answered() {
    let mesh = Mesh::with_limits(Limits::default(), 2).await;
    // Answers have room for their heads alone.
    let (mut sender, _driver) = narrow(&mesh, 0).await;
    let mut answers = Vec::new();
    for _ in 0..6 {
        let request = Request::get(format!("http://{}/nothing", mesh.address)).body(Body::empty()).unwrap();
        let answer = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
        assert_eq!(answer.status(), 404);
        answers.push(answer);
    }
}

#[tokio::test]
async fn an_answer_of_http2_that_nobody_takes_is_ended_and_gives_its_place_back() {
    let limits = Limits { untaken: Duration::from_millis(500), ..Limits::default() };
    let (mesh, server) = (Mesh::with_limits(limits, 1).await, Server::start().await);
    // Of which nothing is taken; whose port has more; whose port has said everything.
    for (window, size) in [(0, 10), (1000, 8 << 20), (50_000, 80_000)] {
        let (mut sender, _driver) = narrow(&mesh, window).await;
        let asked = sender.send_request(of_port(&server, &format!("big/{size}")));
        let answer = timeout(PATIENCE, asked).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        let given_back = async { while mesh.call(Method::GET, "/api/sandboxes", "").await.status != 200 {} };
        timeout(PATIENCE, given_back).await.expect("its place is not given back");
        let rest = timeout(PATIENCE, answer.into_body().collect()).await.expect("it goes on");
        assert!(rest.is_err(), "{window}: it looks whole");
        // What else is asked by the connection is answered.
        let asked = Request::get("http://localhost/healthz").body(Body::empty()).unwrap();
        let other = timeout(PATIENCE, sender.send_request(asked)).await.unwrap().unwrap();
        assert_eq!(other.status(), 200);
    }
}

#[tokio::test]
async fn who_takes_little_or_has_nothing_to_take_is_waited_for() {
    // What is not left to h2 of it is taken in five steps or more.
    const SIZE: usize = 40_000;
    let untaken = Duration::from_secs(4);
    let mesh = Mesh::with_limits(Limits { untaken, ..Limits::default() }, 4096).await;
    let (server, begun) = (Server::start().await, Instant::now());
    let (mut sender, _driver) = narrow(&mesh, 5000).await;
    let events = sender.send_request(of_port(&server, "events")).await.unwrap();
    let slow = sender.send_request(of_port(&server, &format!("big/{SIZE}"))).await.unwrap();
    let taken = async {
        let (mut body, mut taken) = (slow.into_body(), 0);
        while let Some(frame) = body.frame().await {
            taken += frame.expect("it is ended").into_data().unwrap().len();
            sleep(untaken / 4).await;
        }
        taken
    };
    assert_eq!(timeout(4 * PATIENCE, taken).await.unwrap(), SIZE);
    assert!(begun.elapsed() > untaken);
    server.say.notify_one();
    let event = timeout(PATIENCE, events.into_body().frame()).await.unwrap().expect("it is ended");
    assert_eq!(event.unwrap().into_data().unwrap(), "data: 0\n\n");
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
    let answer = timeout(PATIENCE, client.sender.send_request(large)).await.unwrap().unwrap();
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
    let refused = timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(refused.error(), (503, "OVERLOADED".to_owned()));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(mesh.send(Method::GET, "/readyz", &[], "").await.status, 200);
    first.abort();
    let again = async { while mesh.call(Method::GET, "/api/sandboxes", "").await.status != 200 {} };
    timeout(PATIENCE, again).await.expect("the place of a caller that went away is not given back");
}

#[tokio::test]
async fn requests_under_way_end_before_the_gateway_does() {
    let mut mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{SANDBOX}/files?path=/zeros/{}", 20 << 20);
    let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
    let response = client(false).request(request).await.unwrap();
    let _ = TcpStream::connect(mesh.address).await.unwrap();
    mesh.stop.cancel();
    // The fakes stop with the gateway, but not before the calls that they are answering end.
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), 20 << 20);
    let ended = async { while mesh.tasks.join_next().await.is_some() {} };
    timeout(PATIENCE, ended).await.expect("the gateway does not end");
    assert!(TcpStream::connect(mesh.address).await.is_err());
}
