//! One request and its answer, as logs and metrics see them.
//!
//! Exactly one line is logged for each, when the last byte of the answer has been handed over or nobody waits for
//! it any more. It holds no query, no header and no body: those may carry credentials.

mod counted;

use std::{
    borrow::Cow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::{Status, body::Body};
use uuid::Uuid;

use crate::sandboxes::Shown;

/// Names a request in logs, answers and calls to other parts.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// What is logged for a caller who went away before there was an answer.
const CLIENT_GONE: u16 = 499;

/// One request on its way through the gateway.
#[derive(Debug)]
pub struct Exchange {
    request_id: HeaderValue,
    method: Method,
    started: Instant,
    facts: Mutex<Facts>,
}

/// What becomes known on the way.
#[derive(Debug, Default)]
struct Facts {
    route: Option<Cow<'static, str>>,
    tenant: Option<String>,
    sandbox: Option<String>,
    shown: Option<Shown>,
    quiet: bool,
}

impl Exchange {
    /// Begins with a request's head.
    #[must_use]
    pub fn begin(method: &Method, headers: &HeaderMap) -> Arc<Self> {
        let given = headers.get(REQUEST_ID).map(HeaderValue::as_bytes).filter(|id| is_sane(id));
        // Copied: a WebSocket would hold the whole head.
        let request_id = given.and_then(|id| HeaderValue::from_bytes(id).ok()).unwrap_or_else(new_id);
        counted::begin();
        Arc::new(Self {
            request_id,
            method: method.clone(),
            started: Instant::now(),
            facts: Mutex::default(),
        })
    }

    /// The caller's `x-request-id` if it is a sane one, else a new UUIDv7.
    #[must_use]
    pub fn request_id(&self) -> &str {
        // It is ASCII.
        self.request_id.to_str().unwrap_or_default()
    }

    /// The same as a header has it.
    #[must_use]
    pub fn request_id_header(&self) -> HeaderValue {
        self.request_id.clone()
    }

    /// Names the route: a path template or a gRPC path, never the path itself.
    pub fn set_route(&self, route: impl Into<Cow<'static, str>>) {
        self.facts.lock().route = Some(route.into());
    }

    /// Names whom the caller acts for.
    pub fn set_tenant(&self, tenant: &str) {
        self.facts.lock().tenant = Some(tenant.to_owned());
    }

    /// Names the sandbox, once the caller may name it.
    pub fn set_sandbox(&self, sandbox: &str) {
        self.facts.lock().sandbox = Some(sandbox.to_owned());
    }

    /// Names the sandbox, and whom it belongs to, where that is all that the caller acts for.
    pub fn set_shown(&self, shown: Shown) {
        self.facts.lock().shown = Some(shown);
    }

    /// Logs only for whoever debugs: probes come every few seconds.
    pub fn set_quiet(&self) {
        self.facts.lock().quiet = true;
    }

    fn end(&self, end: &End) {
        let facts = self.facts.lock();
        let elapsed = self.started.elapsed();
        let shown = facts.shown.as_ref();
        let tenant = facts.tenant.as_deref().or_else(|| shown.map(Shown::tenant));
        let sandbox = facts.sandbox.as_deref().or_else(|| shown.map(Shown::sandbox_id));
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
                    request_id = self.request_id(),
                    tenant,
                    sandbox,
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
    ) -> Response<Followed> {
        self.end.status = response.status().as_u16();
        self.end.grpc_status = grpc_status(response.headers());
        response.headers_mut().insert(REQUEST_ID, self.exchange.request_id_header());
        response.map(|inner| {
            // What has no body has come to its end.
            self.end.complete = inner.is_end_stream();
            let following = (!self.end.complete).then_some((self, permit));
            Followed { inner, following }
        })
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.exchange.end(&self.end);
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<i32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
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
fn is_sane(id: &[u8]) -> bool {
    (1..=64).contains(&id.len())
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

fn new_id() -> HeaderValue {
    let mut text = Uuid::encode_buffer();
    let id = HeaderValue::from_str(Uuid::now_v7().hyphenated().encode_lower(&mut text));
    // Digits and hyphens are always a value.
    id.unwrap_or(HeaderValue::from_static("-"))
}

/// An answer's body, followed to its end.
#[derive(Debug)]
pub struct Followed {
    inner: Body,
    following: Option<(Ending, Option<OwnedSemaphorePermit>)>,
}

impl http_body::Body for Followed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        let has_ended = self.inner.is_end_stream();
        let Some((Ending { end, .. }, _)) = &mut self.following else { return polled };
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    end.bytes += data.len() as u64;
                }
                if let Some(trailers) = frame.trailers_ref() {
                    end.grpc_status = grpc_status(trailers);
                }
                end.complete = has_ended;
            }
            Poll::Ready(None) => end.complete = true,
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
            let headers = [(REQUEST_ID, HeaderValue::from_static(value))].into_iter().collect();
            Exchange::begin(&Method::GET, &headers).request_id().to_owned()
        };
        assert_eq!(id("trace-1.a_B"), "trace-1.a_B");
        for value in ["", "a b", "{\"x\":1}", "a\tb"] {
            assert_eq!(id(value).len(), 36, "{value}");
        }
    }
}
