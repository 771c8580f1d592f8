//! The HTTP side of a WebSocket: whether a request asks for one, whether it does so correctly (RFC 6455, 4.2.1; RFC 8441 for
//! HTTP/2), which framing it wants, and the answer that switches over.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{
        CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
        SEC_WEBSOCKET_VERSION, UPGRADE,
    },
};
use hyper::ext::Protocol;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tonic::body::Body;

use crate::rest::answer;

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const VERSION: HeaderValue = HeaderValue::from_static("13");

/// The subprotocol whose messages are those of `ExecService.AttachExec`.
pub const PROTOBUF: &str = "oc.v1.exec";
/// The subprotocol that stands for the published framing: a browser that offers its credential as a subprotocol has to
/// be answered with one, and that is not to be the credential.
pub const RAW: &str = "oc.raw";

/// Bytes of a key, once decoded.
const KEY_BYTES: usize = 16;

/// What the messages of a WebSocket are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Those that the published clients speak; the gateway resumes for them.
    Published,
    /// `AttachExecRequest` and `AttachExecResponse`; the client resumes.
    Protobuf,
}

/// Why a handshake is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The client speaks another version of the protocol.
    #[error("`Sec-WebSocket-Version` must be 13")]
    Version,
    /// No challenge, or none that can be answered.
    #[error("`Sec-WebSocket-Key` must be 16 bytes in base64")]
    Key,
    /// Bytes before the switch would be taken for frames.
    #[error("a request for a WebSocket has no body")]
    Body,
}

/// How a request asks for a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// To switch its connection over, in HTTP/1.1.
    Upgrade,
    /// To connect its stream to it, in HTTP/2 (RFC 8441).
    Connect,
}

/// Whether a request asks for a WebSocket, and how. `Upgrade` without `Connection` does not ask (RFC 9110, 7.8), and on HTTP/2
/// both mean nothing.
#[must_use]
pub fn asks<B>(request: &Request<B>) -> Option<Asks> {
    let protocol = || request.extensions().get::<Protocol>();
    let is_upgrade = || {
        tokens(request.headers(), UPGRADE).any(|token| token.eq_ignore_ascii_case("websocket"))
            && tokens(request.headers(), CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
    };
    match (request.version(), request.method()) {
        (Version::HTTP_11, &Method::GET) if is_upgrade() => Some(Asks::Upgrade),
        (Version::HTTP_2, &Method::CONNECT)
            if protocol().is_some_and(|name| name.as_str() == "websocket") =>
        {
            Some(Asks::Connect)
        }
        _ => None,
    }
}

/// What answers a handshake that is in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// With this `Sec-WebSocket-Accept`.
    Upgrade(HeaderValue),
    /// HTTP/2 has no challenge.
    Connect,
}

/// Checks a handshake.
///
/// # Errors
/// It is none.
pub fn accept<B: http_body::Body>(request: &Request<B>, asks: Asks) -> Result<Accepted, Refusal> {
    let headers = request.headers();
    if only(headers, SEC_WEBSOCKET_VERSION) != Some(&VERSION) {
        return Err(Refusal::Version);
    }
    if asks == Asks::Connect {
        return Ok(Accepted::Connect);
    }
    let key = only(headers, SEC_WEBSOCKET_KEY).ok_or(Refusal::Key)?.as_bytes();
    if STANDARD.decode(key).map(|decoded| decoded.len()) != Ok(KEY_BYTES) {
        return Err(Refusal::Key);
    }
    if !request.body().is_end_stream() {
        return Err(Refusal::Body);
    }
    HeaderValue::try_from(derive_accept_key(key)).map(Accepted::Upgrade).map_err(|_| Refusal::Key)
}

/// The framing that a client wants, and the subprotocol to answer with: the first of those it offers that we speak. The
/// published clients offer none.
#[must_use]
pub fn framing(headers: &HeaderMap) -> (Framing, Option<HeaderValue>) {
    tokens(headers, SEC_WEBSOCKET_PROTOCOL)
        .find_map(|offered| match offered {
            PROTOBUF => Some((Framing::Protobuf, Some(HeaderValue::from_static(PROTOBUF)))),
            RAW => Some((Framing::Published, Some(HeaderValue::from_static(RAW)))),
            _ => None,
        })
        .unwrap_or((Framing::Published, None))
}

/// The answer that switches over.
#[must_use]
pub fn switch(accepted: Accepted, subprotocol: Option<HeaderValue>) -> Response<Body> {
    let mut response = answer::empty(StatusCode::OK);
    if let Accepted::Upgrade(accept) = accepted {
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, WEBSOCKET);
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    let headers = response.headers_mut();
    if let Some(subprotocol) = subprotocol {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, subprotocol);
    }
    response
}

