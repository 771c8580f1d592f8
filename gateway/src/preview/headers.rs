//! Headers as they go on, in both directions: without those that are between two hops alone (RFC 9110, 7.6.1), and with those
//! that say to the port whom it answers.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
        TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Peer;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const REQUEST_ID: HeaderName = HeaderName::from_static(crate::exchange::REQUEST_ID);

/// Between two hops alone. How long a body is, each hop says anew.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Takes out what is for the next hop alone, what `Connection` names among it.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> =
            tokens(headers, &CONNECTION).filter_map(|name| name.parse().ok()).collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Whether a request asks to become a WebSocket.
#[must_use]
pub fn asks_for_websocket(headers: &HeaderMap) -> bool {
    tokens(headers, &UPGRADE).any(|token| token.eq_ignore_ascii_case("websocket"))
        && tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
}

/// Has a request ask to become a WebSocket, or an answer say that it has.
pub fn ask_for_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// A request's headers as the port gets them. `authority` is the host that it named.
pub fn to_port(
    headers: &mut HeaderMap,
    authority: &str,
    peer: Option<Peer>,
    request_id: &str,
    has_body: bool,
) {
    remove_hop_by_hop(headers);
    // Its body is asked for at once, and sent with a length of its own.
    headers.remove(EXPECT);
    if !has_body {
        headers.remove(CONTENT_LENGTH);
    }
    // Whoever is before us may have made these up.
    for name in [FORWARDED, REAL_IP, FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST] {
        headers.remove(name);
    }
    let mut set = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    set(HOST, authority);
    set(FORWARDED_HOST, authority);
    set(REQUEST_ID, request_id);
    if let Some(peer) = peer {
        set(FORWARDED_FOR, &peer.address.to_string());
        set(FORWARDED_PROTO, if peer.is_tls { "https" } else { "http" });
    }
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn what_is_between_two_hops_stays_there() {
        let mut given = headers(&[
            ("connection", "keep-alive, X-Secret"),
            ("connection", "x-other"),
            ("x-secret", "1"),
            ("x-other", "1"),
            ("te", "trailers"),
            ("keep-alive", "timeout=5"),
            ("upgrade", "h2c"),
            ("proxy-authorization", "Basic eDp5"),
            ("cookie", "a=b"),
        ]);
        remove_hop_by_hop(&mut given);
        assert_eq!(given, headers(&[("cookie", "a=b")]));
    }

    #[test]
    fn the_port_learns_whom_it_answers_from_us_alone() {
        let mut given = headers(&[
            ("host", "a.example"),
            ("x-forwarded-for", "10.0.0.1"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("expect", "100-continue"),
            ("content-length", "0"),
        ]);
        let peer = Peer { address: "192.0.2.1".parse().unwrap(), is_tls: true };
        to_port(&mut given, "a.example:8443", Some(peer), "r-1", false);
        let expected = headers(&[
            ("host", "a.example:8443"),
            ("x-forwarded-host", "a.example:8443"),
            ("x-request-id", "r-1"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "https"),
        ]);
        assert_eq!(given, expected);
    }

    #[test]
    fn only_websockets_are_asked_for() {
        assert!(asks_for_websocket(&headers(&[
            ("upgrade", "WebSocket"),
            ("connection", "keep-alive, Upgrade")
        ])));
        assert!(!asks_for_websocket(&headers(&[("upgrade", "h2c"), ("connection", "upgrade")])));
        assert!(!asks_for_websocket(&headers(&[("upgrade", "websocket")])));
    }
}
