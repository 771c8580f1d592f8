//! One request and its answer, as logs and metrics see them.
//!
//! Exactly one line is logged for each, when the last byte of the answer has been handed over or nobody waits for
//! it any more. It holds no query, no header and no body: those may carry credentials.

mod counted;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response};
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::{Status, body::Body};
use uuid::Uuid;

/// Names a request in logs, answers and calls to other parts.
pub const REQUEST_ID: &str = "x-request-id";

/// What is logged for a caller who went away before there was an answer.
const CLIENT_GONE: u16 = 499;

/// One request on its way through the gateway.
#[derive(Debug)]
pub struct Exchange {
    /// The caller's `x-request-id` if it is a sane one, else a new UUIDv7.
    pub request_id: String,
    method: Method,
    started: Instant,
    facts: Mutex<Facts>,
}

/// What becomes known on the way.
#[derive(Debug, Default)]
struct Facts {
    route: Option<String>,
    tenant: Option<String>,
    sandbox: Option<String>,
    quiet: bool,
}

impl Exchange {
    /// Begins with a request's head.
    #[must_use]
    pub fn begin(method: &Method, headers: &HeaderMap) -> Arc<Self> {
        let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|id| is_sane(id));
        let request_id = given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned);
        counted::begin();
        Arc::new(Self {
            request_id,
            method: method.clone(),
            started: Instant::now(),
            facts: Mutex::default(),
        })
    }

    /// Names the route: a path template or a gRPC path, never the path itself.
    pub fn set_route(&self, route: &str) {
        self.facts.lock().route = Some(route.to_owned());
    }

    /// Names whom the caller acts for.
    pub fn set_tenant(&self, tenant: &str) {
        self.facts.lock().tenant = Some(tenant.to_owned());
    }

    /// Names the sandbox, once the caller may name it.
    pub fn set_sandbox(&self, sandbox: &str) {
        self.facts.lock().sandbox = Some(sandbox.to_owned());
    }

    /// Logs only for whoever debugs: probes come every few seconds.
    pub fn set_quiet(&self) {
        self.facts.lock().quiet = true;
    }

    fn end(&self, end: &End) {
        let facts = self.facts.lock();
        let elapsed = self.started.elapsed();
        let route = facts.route.as_deref().unwrap_or("unmatched");
        counted::end(known(&self.method), route, end.status, elapsed, end.bytes);
        // To a microsecond.
        let ms = (elapsed.as_secs_f64() * 1e6).round() / 1e3;
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    method = self.method.as_str(),
                    route,
                    status = end.status,
                    grpc_status = end.grpc_status,
                    complete = end.complete,
                    bytes = end.bytes,
                    ms,
                    request_id = self.request_id,
                    tenant = facts.tenant.as_deref(),
                    sandbox = facts.sandbox.as_deref(),
                    "request"
                )
            };
        }
        if facts.quiet { line!(debug) } else { line!(info) }
    }
}

/// How it ended.
#[derive(Debug)]
struct End {
    status: u16,
    grpc_status: Option<i32>,
    bytes: u64,
    complete: bool,
}

/// Ends the exchange when it is dropped, wherever that happens.
#[derive(Debug)]
pub struct Ending {
    exchange: Arc<Exchange>,
    end: End,
}

impl Ending {
    /// Until there is an answer, the end is that the caller went away.
    #[must_use]
    pub fn of(exchange: Arc<Exchange>) -> Self {
        Self { exchange, end: End { status: CLIENT_GONE, grpc_status: None, bytes: 0, complete: false } }
    }

    /// Follows the answer to its last byte, and keeps `permit` until then.
    #[must_use]
    pub fn follow(
        mut self,
        mut response: Response<Body>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Response<Body> {
        self.end.status = response.status().as_u16();
        self.end.grpc_status = grpc_status(response.headers());
        if let Ok(id) = HeaderValue::from_str(&self.exchange.request_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        let (parts, inner) = response.into_parts();
        if inner.is_end_stream() {
            self.end.complete = true;
            return Response::from_parts(parts, inner);
        }
        Response::from_parts(parts, Body::new(Followed { inner, ending: self, _permit: permit }))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.exchange.end(&self.end);
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<i32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// A method as a label. Anybody may make up methods, and metrics are kept for ever.
fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "PUT" => "PUT",
        "POST" => "POST",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "HEAD" => "HEAD",
        _ => "other",
    }
}

/// At most 64 characters that need no escaping anywhere.
fn is_sane(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

struct Followed {
    inner: Body,
    ending: Ending,
    _permit: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for Followed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.ending.end.bytes += data.len() as u64;
                }
                if let Some(trailers) = frame.trailers_ref() {
                    self.ending.end.grpc_status = grpc_status(trailers);
                }
                self.ending.end.complete = self.inner.is_end_stream();
            }
            Poll::Ready(None) => self.ending.end.complete = true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sane_request_ids_are_taken_over() {
        let id = |value: &'static str| {
            let headers =
                [(REQUEST_ID.parse().unwrap(), HeaderValue::from_static(value))].into_iter().collect();
            Exchange::begin(&Method::GET, &headers).request_id.clone()
        };
        assert_eq!(id("trace-1.a_B"), "trace-1.a_B");
        for value in ["", "a b", "{\"x\":1}", "a\tb"] {
            assert_eq!(id(value).len(), 36, "{value}");
        }
    }
}
