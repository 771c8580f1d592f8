//! The binary itself.

use std::{io::ErrorKind, process::Stdio, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::Method;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_mesh::{keys, record};
use oc_proto::mesh::GatewayRecord;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinHandle,
};
use tonic::body::Body;

use crate::{
    client::client,
    mesh::{Mesh, SANDBOX},
};

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Gateway {
    process: Child,
    /// Read all the time: a process whose log nobody reads stands still when the pipe is full.
    log: JoinHandle<Vec<String>>,
}

impl Gateway {
    /// Starts the binary beside the mesh's own gateway, and sends the mesh's requests there.
    pub async fn start(mesh: &mut Mesh) -> Self {
        let store = format!("file://{}", mesh.directory.path().join("store.db").display());
        let mut process = Command::new(env!("CARGO_BIN_EXE_oc-gateway"))
            .args(["--store", &store, "--listen", "127.0.0.1:0", "--id", "edge-1"])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let ready = loop {
            let line = tokio::time::timeout(PATIENCE, log.next_line()).await.unwrap().unwrap().unwrap();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "ready" {
                break line;
            }
        };
        mesh.address = ready["address"].as_str().unwrap().parse().unwrap();
        let log = tokio::spawn(async move {
            let mut lines = Vec::new();
            while let Some(line) = log.next_line().await.unwrap() {
                lines.push(line);
            }
            lines
        });
        Self { process, log }
    }

    /// Peak of the resident memory, MiB.
    pub fn peak_mib(&self) -> u64 {
        self.memory_kib("VmHWM:") >> 10
    }

    /// Resident memory, KiB.
    pub fn resident_kib(&self) -> u64 {
        self.memory_kib("VmRSS:")
    }

    fn memory_kib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id().unwrap())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Stops it as an operator does; what it logged.
    pub async fn stop(mut self) -> Vec<String> {
        kill(Pid::from_raw(self.process.id().unwrap() as i32), Signal::SIGTERM).unwrap();
        let status =
            tokio::time::timeout(PATIENCE, self.process.wait()).await.expect("it does not end").unwrap();
        assert_eq!(status.code(), Some(0));
        self.log.await.unwrap()
    }
}

#[tokio::test]
async fn it_registers_says_where_it_listens_and_leaves() {
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    let member = || async {
        record::get::<GatewayRecord>(&*mesh.store, &keys::gateway("edge-1"))
            .await
            .unwrap()
            .map(|(record, _)| record)
    };
    assert_eq!(member().await.unwrap().public_url, format!("http://{}", mesh.address));
    assert_eq!(mesh.send(Method::GET, "/readyz", &[], "").await.status, 200);
    gateway.stop().await;
    assert_eq!(member().await, None);
}

#[tokio::test]
async fn what_the_end_of_its_drain_breaks_off_is_reset_and_logged() {
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = TcpStream::connect(mesh.address).await.unwrap();
    let request = format!("GET /never HTTP/1.1\r\nHost: {SANDBOX}-p{port}.preview.localhost\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_buf(&mut head).await.unwrap();
    }
    let log = gateway.stop().await;
    // A process that had just ended would have closed it, as if that had been all.
    let ended = socket.read(&mut [0; 16]).await.map_err(|error| error.kind());
    assert_eq!(ended, Err(ErrorKind::ConnectionReset));
    let lines = log.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let requests: Vec<_> = lines.filter(|line| line["route"] == "preview").collect();
    let [line] = requests.as_slice() else { panic!("{log:?}") };
    assert_eq!((&line["status"], &line["complete"]), (&499.into(), &false.into()), "{line}");
}

