//! Browsers may call REST and open WebSockets from any page, unless the operator names the origins that may. No cookie or
//! other ambient credential is ever read, so a page can do no more than whoever holds the key that it sends.

use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
    },
};
use oc_mesh::error::{Reason, status};
use tonic::body::Body;

use crate::rest::answer;

const ANY: HeaderValue = HeaderValue::from_static("*");
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, DELETE");
/// `*` alone does not cover `Authorization` (Fetch standard, CORS-preflight).
const HEADERS: HeaderValue = HeaderValue::from_static("*, authorization");
const EXPOSED: HeaderValue = HeaderValue::from_static("x-request-id, retry-after, content-length");
/// Seconds; browsers cap it at two hours or less.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");

/// Origins whose pages may use the gateway.
#[derive(Debug)]
pub enum AllowedOrigins {
    /// Any.
    Any,
    /// These, as browsers write them.
    Only(Vec<String>),
}

impl AllowedOrigins {
    /// Those of the list, and that of the gateway's own URL; any if `*` is in the list.
    #[must_use]
    pub fn new(list: &[String], public_url: &str) -> Self {
        if list.iter().any(|origin| origin == "*") {
            return Self::Any;
        }
        let own = public_url
            .parse::<http::Uri>()
            .ok()
            .and_then(|url| Some(format!("{}://{}", url.scheme_str()?, url.authority()?)));
        let listed = list.iter().map(|origin| origin.trim().trim_end_matches('/').to_owned());
        Self::Only(listed.chain(own).map(|origin| origin.to_ascii_lowercase()).collect())
    }

    /// The answer to a page that may not. Whoever names no origin is no page: browsers always do with WebSockets, and
    /// with requests to other origins.
    #[must_use]
    pub fn refuse<B>(&self, request: &Request<B>) -> Option<Response<Body>> {
        let Self::Only(allowed) = self else { return None };
        let is_allowed = |origin: &HeaderValue| {
            let origin = origin.to_str().unwrap_or_default().to_ascii_lowercase();
            allowed.contains(&origin)
        };
        if request.headers().get_all(ORIGIN).iter().all(is_allowed) {
            return None;
        }
        let text = "pages of this origin may not use this gateway";
        Some(answer::error(&status(Reason::OriginNotAllowed, text)))
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(allowed: &[&str], origin: Option<&str>) -> bool {
        let allowed: Vec<String> = allowed.iter().map(|&origin| origin.to_owned()).collect();
        let mut request = Request::new(());
        if let Some(origin) = origin {
            request.headers_mut().insert(ORIGIN, origin.parse().unwrap());
        }
        AllowedOrigins::new(&allowed, "https://gateway.example/base").refuse(&request).is_some()
    }

    #[test]
    fn only_named_origins_may_if_there_are_any() {
        let console = ["https://console.example/"];
        for origin in [None, Some("https://console.example"), Some("https://Gateway.example")] {
            assert!(!refused(&console, origin), "{origin:?}");
        }
        for origin in
            ["https://evil.example", "http://console.example", "null", "https://console.example:8443"]
        {
            assert!(refused(&console, Some(origin)), "{origin}");
            assert!(!refused(&["*"], Some(origin)), "{origin}");
        }
    }
}
