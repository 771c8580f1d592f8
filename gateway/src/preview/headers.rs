//! Headers as they go on, in both directions: without those that are between two hops alone (RFC 9110, 7.6.1), and with those
//! that say to the port whom it answers.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
        TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
    uri::Authority,
};

use super::Peer;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
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

/// A request's headers as the port gets them. `authority` is the host that it named.
pub fn to_port(
    headers: &mut HeaderMap,
    authority: &HeaderValue,
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
    join_cookies(headers);
    let way = peer.map(|peer| Way::here(headers, authority, peer)).unwrap_or_default();
    headers.remove(FORWARDED);
    headers.remove(REAL_IP);
    let mut set = |name: HeaderName, value: Option<HeaderValue>| match value {
        Some(value) => headers.insert(name, value),
        None => headers.remove(name),
    };
    set(HOST, Some(authority.clone()));
    set(REQUEST_ID, HeaderValue::from_str(request_id).ok());
    set(FORWARDED_FOR, way.addresses);
    set(FORWARDED_PROTO, way.scheme);
    set(FORWARDED_HOST, way.host);
    set(FORWARDED_PORT, way.port);
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
#[derive(Default)]
struct Way {
    addresses: Option<HeaderValue>,
    scheme: Option<HeaderValue>,
    host: Option<HeaderValue>,
    port: Option<HeaderValue>,
}

impl Way {
    /// As the last proxy of ours says that it began, with that proxy added; anybody else may have made it up.
    fn here(headers: &HeaderMap, authority: &HeaderValue, peer: Peer) -> Self {
        let told = |name: HeaderName| {
            let values: Vec<&str> = tokens(headers, &name).filter(|_| peer.is_trusted).collect();
            (!values.is_empty()).then(|| values.join(", "))
        };
        let value = |text: String| HeaderValue::try_from(text).ok();
        let before = told(FORWARDED_FOR).map(|before| before + ", ").unwrap_or_default();
        let told_scheme = told(FORWARDED_PROTO);
        let (scheme, usual) = match (told_scheme.as_deref(), peer.is_tls) {
            (Some(told), _) if told.starts_with("https") => ("https", 443),
            (None, true) => ("https", 443),
            (Some(_), _) | (None, false) => ("http", 80),
        };
        let port = || {
            let named = authority.to_str().ok().and_then(|authority| authority.parse::<Authority>().ok());
            HeaderValue::from(named.and_then(|authority| authority.port_u16()).unwrap_or(usual))
        };
        Self {
            addresses: value(format!("{before}{}", peer.address)),
            scheme: told_scheme.map_or_else(|| Some(HeaderValue::from_static(scheme)), value),
            host: told(FORWARDED_HOST).map_or_else(|| Some(authority.clone()), value),
            port: told(FORWARDED_PORT).map_or_else(|| Some(port()), value),
        }
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
        let peer = Peer { address: "192.0.2.1".parse().unwrap(), is_tls: true, is_trusted: false };
        to_port(&mut given, &HeaderValue::from_static("a.example:8443"), Some(peer), "r-1", false);
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
        to_port(&mut given, &HeaderValue::from_static("a.example"), None, "r-1", false);
        let all =
            |name: &str| given.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("cookie"), all("accept")), (vec!["a=b; c=d; e=f"], vec!["x", "y"]));
    }

    #[test]
    fn a_proxy_of_ours_is_added_to_what_it_says() {
        let peer = Peer { address: "10.0.0.2".parse().unwrap(), is_tls: false, is_trusted: true };
        let forwarded = |pairs: &[_]| {
            let mut given = headers(pairs);
            to_port(&mut given, &HeaderValue::from_static("a.example"), Some(peer), "r-1", false);
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
