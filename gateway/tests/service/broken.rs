//! Parts that die amid a call.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use oc_mesh::keys;
use oc_proto::{mesh::HostRecord, v1::SandboxState};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use crate::{
    client::client,
    mesh::{Mesh, put, sandbox_record},
};

/// How far a host comes before it dies.
#[derive(Clone, Copy, Debug)]
enum Until {
    /// It has read a request's headers.
    Headers,
    /// It has also begun its answer, with these bytes.
    Answer(&'static [u8]),
}

/// Serves one connection until its first call has come so far, and then closes the socket.
async fn die(stream: UnixStream, until: Until) {
    let dead = CancellationToken::new();
    let service = service_fn(|_: Request<Incoming>| {
        let dead = dead.clone();
        async move {
            let Until::Answer(begun) = until else {
                dead.cancel();
                return std::future::pending().await;
            };
            let body = async_stream::stream! {
                yield Ok::<_, Status>(Frame::data(Bytes::from_static(begun)));
                // Until what was sent is on its way.
                tokio::time::sleep(Duration::from_millis(100)).await;
                dead.cancel();
                std::future::pending::<()>().await;
            };
            let mut response = Response::new(Body::new(StreamBody::new(body)));
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            Ok::<_, Infallible>(response)
        }
    });
    let serving = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = serving => {}
        () = dead.cancelled() => {}
    }
}

impl Mesh {
    /// A sandbox on a host of its own that dies with every call.
    async fn on_a_dying_host(&mut self, name: &str, until: Until) -> String {
        let path = self.directory.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        self.tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(die(stream, until));
            }
        });
        let endpoint = format!("unix://{}", path.display());
        let host = HostRecord { host_id: name.into(), endpoint, ..Default::default() };
        put(&self.store, &keys::host(name), &host).await;
        let id = format!("sb-{name:0>20}");
        put(&self.store, &keys::sandbox(&id), &sandbox_record(&id, "ours", SandboxState::Running, name))
            .await;
        format!("/api/sandboxes/{id}")
    }
}

#[tokio::test]
async fn a_host_that_dies_amid_a_call_is_unavailable() {
    let mut mesh = Mesh::start().await;
    for (name, until) in [
        ("headers", Until::Headers),
        ("nothing", Until::Answer(b"")),
        ("part", Until::Answer(b"\0\0\0\0\x09")),
    ] {
        let sandbox = mesh.on_a_dying_host(name, until).await;
        for (method, path, body) in [
            (Method::POST, "exec/run", r#"{"cmd": "echo"}"#),
            (Method::GET, "files?path=/x", ""),
            (Method::PUT, "files?path=/x", "bytes"),
        ] {
            let answer = mesh.call(method.clone(), &format!("{sandbox}/{path}"), body).await;
            assert_eq!(answer.error(), (503, "HOST_UNAVAILABLE".to_owned()), "{method} {path} {name}");
            assert!(answer.headers.contains_key("retry-after"), "{method} {path} {name}");
        }
    }
}

#[tokio::test]
async fn a_download_from_a_host_that_dies_never_looks_whole() {
    let mut mesh = Mesh::start().await;
    // One message: `body { data: "x" }`.
    let sandbox = mesh.on_a_dying_host("late", Until::Answer(b"\0\0\0\0\x05\x12\x03\x12\x01x")).await;
    let path = format!("{sandbox}/files?path=/x");
    let request = mesh.request(Method::GET, &path, &[("x-api-key", &mesh.key)], Body::empty());
    let response = client(false).request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
}
