//! Browsers may call REST from any page. No cookie or other ambient credential is ever read, so a page can do no
//! more than whoever holds the key that it sends.

use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
    },
};
use tonic::body::Body;

use crate::rest::answer;

const ANY: HeaderValue = HeaderValue::from_static("*");
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, DELETE");
/// `*` alone does not cover `Authorization` (Fetch standard, CORS-preflight).
const HEADERS: HeaderValue = HeaderValue::from_static("*, authorization");
const EXPOSED: HeaderValue = HeaderValue::from_static("x-request-id, retry-after, content-length");
/// Seconds; browsers cap it at two hours or less.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");

/// Whether a page of another origin is asking.
pub fn origin<B>(request: &Request<B>) -> bool {
    request.headers().contains_key(ORIGIN)
}

/// The answer to a browser that asks whether it may ask.
pub fn preflight<B>(request: &Request<B>) -> Option<Response<Body>> {
    let asks = request.method() == Method::OPTIONS
        && origin(request)
        && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    asks.then(|| {
        let mut response = allow(answer::empty(StatusCode::NO_CONTENT), true);
        let headers = response.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HEADERS);
        headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        response
    })
}

/// Lets a page of another origin read the answer.
pub fn allow(mut response: Response<Body>, asked: bool) -> Response<Body> {
    if asked {
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
        response.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    response
}
