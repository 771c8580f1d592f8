//! Headers as they go on, in both directions: without those that are between two hops alone (RFC 9110, 7.6.1), and with those
//! that say to the port whom it answers.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        CONNECTION, COOKIE, EXPECT, Entry, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
        SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
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
pub fn to_port(headers: &mut HeaderMap, authority: &HeaderValue, peer: &Peer, request_id: HeaderValue) {
    remove_hop_by_hop(headers);
    // Its body is asked for at once.
    headers.remove(EXPECT);
    join_cookies(headers);
    let way = Way::here(headers, authority, peer);
    headers.remove(FORWARDED);
    headers.remove(REAL_IP);
    remove_made_up(headers, peer);
    headers.insert(HOST, authority.clone());
    headers.insert(REQUEST_ID, request_id);
    headers.insert(FORWARDED_FOR, way.addresses);
    headers.insert(FORWARDED_PROTO, way.scheme);
    headers.insert(FORWARDED_HOST, way.host);
    headers.insert(FORWARDED_PORT, way.port);
}

/// Takes out what a client says of its own way: of those names that proxies give, all that we do not give ourselves. Those
/// with an underscore mean the same to a program that gets its headers as variables (RFC 3875, 4.1.18), and come from nobody else.
fn remove_made_up(headers: &mut HeaderMap, peer: &Peer) {
    let is_made_up = |name: &HeaderName| {
        let name = name.as_str().as_bytes();
        let is_of_proxies = |prefix: &[u8]| {
            name.len() >= prefix.len()
                && name.iter().zip(prefix).all(|(byte, of)| byte == of || (*byte == b'_' && *of == b'-'))
        };
        (is_of_proxies(b"x-forwarded-") || is_of_proxies(b"x-real-ip"))
            && (!peer.is_trusted || name.contains(&b'_'))
    };
    let made_up: Vec<HeaderName> = headers.keys().filter(|name| is_made_up(name)).cloned().collect();
    for name in made_up {
        headers.remove(name);
    }
}

/// Takes out of the cookies that a port sets for which other hosts they are: those are other sandboxes', or the gateway's.
/// `authority` is the host that was asked for.
pub fn keep_cookies_here(headers: &mut HeaderMap, authority: &HeaderValue) {
    let Entry::Occupied(mut entry) = headers.entry(SET_COOKIE) else { return };
    let host = authority.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
    for value in entry.iter_mut() {
        let is_elsewhere = |part: &[u8]| {
            let mut sides = part.splitn(2, |byte| *byte == b'=').map(<[u8]>::trim_ascii);
            let (name, domain) = (sides.next().unwrap_or_default(), sides.next().unwrap_or_default());
            let domain = domain.strip_prefix(b".").unwrap_or(domain);
            name.eq_ignore_ascii_case(b"domain") && !domain.eq_ignore_ascii_case(host)
        };
        let mut parts = value.as_bytes().split(|byte| *byte == b';');
        // What comes first is the cookie itself.
        let cookie = parts.next().unwrap_or_default();
        if !parts.clone().any(is_elsewhere) {
            continue;
        }
        let kept: Vec<&[u8]> =
            std::iter::once(cookie).chain(parts.filter(|part| !is_elsewhere(part))).collect();
        if let Ok(kept) = HeaderValue::from_bytes(&kept.join(&b';')) {
            *value = kept;
        }
    }
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
            ("x-forwarded-user", "root"),
            ("x_forwarded_for", "10.0.0.1"),
            ("x-real_ip", "10.0.0.1"),
            ("expect", "100-continue"),
            ("content-length", "0"),
        ]);
        let peer = Peer::new("192.0.2.1".parse().unwrap(), true, false);
        let request_id = HeaderValue::from_static("r-1");
        to_port(&mut given, &HeaderValue::from_static("a.example:8443"), &peer, request_id);
        let expected = headers(&[
            ("content-length", "0"),
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
    fn a_port_sets_cookies_for_its_own_host_alone() {
        let mut given = headers(&[
            ("set-cookie", "a=b; Path=/; Domain=preview.localhost; HttpOnly"),
            ("set-cookie", "c=domain=x;domain=.LOCALHOST"),
            ("set-cookie", "d=e; Domain=.SB-1-p80.preview.localhost; Secure"),
            ("set-cookie", "f=g; HttpOnly"),
            ("x", "domain=preview.localhost"),
        ]);
        keep_cookies_here(&mut given, &HeaderValue::from_static("sb-1-p80.preview.localhost:8080"));
        let expected = headers(&[
            ("set-cookie", "a=b; Path=/; HttpOnly"),
            ("set-cookie", "c=domain=x"),
            ("set-cookie", "d=e; Domain=.SB-1-p80.preview.localhost; Secure"),
            ("set-cookie", "f=g; HttpOnly"),
            ("x", "domain=preview.localhost"),
        ]);
        assert_eq!(given, expected);
    }

    #[test]
    fn cookies_become_one_field() {
        let mut given =
            headers(&[("cookie", "a=b"), ("cookie", "c=d; e=f"), ("accept", "x"), ("accept", "y")]);
        let (peer, request_id) =
            (Peer::new("192.0.2.1".parse().unwrap(), true, false), HeaderValue::from_static("r-1"));
        to_port(&mut given, &HeaderValue::from_static("a.example"), &peer, request_id);
        let all =
            |name: &str| given.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("cookie"), all("accept")), (vec!["a=b; c=d; e=f"], vec!["x", "y"]));
    }

    #[test]
    fn a_proxy_of_ours_is_added_to_what_it_says() {
        let peer = Peer::new("10.0.0.2".parse().unwrap(), false, true);
        let forwarded = |pairs: &[_]| {
            let (mut given, request_id) = (headers(pairs), HeaderValue::from_static("r-1"));
            to_port(&mut given, &HeaderValue::from_static("a.example"), &peer, request_id);
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
