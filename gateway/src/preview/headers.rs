//! Headers as they go on, in both directions: without those that are between two hops alone (RFC 9110, 7.6.1), and with those
//! that say to the port whom it answers.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
        TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Peer;
use crate::exchange::REQUEST_ID;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

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

/// A request's headers as the port gets them. `authority` is the host that it named.
pub fn to_port(
    headers: &mut HeaderMap,
    authority: &HeaderValue,
    peer: &Peer,
    request_id: HeaderValue,
    has_body: bool,
) {
    remove_hop_by_hop(headers);
    // Its body is asked for at once, and sent with a length of its own.
    headers.remove(EXPECT);
    if !has_body {
        headers.remove(CONTENT_LENGTH);
    }
    join_cookies(headers);
    let way = Way::here(headers, authority, peer);
    headers.remove(FORWARDED);
    headers.remove(REAL_IP);
    headers.insert(HOST, authority.clone());
    headers.insert(REQUEST_ID, request_id);
    headers.insert(FORWARDED_FOR, way.addresses);
    headers.insert(FORWARDED_PROTO, way.scheme);
    headers.insert(FORWARDED_HOST, way.host);
    headers.insert(FORWARDED_PORT, way.port);
}

/// Puts cookies that came in several fields, as HTTP/2 has them, into the one that HTTP/1.1 has (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

/// How a request came to us, as the port is told.
struct Way {
    addresses: HeaderValue,
    scheme: HeaderValue,
    host: HeaderValue,
    port: HeaderValue,
}

impl Way {
    /// As the last proxy of ours says that it began, with that proxy added; anybody else may have made it up.
    fn here(headers: &HeaderMap, authority: &HeaderValue, peer: &Peer) -> Self {
        let told = |name: HeaderName| {
            if !peer.is_trusted {
                return None;
            }
            let values: Vec<&str> = tokens(headers, &name).collect();
            // Values next to each other are one.
            (!values.is_empty()).then(|| HeaderValue::try_from(values.join(", ")).ok()).flatten()
        };
        let addresses = told(FORWARDED_FOR).and_then(|before| {
            HeaderValue::from_bytes(&[before.as_bytes(), peer.told.as_bytes()].join(&b", "[..])).ok()
        });
        let scheme = told(FORWARDED_PROTO).unwrap_or(match peer.is_tls {
            true => HeaderValue::from_static("https"),
            false => HeaderValue::from_static("http"),
        });
        let usual = if scheme.as_bytes().starts_with(b"https") { 443 } else { 80 };
        Self {
            addresses: addresses.unwrap_or_else(|| peer.told.clone()),
            scheme,
            host: told(FORWARDED_HOST).unwrap_or_else(|| authority.clone()),
            port: told(FORWARDED_PORT).unwrap_or_else(|| port(port_of(authority).unwrap_or(usual))),
        }
    }
}

/// The port of `host:port`. An IPv6 address has no port behind its last colon, but `]`.
fn port_of(authority: &HeaderValue) -> Option<u16> {
    let (_, port) = authority.to_str().ok()?.rsplit_once(':')?;
    port.parse().ok().filter(|_| !port.starts_with('+'))
}

fn port(number: u16) -> HeaderValue {
    match number {
        80 => HeaderValue::from_static("80"),
        443 => HeaderValue::from_static("443"),
        number => number.into(),
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
            ("x-forwarded-port", "1"),
            ("expect", "100-continue"),
            ("content-length", "0"),
        ]);
        let peer = Peer::new("192.0.2.1".parse().unwrap(), true, false);
        let request_id = HeaderValue::from_static("r-1");
        to_port(&mut given, &HeaderValue::from_static("a.example:8443"), &peer, request_id, false);
        let expected = headers(&[
            ("host", "a.example:8443"),
            ("x-request-id", "r-1"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.example:8443"),
            ("x-forwarded-port", "8443"),
        ]);
        assert_eq!(given, expected);
    }

    #[test]
    fn cookies_become_one_field() {
        let mut given =
            headers(&[("cookie", "a=b"), ("cookie", "c=d; e=f"), ("accept", "x"), ("accept", "y")]);
        let (peer, request_id) =
            (Peer::new("192.0.2.1".parse().unwrap(), true, false), HeaderValue::from_static("r-1"));
        to_port(&mut given, &HeaderValue::from_static("a.example"), &peer, request_id, false);
        let all =
            |name: &str| given.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("cookie"), all("accept")), (vec!["a=b; c=d; e=f"], vec!["x", "y"]));
    }

    #[test]
    fn a_proxy_of_ours_is_added_to_what_it_says() {
        let peer = Peer::new("10.0.0.2".parse().unwrap(), false, true);
        let forwarded = |pairs: &[_]| {
            let (mut given, request_id) = (headers(pairs), HeaderValue::from_static("r-1"));
            to_port(&mut given, &HeaderValue::from_static("a.example"), &peer, request_id, false);
            ["for", "proto", "host", "port"]
                .map(|what| given[&format!("x-forwarded-{what}")].to_str().unwrap().to_owned())
        };
        let told = forwarded(&[
            ("x-forwarded-for", "192.0.2.1, 10.0.0.1"),
            ("x-forwarded-for", "10.0.0.3"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "app.example"),
            ("x-forwarded-port", "8443"),
            ("forwarded", "for=192.0.2.1"),
        ]);
        assert_eq!(told, ["192.0.2.1, 10.0.0.1, 10.0.0.3, 10.0.0.2", "https", "app.example", "8443"]);
        assert_eq!(forwarded(&[("x-forwarded-proto", "https")]), ["10.0.0.2", "https", "a.example", "443"]);
        assert_eq!(forwarded(&[]), ["10.0.0.2", "http", "a.example", "80"]);
    }
}
