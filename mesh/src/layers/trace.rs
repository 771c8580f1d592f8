//! Trace context (W3C Trace Context, `traceparent`): accepted or started by servers, passed on by clients, so that one
//! request can be followed through all its hops by its trace ID.

use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request};
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::caller::{REQUEST_ID_HEADER, SANDBOX_ID_HEADER};

const TRACEPARENT: &str = "traceparent";

tokio::task_local! {
    /// The context of the call that this task answers.
    static CURRENT: TraceContext;
}

/// Where a call stands in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    sampled: bool,
}

impl TraceContext {
    /// A new trace.
    pub fn start() -> Self {
        Self { trace_id: random().max(1), span_id: narrow(random()), sampled: true }
    }

    /// A step in the same trace.
    pub fn child(self) -> Self {
        Self { span_id: narrow(random()), ..self }
    }

    /// The context of the call that this task answers, if it answers one.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|context| *context).ok()
    }

    /// The trace's ID, 32 hex digits.
    pub fn trace_id(self) -> String {
        format!("{:032x}", self.trace_id)
    }

    /// Reads `traceparent`; what is malformed is as if it were absent.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(TRACEPARENT)?.to_str().ok()?;
        let mut fields = text.split('-');
        let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let is_hex = |text: &str, len: usize| {
            text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        // Version ff is forbidden; version 00 has exactly these fields, later ones may add more.
        if !is_hex(version, 2) || version == "ff" || (version == "00" && fields.next().is_some()) {
            return None;
        }
        if !is_hex(trace, 32) || !is_hex(span, 16) || !is_hex(flags, 2) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
        let span_id = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
        Some(Self { trace_id, span_id, sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1 })
    }

    /// Writes `traceparent`.
    pub fn apply(self, headers: &mut HeaderMap) {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled));
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(TRACEPARENT, value);
        }
    }
}

/// Randomness that need not be secret: a UUID's, which the system seeds.
fn random() -> u128 {
    let mut bytes = [0u8; 16];
    // Without randomness a trace has the ID 1: traces are for looking, not for safety.
    let _ = getrandom::fill(&mut bytes);
    u128::from_ne_bytes(bytes)
}

fn narrow(random: u128) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = random.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h]).max(1)
}

/// Adds [`Trace`].
#[derive(Clone, Copy, Debug)]
pub struct TraceLayer {
    is_server: bool,
}

impl TraceLayer {
    /// Accepts or starts a trace, and opens the call's span.
    pub fn server() -> Self {
        Self { is_server: true }
    }

    /// Passes the current trace on.
    pub fn client() -> Self {
        Self { is_server: false }
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace { inner, is_server: self.is_server }
    }
}

/// Traces the calls of the service inside.
#[derive(Clone, Debug)]
pub struct Trace<S> {
    inner: S,
    is_server: bool,
}

impl<S, B> Service<Request<B>> for Trace<S>
where
    S: Service<Request<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let from = TraceContext::from_headers(request.headers());
        if !self.is_server {
            let context = TraceContext::current().or(from).unwrap_or_else(TraceContext::start);
            context.child().apply(request.headers_mut());
            return Box::pin(self.inner.call(request));
        }
        let context = from.map_or_else(TraceContext::start, TraceContext::child);
        let header =
            |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let span = tracing::info_span!(
            "call",
            method = request.uri().path(),
            trace_id = context.trace_id(),
            request_id = header(REQUEST_ID_HEADER),
            sandbox_id = header(SANDBOX_ID_HEADER),
        );
        let response = span.in_scope(|| CURRENT.sync_scope(context, || self.inner.call(request)));
        Box::pin(CURRENT.scope(context, response).instrument(span))
    }
}

#[cfg(test)]
mod tests {
    use tower::{BoxError, ServiceExt as _, service_fn};

    use super::*;

    fn headers(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(TRACEPARENT.parse().unwrap(), text.parse().unwrap())])
    }

    #[test]
    fn contexts_survive_the_header_and_malformed_ones_do_not() {
        let context = TraceContext::start();
        let mut written = HeaderMap::new();
        context.apply(&mut written);
        assert_eq!(TraceContext::from_headers(&written), Some(context));

        let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        assert!(TraceContext::from_headers(&headers(&format!("01-{trace}-{span}-01-more"))).is_some());
        for text in [
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            "00".into(),
        ] {
            assert_eq!(TraceContext::from_headers(&headers(&text)), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_client_continues_the_trace_of_the_call_that_it_serves() {
        let downstream = TraceLayer::client().layer(service_fn(|request: Request<()>| async move {
            Ok::<_, BoxError>(TraceContext::from_headers(request.headers()).unwrap())
        }));
        let server = TraceLayer::server().layer(service_fn(move |_: Request<()>| {
            let downstream = downstream.clone();
            async move { downstream.oneshot(Request::new(())).await }
        }));
        let context = TraceContext::start();
        let mut request = Request::new(());
        context.apply(request.headers_mut());
        let seen = server.oneshot(request).await.unwrap();
        assert_eq!(seen.trace_id(), context.trace_id());
        assert_ne!(seen.span_id, context.span_id);
    }
}
