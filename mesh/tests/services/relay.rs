//! Calls relayed between real sockets: client, relaying server, server behind it.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use oc_mesh::{
    channel::{ClientChannel, STREAM_WINDOW},
    relay::relay,
};
use tempfile::TempDir;
use tonic::{Code, body::Body, server::NamedService, service::Routes};
use tower::{Service, ServiceExt as _};

use crate::{
    slow::{CHUNK, Running, Seen, Slow, call, channel, endless, on_socket, request, run, settled},
    until, within,
};

/// Most that may be under way between writer and reader: two hops with a window each on both sides, and what the
/// sockets and the writers themselves hold.
const IN_FLIGHT: usize = 8 * STREAM_WINDOW as usize;

/// Relays everything. What it holds is held until the call is over.
#[derive(Clone)]
struct Hop {
    upstream: ClientChannel,
    guard: Arc<()>,
}

impl NamedService for Hop {
    const NAME: &'static str = "oc.v1.ExecService";
}

impl Service<Request<Body>> for Hop {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (upstream, guard) = (self.upstream.clone(), Arc::clone(&self.guard));
        Box::pin(async move { Ok(relay(upstream, request, guard).await) })
    }
}

struct Chain {
    client: ClientChannel,
    seen: Arc<Seen>,
    guard: Arc<()>,
    /// Held by the services themselves.
    idle_guards: usize,
    upstream: Option<Running>,
    _hop: Running,
    _directory: TempDir,
}

impl Chain {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let slow = Slow::default();
        let behind = directory.path().join("behind.sock");
        let upstream = run(on_socket(&behind, Routes::new(slow.clone()))).await.unwrap();
        let guard = Arc::new(());
        let hop = Hop { upstream: channel(&upstream), guard: Arc::clone(&guard) };
        let hop = run(on_socket(&directory.path().join("hop.sock"), Routes::new(hop))).await.unwrap();
        let client = channel(&hop);
        // Connected, so that what a connection holds is held from now on.
        call(&client, request("Headers")).await.unwrap();
        let idle_guards = Arc::strong_count(&guard);
        let seen = slow.0;
        Self { client, seen, guard, idle_guards, upstream: Some(upstream), _hop: hop, _directory: directory }
    }

    /// Waits until the relay holds nothing more for any call.
    async fn let_go(&self) {
        until("the guards to be dropped", async || Arc::strong_count(&self.guard) <= self.idle_guards).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_headers_of_the_protocol_pass() {
    let chain = Chain::start().await;
    let mut asked = request("Headers");
    for (name, value) in [
        ("authorization", "Bearer secret"),
        ("cookie", "a=b"),
        ("x-api-key", "secret"),
        ("user-agent", "curl"),
        ("grpc-timeout", "10S"),
        ("x-request-id", "r-1"),
        ("oc-sandbox-id", "sb-1"),
    ] {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    let ended = call(&chain.client, asked).await.unwrap();
    assert_eq!(ended.code, Code::Ok);
    for passed in ["grpc-timeout=10S", "x-request-id=r-1", "oc-sandbox-id=sb-1", "te=trailers"] {
        assert!(ended.text.lines().any(|header| header == passed), "{passed}: {}", ended.text);
    }
    for kept in ["authorization", "cookie", "x-api-key", "curl"] {
        assert!(!ended.text.contains(kept), "{kept}: {}", ended.text);
    }
    assert!(ended.metadata.get("x-evil").is_none(), "{:?}", ended.metadata);
    assert_eq!(ended.metadata["content-type"], "application/grpc");
    chain.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_passes_with_its_code() {
    let chain = Chain::start().await;
    let ended = call(&chain.client, request("Fail")).await.unwrap();
    assert_eq!(ended.code, Code::PermissionDenied);
    assert_eq!(ended.metadata["grpc-message"], "no");
    assert!(ended.metadata.get("x-evil").is_none());
    chain.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_before_the_answer_cancels_the_call_behind() {
    let chain = Chain::start().await;
    let waiting = tokio::spawn(chain.client.clone().oneshot(request("Run")));
    chain.seen.entered(2).await;
    waiting.abort();
    chain.seen.left(2).await;
    chain.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_amid_the_answer_cancels_the_call_behind() {
    let chain = Chain::start().await;
    let mut stream = chain.client.clone().oneshot(request("Flood")).await.unwrap();
    within("a frame", stream.body_mut().frame()).await.unwrap().unwrap();
    drop(stream);
    chain.seen.left(2).await;
    chain.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_holds_back_the_writer_behind() {
    let chain = Chain::start().await;
    let mut stream = chain.client.clone().oneshot(request("Flood")).await.unwrap();
    let produced = settled(&chain.seen.produced).await;
    assert!(produced <= IN_FLIGHT, "{produced} bytes for a reader that does not read");
    // Reading on, it goes on.
    let mut read = 0;
    while read < 2 * IN_FLIGHT {
        let frame = within("a frame", stream.body_mut().frame()).await.unwrap().unwrap();
        read += frame.into_data().unwrap().len();
    }
    assert!(chain.seen.produced.load(Ordering::Relaxed) >= read);
    let produced = settled(&chain.seen.produced).await;
    assert!(produced <= read + IN_FLIGHT + CHUNK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_read_holds_back_the_client() {
    let chain = Chain::start().await;
    let (body, taken) = endless();
    let sending = tokio::spawn(chain.client.clone().oneshot(request("Ignore").map(|_| body)));
    // What stands still before it has come to the server may do so for want of a processor.
    chain.seen.entered(2).await;
    let taken_at = settled(&taken).await;
    assert!(taken_at <= IN_FLIGHT, "{taken_at} bytes for a server that does not read");
    assert!(!sending.is_finished());
    sending.abort();
    chain.seen.left(2).await;
    chain.let_go().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_behind_that_is_gone_is_told_as_such() {
    let mut chain = Chain::start().await;
    let upstream = chain.upstream.take().unwrap();
    upstream.shutdown.cancel();
    upstream.stopped().await.unwrap();
    let ended = call(&chain.client, request("Headers")).await.unwrap();
    assert_eq!((ended.code, ended.reason.as_deref()), (Code::Unavailable, Some("HOST_UNAVAILABLE")));
    chain.let_go().await;
}
