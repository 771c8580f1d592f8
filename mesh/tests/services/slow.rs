//! A service on a real socket whose methods take their time, and calls to it.

use std::{
    convert::Infallible,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use oc_mesh::{
    channel::{Channels, ClientChannel},
    endpoint::Endpoint,
    error::reason_of,
    serve::{Serve, ServeError},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, server::NamedService, service::Routes};
use tower::{BoxError, Service, ServiceExt as _};

/// Bytes that [`Slow`] floods with at a time.
pub const CHUNK: usize = 64 << 10;

/// What the service has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Calls that came in.
    pub entered: watch::Sender<usize>,
    /// Calls that are over, whatever ended them.
    pub left: watch::Sender<usize>,
    /// Lets `Wait` answer.
    pub released: watch::Sender<bool>,
    /// Bytes that `Flood` has produced.
    pub produced: AtomicUsize,
}

impl Seen {
    /// Waits until so many calls have come in.
    pub async fn entered(&self, calls: usize) {
        crate::within("calls to come in", self.entered.subscribe().wait_for(|entered| *entered >= calls))
            .await
            .unwrap();
    }

    /// Waits until so many calls are over.
    pub async fn left(&self, calls: usize) {
        crate::within("calls to be over", self.left.subscribe().wait_for(|left| *left >= calls))
            .await
            .unwrap();
    }
}

/// One call, counted until it is dropped.
struct Visit(Arc<Seen>);

impl Visit {
    fn enter(seen: &Arc<Seen>) -> Self {
        seen.entered.send_modify(|entered| *entered += 1);
        Self(Arc::clone(seen))
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.left.send_modify(|left| *left += 1);
    }
}

/// The service. Its name is one of the contract's, so that it is counted under a name.
#[derive(Clone, Debug, Default)]
pub struct Slow(pub Arc<Seen>);

impl NamedService for Slow {
    const NAME: &'static str = "oc.v1.ExecService";
}

impl Service<Request<Body>> for Slow {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let visit = Visit::enter(&self.0);
        Box::pin(async move {
            let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
            Ok(match method.as_str() {
                // Answers when it is told to.
                "Run" => {
                    visit.0.released.subscribe().wait_for(|released| *released).await.unwrap();
                    answer("")
                }
                // Answers with the headers that it got.
                "Headers" => {
                    let names: Vec<String> = request
                        .headers()
                        .iter()
                        .map(|(name, value)| format!("{name}={}", value.to_str().unwrap()))
                        .collect();
                    answer(&names.join("\n"))
                }
                "Fail" => {
                    let mut response = Status::permission_denied("no").into_http();
                    response.headers_mut().insert("x-evil", HeaderValue::from_static("1"));
                    response
                }
                // Never ends, and says so at once.
                "Flood" => {
                    let chunks = stream::repeat_with(move || {
                        visit.0.produced.fetch_add(CHUNK, Ordering::Relaxed);
                        Ok::<_, Status>(Frame::data(Bytes::from(vec![0; CHUNK])))
                    });
                    grpc(Body::new(StreamBody::new(chunks)))
                }
                // Reads nothing of its request, and does not answer.
                "Ignore" => {
                    let _unread = request;
                    std::future::pending().await
                }
                other => Status::unimplemented(other.to_owned()).into_http(),
            })
        })
    }
}

fn answer(text: &str) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers.insert("x-evil", HeaderValue::from_static("1"));
    let body = Full::new(Bytes::copy_from_slice(text.as_bytes()));
    grpc(Body::new(body.with_trailers(std::future::ready(Some(Ok::<_, Infallible>(trailers))))))
}

fn grpc(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert("x-evil", HeaderValue::from_static("1"));
    response
}

/// A server that runs in this process; stopped when dropped.
pub struct Running {
    pub endpoint: String,
    pub shutdown: CancellationToken,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Waits until it has stopped.
    pub async fn stopped(mut self) -> Result<(), ServeError> {
        crate::within("the server to stop", &mut self.task).await.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// What to serve on a socket, with limits that do not matter.
pub fn on_socket(path: &Path, routes: Routes) -> Serve {
    Serve {
        listen: Endpoint::Unix(path.to_owned()),
        routes,
        max_concurrent: 100,
        max_deadline: Duration::from_secs(60),
        shutdown: CancellationToken::new(),
    }
}

/// Serves in the background.
pub async fn run(serve: Serve) -> Result<Running, ServeError> {
    let shutdown = serve.shutdown.clone();
    let bound = serve.bind().await?;
    let endpoint = bound.endpoint().to_string();
    Ok(Running { endpoint, shutdown, task: tokio::spawn(bound.run()) })
}

/// A channel to a server.
pub fn channel(running: &Running) -> ClientChannel {
    Channels::new().get(&running.endpoint).unwrap()
}

/// A call to a method of [`Slow`].
pub fn request(method: &str) -> Request<Body> {
    Request::post(format!("/oc.v1.ExecService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::empty())
        .unwrap()
}

/// How a call ended: its code, its reason, what it answered.
#[derive(Debug)]
pub struct Ended {
    pub code: Code,
    pub reason: Option<String>,
    pub text: String,
    /// Headers and trailers.
    pub metadata: HeaderMap,
}

/// Makes a call and reads it to its end.
pub async fn call(channel: &ClientChannel, request: Request<Body>) -> Result<Ended, BoxError> {
    let response = crate::within("an answer", channel.clone().oneshot(request)).await?;
    ended(response).await
}

/// Reads an answer to its end.
pub async fn ended(response: Response<Body>) -> Result<Ended, BoxError> {
    let (parts, body) = response.into_parts();
    let body = crate::within("the answer's end", body.collect()).await?;
    let mut metadata = parts.headers;
    metadata.extend(body.trailers().cloned().unwrap_or_default());
    let status = Status::from_header_map(&metadata).ok_or("no grpc-status")?;
    let text = String::from_utf8(body.to_bytes().to_vec())?;
    Ok(Ended { code: status.code(), reason: reason_of(&status), text, metadata })
}

/// A request body that never ends, and how many bytes of it were taken.
pub fn endless() -> (Body, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let chunks = stream::repeat_with(move || {
        counted.fetch_add(CHUNK, Ordering::Relaxed);
        Ok::<_, Status>(Frame::data(Bytes::from(vec![0; CHUNK])))
    });
    (Body::new(StreamBody::new(chunks.boxed())), taken)
}

/// Waits until a count stands still, and says where.
pub async fn settled(count: &AtomicUsize) -> usize {
    crate::within("the count to stand still", async {
        let mut before = usize::MAX;
        loop {
            let now = count.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await
}
