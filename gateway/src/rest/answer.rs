//! HTTP answers: JSON, nothing, raw bytes, and errors.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, RETRY_AFTER},
};
use http_body::{Frame, SizeHint};
use oc_mesh::error::{Reason, status};
use serde::Serialize;
use tonic::{Status, body::Body};

use crate::{budget::Held, failure};

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Seconds that a client is asked to wait before it tries again.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// What the published clients read of an error, and our stable `code`.
#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
    code: &'a str,
    /// What those clients read that ask again while a sandbox wakes.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    waking: bool,
}

/// A JSON text, and the memory that it holds.
#[derive(Debug, Default)]
pub struct Text {
    /// The text.
    pub text: Bytes,
    /// Kept until the text has been sent.
    pub held: Held,
}

impl From<Bytes> for Text {
    fn from(text: Bytes) -> Self {
        Self { text, held: Held::default() }
    }
}

/// A JSON answer. With 204 nothing is sent.
#[must_use]
pub fn json(code: StatusCode, text: impl Into<Text>) -> Response<Body> {
    if code == StatusCode::NO_CONTENT {
        return empty(code);
    }
    let mut response = Response::new(Body::new(text.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// Sent in pieces, so that memory and time go by what the client takes.
const PIECE: usize = 256 << 10;

impl http_body::Body for Text {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.text.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.text.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.text.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.text.len() as u64)
    }
}

/// An answer without a body.
#[must_use]
pub fn empty(code: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = code;
    response
}

/// The JSON of an error.
#[must_use]
pub fn error_json(status: &Status) -> Bytes {
    let code = failure::reason(status);
    let waking = code == Reason::SandboxWaking.as_str();
    // Strings always have a JSON form.
    serde_json::to_vec(&ErrorBody { error: status.message(), code: &code, waking })
        .map(Bytes::from)
        .unwrap_or_default()
}

/// The answer to a call that failed.
#[must_use]
pub fn error(status: &Status) -> Response<Body> {
    let code = oc_mesh::error::http_status(status);
    let mut response = json(code, error_json(status));
    if code == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
    }
    response
}

/// The answer to a path that no rule has.
#[must_use]
pub fn route_not_found() -> Response<Body> {
    error(&status(Reason::RouteNotFound, "there is no such route"))
}

/// The answer to a path that has rules for other methods only.
#[must_use]
pub fn method_not_allowed(method: &Method, allowed: &[Method]) -> Response<Body> {
    let mut names: Vec<&str> = allowed.iter().map(Method::as_str).collect();
    names.sort_unstable();
    let names = names.join(", ");
    let text = format!("{method} is not allowed here; allowed: {names}");
    let mut response = error(&status(Reason::MethodNotAllowed, text));
    if let Ok(names) = HeaderValue::try_from(names) {
        response.headers_mut().insert(ALLOW, names);
    }
    response
}
