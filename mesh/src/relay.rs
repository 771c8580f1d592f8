//! Passes one gRPC call through unread. Bytes go on as they come, with HTTP/2's flow control from end to end: a slow
//! reader holds back the writer behind all hops, and each hop buffers no more than its windows.
//!
//! What is behind may be a guest, which is hostile: of its answer only what gRPC needs is passed on.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, header};
use http_body::{Body as HttpBody, Frame};
use tonic::{Code, Status, body::Body};
use tower::{BoxError, Service, ServiceExt as _};

use crate::{
    caller::{REQUEST_ID_HEADER, RESERVED_PREFIX},
    error::{Reason, status},
    layers::observed::{Observed, Observer},
};

/// Request headers that go on, beside those that begin with [`RESERVED_PREFIX`].
const REQUEST_HEADERS: &[&str] = &[
    "content-type",
    "te",
    "grpc-timeout",
    "grpc-encoding",
    "grpc-accept-encoding",
    "traceparent",
    REQUEST_ID_HEADER,
];
const GRPC_STATUS: &str = "grpc-status";
/// Response headers and trailers that come back.
const RESPONSE_HEADERS: &[&str] =
    &["content-type", "grpc-encoding", GRPC_STATUS, "grpc-message", "grpc-status-details-bin"];

/// Held until the relayed call is over, however it ends.
pub trait CallGuard: Send + Unpin + 'static {}
impl<T: Send + Unpin + 'static> CallGuard for T {}

/// Held until the call is over.
struct Guarded<G>(#[allow(dead_code, reason = "held, not read")] G);

impl<G: CallGuard> Observer for Guarded<G> {
    fn ended(&mut self, _: Code) {}
}

/// Relays `request` to `upstream`, path and all. `guard` is dropped when the call is over: after the last byte of the
/// answer, or when either side has gone. An upstream that cannot be reached is answered as `HOST_UNAVAILABLE`.
pub async fn relay<S, B, R, G>(upstream: S, request: Request<B>, guard: G) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
    G: CallGuard,
{
    let (mut parts, body) = request.into_parts();
    parts.headers = keep(&parts.headers, |name| {
        REQUEST_HEADERS.contains(&name.as_str()) || name.as_str().starts_with(RESERVED_PREFIX)
    });
    parts.extensions = http::Extensions::new();
    let answered = upstream.oneshot(Request::from_parts(parts, Body::new(body))).await;
    let response = match answered {
        Ok(response) => response,
        Err(error) => {
            let error: BoxError = error.into();
            tracing::warn!(error = error.as_ref(), "upstream cannot be reached");
            return status(Reason::HostUnavailable, "the sandbox's host cannot be reached, try again")
                .into_http();
        }
    };
    if response.status() != StatusCode::OK {
        tracing::warn!(status = response.status().as_u16(), "upstream does not answer in gRPC");
        return status(Reason::Internal, "the sandbox does not answer in gRPC").into_http();
    }
    let (parts, body) = response.into_parts();
    let headers = keep(&parts.headers, is_answer);
    let has_ended = headers.contains_key(GRPC_STATUS);
    let body = Relayed { body: Box::pin(body), has_ended };
    let observed = Observed::new(body, &headers, Guarded(guard));
    let mut response = Response::new(Body::new(observed));
    *response.headers_mut() = headers;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    response
}

fn is_answer(name: &HeaderName) -> bool {
    RESPONSE_HEADERS.contains(&name.as_str())
}

/// An answer of which only what gRPC needs is passed on, and which always ends with a status: an upstream that breaks
/// amid it, or sends none, is told as such.
struct Relayed<B> {
    body: Pin<Box<B>>,
    has_ended: bool,
}

impl<B> HttpBody for Relayed<B>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let end = match ready!(self.body.as_mut().poll_frame(context)) {
            Some(Ok(frame)) => match frame.into_trailers() {
                Ok(trailers) => keep(&trailers, is_answer),
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            },
            Some(Err(error)) => {
                let error: BoxError = error.into();
                tracing::warn!(error = error.as_ref(), "upstream broke amid its answer");
                headers_of(&status(Reason::HostUnavailable, "the sandbox's host broke off, try again"))
            }
            None => HeaderMap::new(),
        };
        self.has_ended = true;
        let end = if end.contains_key(GRPC_STATUS) {
            end
        } else {
            headers_of(&status(Reason::Internal, "the sandbox ended the call without a status"))
        };
        Poll::Ready(Some(Ok(Frame::trailers(end))))
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended
    }
}

