//! Deadlines. A server ends a call at the time that its caller set by `grpc-timeout`, bounded by a limit of its own; a
//! client that gives up says so as `DEADLINE_EXCEEDED` (tonic's own timer would say `CANCELLED`).
//!
//! A stream without a deadline of its own may go on after its answer began: our limit is for the time to the answer.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tonic::{Status, body::Body};
use tower::{BoxError, Layer, Service};

use crate::error::{Reason, status};

/// A server's limit.
#[derive(Clone, Copy, Debug)]
pub struct ServerDeadline {
    /// Longest time to the beginning of an answer.
    pub max: Duration,
}

/// Adds [`Deadline`].
#[derive(Clone, Copy, Debug)]
pub struct DeadlineLayer(Option<ServerDeadline>);

impl DeadlineLayer {
    /// For calls that we answer.
    pub fn server(limit: ServerDeadline) -> Self {
        Self(Some(limit))
    }

    /// For calls that we make.
    pub fn client() -> Self {
        Self(None)
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner, server: self.0 }
    }
}

/// Ends the calls of the service inside at their deadlines.
#[derive(Clone, Debug)]
pub struct Deadline<S> {
    inner: S,
    server: Option<ServerDeadline>,
}

impl<S, B, R> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    R: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let now = Instant::now();
        let asked = grpc_timeout(request.headers());
        let until_answer = match (asked, self.server) {
            (Some(asked), Some(server)) => Some(now + asked.min(server.max)),
            (None, Some(server)) => Some(now + server.max),
            (Some(asked), None) => Some(now + asked),
            (None, None) => None,
        };
        let until_end = asked.and_then(|asked| now.checked_add(asked));
        let response = self.inner.call(request);
        Box::pin(async move {
            let answered = match until_answer {
                Some(deadline) => timeout_at(deadline, response).await,
                None => Ok(response.await),
            };
            match answered {
                Ok(Ok(response)) => {
                    let (parts, body) = response.into_parts();
                    let body = match until_end {
                        Some(deadline) => Body::new(Bounded::new(body, deadline)),
                        None => Body::new(body),
                    };
                    Ok(Response::from_parts(parts, body))
                }
                Ok(Err(error)) => {
                    let error: BoxError = error.into();
                    if is_timeout(error.as_ref()) { Ok(exceeded().into_http()) } else { Err(error) }
                }
                Err(_) => Ok(exceeded().into_http()),
            }
        })
    }
}

fn exceeded() -> Status {
    status(Reason::DeadlineExceeded, "the call took longer than its deadline allows")
}

fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<tonic::TimeoutExpired>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Reads `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Requests"). What is malformed is as if it
/// were absent.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// A body that ends with `DEADLINE_EXCEEDED` when its time is over.
struct Bounded<B> {
    body: Option<B>,
    deadline: Pin<Box<Sleep>>,
}

impl<B> Bounded<B> {
    fn new(body: B, deadline: Instant) -> Self {
        Self { body: Some(body), deadline: Box::pin(sleep_until(deadline)) }
    }
}

impl<B> HttpBody for Bounded<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        // The deadline first: a stream that always has something would never come to it.
        if this.deadline.as_mut().poll(context).is_pending() {
            return Pin::new(body).poll_frame(context);
        }
        // Dropping the body cancels what produces it.
        this.body = None;
        let trailers = exceeded().into_http::<Body>().into_parts().0.headers;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tower::{ServiceExt as _, service_fn};

    use super::*;

    fn request(timeout: Option<&str>) -> Request<Body> {
        let mut request = Request::new(Body::empty());
        if let Some(timeout) = timeout {
            request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        request
    }

    async fn code_after(layer: DeadlineLayer, takes: Duration, timeout: Option<&str>) -> Option<Code> {
        let inner = service_fn(move |_: Request<Body>| async move {
            tokio::time::sleep(takes).await;
            Ok::<_, BoxError>(Response::new(Body::empty()))
        });
        let response = layer.layer(inner).oneshot(request(timeout)).await.unwrap();
        Status::from_header_map(response.headers()).map(|status| status.code())
    }

    #[tokio::test(start_paused = true)]
    async fn the_earlier_of_both_deadlines_counts() {
        let server = DeadlineLayer::server(ServerDeadline { max: Duration::from_secs(10) });
        let after = |seconds, timeout| code_after(server, Duration::from_secs(seconds), timeout);
        assert_eq!(after(9, None).await, None);
        assert_eq!(after(11, None).await, Some(Code::DeadlineExceeded));
        assert_eq!(after(3, Some("2S")).await, Some(Code::DeadlineExceeded));
        assert_eq!(after(1, Some("2S")).await, None);
        assert_eq!(after(11, Some("1H")).await, Some(Code::DeadlineExceeded));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_without_a_deadline_waits() {
        assert_eq!(code_after(DeadlineLayer::client(), Duration::from_secs(3600), None).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_at_its_own_deadline() {
        let inner = service_fn(|_: Request<Body>| async {
            let silent = futures_util::stream::pending::<Result<Frame<Bytes>, Status>>();
            Ok::<_, BoxError>(Response::new(Body::new(http_body_util::StreamBody::new(silent))))
        });
        let layer = DeadlineLayer::server(ServerDeadline { max: Duration::from_secs(1) });
        let response = layer.layer(inner).oneshot(request(Some("90S"))).await.unwrap();
        let started = Instant::now();
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
        assert_eq!(started.elapsed().as_secs(), 90);
        let status = Status::from_header_map(body.trailers().unwrap()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
    }

    #[test]
    fn malformed_timeouts_are_ignored() {
        for text in ["", "S", "1", "1x", "-1S", "123456789S", "1.5S"] {
            assert_eq!(grpc_timeout(request(Some(text)).headers()), None, "{text}");
        }
        assert_eq!(grpc_timeout(request(Some("250m")).headers()), Some(Duration::from_millis(250)));
    }
}
