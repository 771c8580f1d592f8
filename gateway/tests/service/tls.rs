//! All that the gateway speaks, by TLS.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, header::CONTENT_TYPE};
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use oc_gateway::{
    listener::{self, Limits, workers::Workers},
    tls::{Certificates, Files},
};
use oc_proto::v1::GetSandboxRequest;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};
use tonic::body::Body;

use crate::{
    client::collect,
    http2::Http2,
    mesh::{Mesh, SANDBOX},
    ports::Server,
    websocket::PATIENCE,
};

/// A mesh, and the same gateway by TLS.
struct Bed {
    mesh: Mesh,
    address: SocketAddr,
    certificates: Arc<Certificates>,
    roots: RootCertStore,
    default: CertificateDer<'static>,
    own: CertificateDer<'static>,
}

/// Writes a pair for these names.
fn write(directory: &Path, stem: &str, names: &[&str]) -> CertificateDer<'static> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    std::fs::write(directory.join(format!("{stem}.crt")), made.cert.pem()).unwrap();
    std::fs::write(directory.join(format!("{stem}.key")), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

impl Bed {
    async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let mut mesh = Mesh::start().await;
        let directory = mesh.directory.path().to_owned();
        let default = write(&directory, "server", &["localhost", "*.preview.localhost"]);
        std::fs::create_dir(directory.join("own")).unwrap();
        let own = write(&directory, "own/app.example", &["app.example"]);
        let files = Files {
            certificate: directory.join("server.crt"),
            key: directory.join("server.key"),
            directory: Some(directory.join("own")),
        };
        let certificates = Certificates::load(files).unwrap();
        let tls = certificates.server().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Arc::clone(&mesh.app);
        let stop = mesh.stop.clone();
        let workers = Workers::start().unwrap();
        mesh.tasks.spawn(listener::serve(listener, Some(tls), app, limits, workers, stop));
        let mut roots = RootCertStore::empty();
        for certificate in [&default, &own] {
            roots.add(certificate.clone()).unwrap();
        }
        Self { mesh, address, certificates, roots, default, own }
    }

    async fn connect(&self, name: &str, protocol: &str) -> TlsStream<TcpStream> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
        stream
    }
}

#[tokio::test]
async fn who_says_nothing_by_tls_is_hung_up_on() {
    let limits = Limits { header_timeout: Duration::from_millis(300), ..Limits::default() };
    let bed = Bed::with(limits).await;
    for (protocol, beginning) in [("h2", ""), ("h2", "PRI * HT"), ("http/1.1", ""), ("http/1.1", "GET /")] {
        let mut stream = bed.connect("localhost", protocol).await;
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "{protocol} goes on after {beginning:?}");
    }
}

#[tokio::test]
async fn who_asks_without_tls_is_told_of_it() {
    let bed = Bed::new().await;
    let upload = format!("POST /x HTTP/1.1\r\nContent-Length: {}\r\n\r\n{}", 1 << 20, "x".repeat(1 << 20));
    for asked in [
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "HEAD /healthz HTTP/1.0\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &upload,
    ] {
        let mut stream = TcpStream::connect(bed.address).await.unwrap();
        let mut answer = Vec::new();
        let talk = async {
            let (mut read, mut write) = stream.split();
            let (_, ended) = tokio::join!(write.write_all(asked.as_bytes()), read.read_to_end(&mut answer));
            ended.unwrap();
        };
        tokio::time::timeout(PATIENCE, talk).await.expect("it hangs");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 400 ") && head.contains("\r\nx-request-id: "),
            "{asked:.20}: {head}"
        );
        assert!(head.contains("\r\ncontent-type: text/plain"), "{asked:.20}: {head}");
        assert_eq!(body.contains("https://"), !asked.starts_with("HEAD"), "{asked:.20}: {answer}");
    }
    // What is neither gets no answer that it could take for one of its own.
    let mut stream = TcpStream::connect(bed.address).await.unwrap();
    stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it hangs");
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