#[tokio::test]
async fn one_line_is_logged_for_each_request_and_no_secret_in_it() {
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    let token = mesh.token(SANDBOX);
    let path = format!("/sandboxes/{SANDBOX}/files/stat?path=/private-name&token={token}");
    assert_eq!(mesh.send(Method::GET, &path, &[("x-request-id", "r-1")], "").await.status, 200);
    let path = format!("/api/sandboxes?api_key={}", mesh.key);
    assert_eq!(mesh.send(Method::GET, &path, &[("x-request-id", "r-2")], "").await.status, 200);
    mesh.call(Method::POST, &format!("/api/unknown/{token}"), "").await;
    let metrics = mesh.send(Method::GET, "/metrics", &[], "").await;
    let log = gateway.stop().await;
    let requests: Vec<serde_json::Value> = log
        .iter()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line["message"] == "request")
        .collect();
    assert_eq!(requests.len(), 3, "{log:#?}");
    assert_eq!(requests[0]["request_id"], "r-1");
    assert_eq!(requests[0]["route"], "/sandboxes/{sandbox_id}/files/stat");
    assert_eq!((&requests[0]["tenant"], &requests[0]["sandbox"]), (&"ours".into(), &SANDBOX.into()));
    assert_eq!((&requests[1]["status"], &requests[1]["method"]), (&200.into(), &"GET".into()));
    let log = log.join("\n");
    for secret in [token.as_str(), mesh.key.as_str(), "private-name"] {
        assert!(!log.contains(secret), "{log}");
    }
    let metrics = String::from_utf8(metrics.body.to_vec()).unwrap();
    assert!(metrics.contains("oc_gateway_requests_total"), "{metrics}");
    for secret in [token.as_str(), mesh.key.as_str(), SANDBOX, "ours"] {
        assert!(!metrics.contains(secret), "{metrics}");
    }
}

#[tokio::test]
async fn large_files_pass_through_little_memory() {
    const SIZE: usize = 100 << 20;
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    let piece = Bytes::from(vec![1; 1 << 20]);
    for http2 in [false, true] {
        let started = tokio::time::Instant::now();
        let frames = (0..SIZE / piece.len()).map({
            let piece = piece.clone();
            move |_| Ok::<_, tonic::Status>(Frame::data(piece.clone()))
        });
        let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
        let path = format!("/api/sandboxes/{SANDBOX}/files?path=/up");
        let request = mesh.request(Method::PUT, &path, &[("x-api-key", &mesh.key)], body);
        assert_eq!(client(http2).request(request).await.unwrap().status(), 204);
        let up = started.elapsed();

        let started = tokio::time::Instant::now();
        let path = format!("/api/sandboxes/{SANDBOX}/files?path=/zeros/{SIZE}");
        let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
        let mut body = client(http2).request(request).await.unwrap().into_body().into_data_stream();
        let mut read = 0;
        while let Some(data) = body.next().await {
            read += data.unwrap().len();
        }
        assert_eq!(read, SIZE);
        let down = started.elapsed();
        println!("http2: {http2}: up {up:?}, down {down:?}, peak {} MiB", gateway.peak_mib());
    }
    assert!(gateway.peak_mib() < 64, "{} MiB", gateway.peak_mib());
    gateway.stop().await;
}

#[tokio::test]
async fn long_answers_pass_through_little_memory() {
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    let list = format!("/api/sandboxes/{SANDBOX}/files/list?path=/many");
    assert!(mesh.call(Method::GET, &list, "").await.body.len() > 10 << 20);
    for _ in 0..5 {
        assert_eq!(mesh.run(serde_json::json!({"cmd": "much"})).await.status, 200);
    }
    assert!(gateway.peak_mib() < 64, "{} MiB", gateway.peak_mib());
    gateway.stop().await;
}

#[tokio::test]
async fn what_strangers_make_up_is_not_counted() {
    let mut mesh = Mesh::start().await;
    let gateway = Gateway::start(&mut mesh).await;
    for index in 0..20 {
        let method = Method::from_bytes(format!("MADEUP{index}").as_bytes()).unwrap();
        mesh.send(method, &format!("/made-up-{index}"), &[], "").await;
        let headers = [("content-type", "application/grpc"), ("te", "trailers")];
        let path = format!("/grpc.health.v1.Health/MadeUp{index}");
        let request = mesh.request(Method::POST, &path, &headers, Body::empty());
        client(true).request(request).await.unwrap();
    }
    let metrics = String::from_utf8(mesh.send(Method::GET, "/metrics", &[], "").await.body.to_vec()).unwrap();
    assert!(metrics.contains("oc_gateway_requests_total"), "{metrics}");
    assert!(!metrics.to_lowercase().contains("madeup") && !metrics.contains("made-up"), "{metrics}");
    gateway.stop().await;
}