/// What is said to a client that speaks another version of the protocol (RFC 6455, 4.4).
pub fn name_the_version(response: &mut Response<Body>) {
    *response.status_mut() = StatusCode::UPGRADE_REQUIRED;
    response.headers_mut().insert(UPGRADE, WEBSOCKET);
    response.headers_mut().insert(SEC_WEBSOCKET_VERSION, VERSION);
}

/// The elements of a header that is a list, in one field or in several.
fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim).filter(|token| !token.is_empty()))
}

/// The value of a header that must not be there twice.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&HeaderValue> {
    let mut values = headers.get_all(name).into_iter();
    values.next().filter(|_| values.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANDSHAKE: [(&str, &str); 4] = [
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    fn request(headers: &[(&str, &str)]) -> Request<Body> {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    }

    fn with(name: &str, value: &str) -> Request<Body> {
        let mut headers = HANDSHAKE.to_vec();
        headers.retain(|(given, _)| *given != name);
        headers.push((name, value));
        request(&headers)
    }

    #[test]
    fn the_example_of_the_rfc_is_answered_as_there() {
        let request = request(&HANDSHAKE);
        assert_eq!(asks(&request), Some(Asks::Upgrade));
        let accepted = accept(&request, Asks::Upgrade).unwrap();
        assert_eq!(accepted, Accepted::Upgrade(HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")));
        assert_eq!(switch(accepted, None).status(), StatusCode::SWITCHING_PROTOCOLS);
    }

    #[test]
    fn what_does_not_ask_is_no_handshake() {
        for (name, value) in [("connection", "keep-alive"), ("upgrade", "h2c")] {
            assert_eq!(asks(&with(name, value)), None, "{name}: {value}");
        }
        let mut post = request(&HANDSHAKE);
        *post.method_mut() = Method::POST;
        assert_eq!(asks(&post), None);
        let mut http2 = request(&HANDSHAKE);
        *http2.version_mut() = Version::HTTP_2;
        assert_eq!(asks(&http2), None);
    }

    #[test]
    fn in_http2_a_stream_is_connected_without_a_challenge() {
        let mut connect = request(&[("sec-websocket-version", "13")]);
        *connect.version_mut() = Version::HTTP_2;
        *connect.method_mut() = Method::CONNECT;
        assert_eq!(asks(&connect), None);
        connect.extensions_mut().insert(Protocol::from_static("connect-udp"));
        assert_eq!(asks(&connect), None);
        connect.extensions_mut().insert(Protocol::from_static("websocket"));
        assert_eq!(asks(&connect), Some(Asks::Connect));
        let response = switch(accept(&connect, Asks::Connect).unwrap(), Some(HeaderValue::from_static(RAW)));
        assert_eq!((response.status(), response.headers().len()), (StatusCode::OK, 1));
        connect.headers_mut().clear();
        assert_eq!(accept(&connect, Asks::Connect), Err(Refusal::Version));
    }

    #[test]
    fn a_handshake_that_is_wrong_is_refused() {
        for version in ["12", "13, 8", ""] {
            assert_eq!(
                accept(&with("sec-websocket-version", version), Asks::Upgrade).unwrap_err(),
                Refusal::Version
            );
        }
        for key in ["", "dGhlIHNhbXBsZSBub25jZQ", "c2hvcnQ=", "not base64 at all", "AAAAAAAAAAAAAAAAAAAAAAAA"]
        {
            assert_eq!(
                accept(&with("sec-websocket-key", key), Asks::Upgrade).unwrap_err(),
                Refusal::Key,
                "{key}"
            );
        }
        let twice = [&HANDSHAKE[..], &HANDSHAKE[3..]].concat();
        assert_eq!(accept(&request(&twice), Asks::Upgrade).unwrap_err(), Refusal::Key);
        let mut body = request(&HANDSHAKE);
        *body.body_mut() = Body::new(http_body_util::Full::new(bytes::Bytes::from_static(b"x")));
        assert_eq!(accept(&body, Asks::Upgrade).unwrap_err(), Refusal::Body);
    }

    #[test]
    fn the_answered_subprotocol_is_never_the_credential() {
        let chosen = |offered: &str| {
            let (framing, answer) = framing(with("sec-websocket-protocol", offered).headers());
            (framing, answer.map(|answer| answer.to_str().unwrap().to_owned()))
        };
        assert_eq!(chosen("oc.bearer.x, oc.v1.exec"), (Framing::Protobuf, Some(PROTOBUF.to_owned())));
        assert_eq!(chosen("oc.raw,oc.bearer.x"), (Framing::Published, Some(RAW.to_owned())));
        assert_eq!(chosen("oc.raw, oc.v1.exec"), (Framing::Published, Some(RAW.to_owned())));
        assert_eq!(chosen("oc.bearer.x"), (Framing::Published, None));
        assert_eq!(chosen("soap"), (Framing::Published, None));
        assert_eq!(framing(&HeaderMap::new()), (Framing::Published, None));
    }
}