#[tokio::test]
async fn rest_grpc_previews_and_websockets_work_by_tls() {
    let (bed, server) = (Bed::new().await, Server::start().await);
    let name = format!("{SANDBOX}-p{}.preview.localhost", server.port);

    // REST, by HTTP/1.1.
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(bed.connect("localhost", "http/1.1").await))
            .await
            .unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get(format!("/api/sandboxes/{SANDBOX}"))
        .header("host", "localhost")
        .header("x-api-key", &bed.mesh.key)
        .body(Body::empty());
    let answer = collect(sender.send_request(request.unwrap()).await.unwrap()).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["sandboxID"]), (200, &SANDBOX.into()));
    driver.abort();

    // A preview and gRPC, by HTTP/2.
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        TokioExecutor::new(),
        TokioIo::new(bed.connect(&name, "h2").await),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get(format!("https://{name}/echo")).body(Body::empty()).unwrap();
    let seen = collect(sender.send_request(request).await.unwrap()).await.json();
    assert_eq!(
        (&seen["headers"]["x-forwarded-proto"], &seen["headers"]["host"]),
        (&"https".into(), &name.clone().into())
    );
    let call = Request::post("https://localhost/oc.v1.SandboxService/GetSandbox")
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .header("x-api-key", &bed.mesh.key);
    let message = prost::Message::encode_to_vec(&GetSandboxRequest { sandbox_id: SANDBOX.into() });
    let mut framed = vec![0, 0, 0, 0, message.len() as u8];
    framed.extend(message);
    let body = Body::new(http_body_util::Full::new(bytes::Bytes::from(framed)));
    let answer = sender.send_request(call.body(body).unwrap()).await.unwrap();
    let trailers = answer.into_body().collect().await.unwrap();
    assert_eq!(trailers.trailers().unwrap()["grpc-status"], "0");
    driver.abort();

    // A WebSocket.
    let asked = format!("wss://{name}/ws").into_client_request().unwrap();
    let stream = bed.connect(&name, "http/1.1").await;
    let (mut socket, _) = tokio_tungstenite::client_async(asked, stream).await.unwrap();
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));
}

#[tokio::test]
async fn websockets_work_by_tls_and_http2() {
    let (bed, server) = (Bed::new().await, Server::start().await);
    let name = format!("{SANDBOX}-p{}.preview.localhost", server.port);
    let mut client = Http2::over(bed.connect(&name, "h2").await).await;
    let (mut socket, _) = client.connect("websocket", &format!("https://{name}/ws"), &[]).await.unwrap();
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));

    // A session of ours, on the same connection.
    bed.mesh.agent.0.sessions.start("e-1").say("hi");
    let url = format!("https://localhost/api/sandboxes/{SANDBOX}/exec/e-1");
    let protocols = format!("oc.raw, oc.bearer.{}", bed.mesh.key);
    let offered = [("sec-websocket-protocol", protocols.as_str())];
    let (mut session, answered) = client.connect("websocket", &url, &offered).await.unwrap();
    assert_eq!(answered["sec-websocket-protocol"], "oc.raw");
    assert_eq!(session.next().await.unwrap().unwrap(), Message::binary(&b"\x01hi"[..]));
    let refused = client.connect("websocket", &url, &[]).await.unwrap_err();
    assert_eq!(refused.error(), (401, "UNAUTHENTICATED".into()));
}

#[tokio::test]
async fn the_name_that_is_asked_for_chooses_the_certificate() {
    let bed = Bed::new().await;
    for (name, certificate) in
        [("localhost", &bed.default), ("x.preview.localhost", &bed.default), ("app.example", &bed.own)]
    {
        let stream = bed.connect(name, "http/1.1").await;
        assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], *certificate, "{name}");
    }
}

#[tokio::test]
async fn new_certificates_come_into_use_while_connections_go_on() {
    let mut bed = Bed::new().await;
    let (certificates, stop) = (Arc::clone(&bed.certificates), bed.mesh.stop.clone());
    bed.mesh.tasks.spawn(certificates.follow(stop));
    let mut before = Http2::over(bed.connect("localhost", "h2").await).await;
    assert_eq!(before.get("https://localhost/healthz").await.status, 200);

    let renewed = write(bed.mesh.directory.path(), "server", &["localhost"]);
    bed.roots.add(renewed.clone()).unwrap();
    let shown = async {
        let mut shown = bed.default.clone();
        while shown != renewed {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let stream = bed.connect("localhost", "http/1.1").await;
            shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
        }
    };
    tokio::time::timeout(PATIENCE, shown).await.expect("the old certificate is still shown");
    assert_eq!(before.get("https://localhost/healthz").await.status, 200);
    // Those of other names are what they were.
    let stream = bed.connect("app.example", "http/1.1").await;
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], bed.own);
}