fn headers_of(status: &Status) -> HeaderMap {
    let mut headers = HeaderMap::new();
    // Fails on a message that cannot stand in a header: ours can.
    let _ = status.add_header(&mut headers);
    headers
}

fn keep(headers: &HeaderMap, wanted: impl Fn(&HeaderName) -> bool) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _)| wanted(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body_util::BodyExt as _;
    use tower::service_fn;

    use super::*;

    #[tokio::test]
    async fn only_what_grpc_needs_passes_and_the_guard_lives_until_the_end() {
        let upstream = service_fn(|request: Request<Body>| async move {
            assert!(request.headers().get("cookie").is_none());
            assert_eq!(request.headers()["oc-sandbox-id"], "sb-1");
            assert_eq!(request.uri().path(), "/oc.v1.ExecService/Run");
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
            trailers.insert("x-evil", http::HeaderValue::from_static("1"));
            let body = http_body_util::Full::new(Bytes::from_static(b"answer"));
            let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
            let mut response = Response::new(Body::new(body));
            response.headers_mut().insert("set-cookie", http::HeaderValue::from_static("a=b"));
            Ok::<_, BoxError>(response)
        });
        let request = Request::post("/oc.v1.ExecService/Run")
            .header("cookie", "a=b")
            .header("oc-sandbox-id", "sb-1")
            .body(Body::empty())
            .unwrap();
        let guard = Arc::new(());
        let response = relay(upstream, request, Arc::clone(&guard)).await;
        assert!(response.headers().get("set-cookie").is_none());
        assert_eq!(Arc::strong_count(&guard), 2);
        let collected = response.into_body().collect().await.unwrap();
        assert!(collected.trailers().unwrap().get("x-evil").is_none());
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
        assert_eq!(collected.to_bytes(), "answer");
        assert_eq!(Arc::strong_count(&guard), 1);
    }

    #[tokio::test]
    async fn an_upstream_that_is_down_is_unavailable() {
        let upstream =
            service_fn(|_: Request<Body>| async { Err::<Response<Body>, BoxError>("refused".into()) });
        let response = relay(upstream, Request::new(Body::empty()), ()).await;
        let error = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(crate::error::reason_of(&error).as_deref(), Some("HOST_UNAVAILABLE"));
    }

    async fn end_of(frames: Vec<Result<Frame<Bytes>, Status>>) -> Status {
        let frames = std::sync::Mutex::new(Some(frames));
        let upstream = service_fn(|_: Request<Body>| {
            let frames = futures_util::stream::iter(frames.lock().unwrap().take().unwrap());
            async { Ok::<_, BoxError>(Response::new(http_body_util::StreamBody::new(frames))) }
        });
        let response = relay(upstream, Request::new(Body::empty()), ()).await;
        let collected = response.into_body().collect().await.unwrap();
        Status::from_header_map(collected.trailers().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn every_answer_ends_with_a_status() {
        let data = || Ok(Frame::data(Bytes::from_static(b"half")));
        let broken = end_of(vec![data(), Err(Status::unknown("reset"))]).await;
        assert_eq!(crate::error::reason_of(&broken).as_deref(), Some("HOST_UNAVAILABLE"));
        let silent = end_of(vec![data()]).await;
        assert_eq!(silent.code(), Code::Internal);
        let hollow = end_of(vec![data(), Ok(Frame::trailers(HeaderMap::new()))]).await;
        assert_eq!(hollow.code(), Code::Internal);
    }
}
